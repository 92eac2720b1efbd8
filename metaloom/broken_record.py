"""The damaged samples that a run has met: told, written down, and counted against the recipe's limit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from metaloom.datasets import BrokenSample
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import StreamError
from metaloom.files import replace_file
from metaloom.tracking.console import Console

NUM_TOLD = 10  # what is more stands in the file


class BrokenRecord:
    """All damaged samples of a run, those of earlier processes of it included; the same on every rank.

    They stand in a file of the run's folder, one JSON object a line, each sample once.

    Args:
        path: of the file, which all ranks see.
        max_broken: how many samples may be damaged.
    """

    def __init__(self, path: Path, *, max_broken: int, sharding: Sharding, console: Console) -> None:
        self._path, self._max_broken = path, max_broken
        self._sharding, self._console = sharding, console
        self._known = _read(path)
        self._num_told = 0

    @property
    def count(self) -> int:
        """Damaged samples so far."""
        return len(self._known)

    def take(self, found: Iterable[BrokenSample]) -> None:
        """Takes in what this rank has met since the last time. Every rank must call.

        Raises:
            StreamError: all ranks together have met more than the recipe allows; on all ranks alike.
        """
        new = [broken for broken in dict.fromkeys(found) if broken not in self._known]
        if not self._sharding.any_rank(bool(new)):
            return
        added = [b for b in dict.fromkeys(self._sharding.gather(new)) if b not in self._known]
        self._known |= dict.fromkeys(added)
        if self._sharding.rank == 0:
            lines = (json.dumps(dataclasses.asdict(broken)) for broken in self._known)
            replace_file(self._path, "".join(f"{line}\n" for line in lines))
        for broken in added:
            self._num_told += 1
            if self._num_told <= NUM_TOLD:
                self._console.warn(f"passed over: {broken}")
            elif self._num_told == NUM_TOLD + 1:
                self._console.warn(f"more samples are passed over: see {self._path}")
        if self.count > self._max_broken:
            last = "\n".join(f"  {broken}" for broken in added[:NUM_TOLD])
            raise StreamError(
                f"{self.count} samples are damaged, and loading.max_broken is {self._max_broken}. The last "
                f"ones:\n{last}\n"
                f"All are in {self._path}. Mend the data (metaloom data verify names all that is damaged), "
                "or raise "
                "loading.max_broken, and resume."
            )


def _read(path: Path) -> dict[BrokenSample, None]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {BrokenSample(**json.loads(line)): None for line in lines}
