"""The damaged samples that a run has met: told, written down, and counted against the recipe's limit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaloom.datasets import BrokenSample
from metaloom.disk import Disk
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import StreamError
from metaloom.tracking.console import Console

NUM_TOLD = 10  # what is more stands in the file


class BrokenRecord:
    """All damaged samples of a run, those of earlier processes of it included; the same on every rank.

    They stand in a file of the run's folder, one JSON object a line, each sample once, with the step at
    which it was met first (negative in ordinary training, as of the metrics; null in an evaluation).

    Args:
        path: of the file, that of rank 0 counts.
        max_broken: how many samples may be damaged.
        first_step: what was met at this step or later, by a run that went on after its last checkpoint, or
            in an evaluation, will be met again, and is dropped; None drops nothing.
        disk: the file is on.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_broken: int,
        sharding: Sharding,
        console: Console,
        disk: Disk,
        first_step: int | None,
    ) -> None:
        self._path, self._max_broken = path, max_broken
        self._sharding, self._console, self._disk = sharding, console, disk
        self._known: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._num_told = 0
        records = sharding.gather(_read(path) if sharding.rank == 0 else [])
        for record in records:
            if first_step is None or (record["step"] is not None and record["step"] < first_step):
                self._known[record["url"], record["shard"], record["key"]] = record
        if sharding.rank == 0 and len(self._known) < len(records):
            self._write()

    @property
    def count(self) -> int:
        """Damaged samples so far."""
        return len(self._known)

    def take(self, found: Iterable[BrokenSample], *, step: int | None) -> None:
        """Takes in what this rank has met since the last time. Every rank must call.

        Args:
            step: for which it was read; None outside of training.

        Raises:
            StreamError: all ranks together have met more than the recipe allows; on all ranks alike.
        """
        new = [broken for broken in dict.fromkeys(found) if _identity(broken) not in self._known]
        if not self._sharding.any_rank(bool(new)):
            return
        first: dict[tuple[str, str, str], BrokenSample] = {}
        for broken in self._sharding.gather(new):
            first.setdefault(_identity(broken), broken)
        added = list(first.values())
        self._known |= {_identity(b): {"step": step} | dataclasses.asdict(b) for b in added}
        if self._sharding.rank == 0:
            self._write()
            self._tell(added)
        if self.count > self._max_broken:
            verb = "sample is" if self.count == 1 else "samples are"
            last = "\n".join(f"  {broken}" for broken in added[:NUM_TOLD])
            raise StreamError(
                f"{self.count} {verb} damaged, and loading.max_broken is {self._max_broken}. The last "
                f"ones:\n{last}\n"
                f"All are in {self._path}. Mend the data (metaloom data verify --decode names what is "
                "damaged), or raise loading.max_broken, and resume."
            )

    def end_with(self, found: Iterable[BrokenSample]) -> None:
        """Writes down what this rank could not pass over, and ends for. As of an evaluation: a run that goes
        on meets them again."""
        for broken in found:
            self._known.setdefault(_identity(broken), {"step": None} | dataclasses.asdict(broken))
        self._write()

    def _tell(self, added: Iterable[BrokenSample]) -> None:
        for broken in added:
            self._num_told += 1
            if self._num_told <= NUM_TOLD:
                self._console.warn(f"passed over: {broken}")
            elif self._num_told == NUM_TOLD + 1:
                self._console.warn(f"more samples are passed over: see {self._path}")

    def _write(self) -> None:
        lines = (json.dumps(record) for record in self._known.values())
        self._disk.replace(self._path, "".join(f"{line}\n" for line in lines))


def _identity(broken: BrokenSample) -> tuple[str, str, str]:
    return broken.url, broken.shard, broken.key


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
