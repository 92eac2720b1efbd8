"""Metrics as lines of JSON in the run folder: the record that is always there.

Each line is one `log` call: {"step": 3, "time_s": 1700000000.123, "meta_loss": 1.25}. NaN and
infinities are written as the strings "NaN", "Infinity", "-Infinity", so every line is strict JSON.
"""

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from metaloom.disk import Disk
from metaloom.errors import TrackingError
from metaloom.files import replace_file
from metaloom.tracking.base import RESERVED_METRIC_NAMES, FinishStatus, MetricRecord, RunTracker


def encode_number(value: float) -> float | str:
    """The number itself, or a string for NaN and infinities, which JSON does not have."""
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def decode_number(value: float | str) -> float:
    """Inverse of `encode_number`."""
    return float(value)


def _encode(record: MetricRecord) -> bytes:
    fields: dict[str, float | str] = {"step": record.step, "time_s": record.time_s}
    fields.update((name, encode_number(value)) for name, value in record.metrics.items())
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> MetricRecord:
    """The record of one line.

    Raises:
        ValueError: the line is not one that `JsonlTracker` writes.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not fields.keys() >= RESERVED_METRIC_NAMES:
        raise ValueError("no object with `step` and `time_s`")
    step, time_s = int(fields.pop("step")), float(fields.pop("time_s"))
    try:
        metrics = {name: decode_number(value) for name, value in fields.items()}
    except TypeError as error:
        raise ValueError(str(error)) from error
    return MetricRecord(step, time_s, metrics)


def complete_lines(path: Path) -> Iterator[bytes]:
    """The lines that were written to their end; a line torn by a killed process is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def read_metrics(path: Path) -> list[MetricRecord]:
    """The records of a metrics file in the order of logging; a torn last line is left out.

    Raises:
        TrackingError: the file is missing, or a line of it is not a record.
    """
    records = []
    try:
        for number, line in enumerate(complete_lines(path), start=1):
            try:
                records.append(decode_line(line))
            except ValueError as error:
                raise TrackingError(
                    f"{path}, line {number}: not a metrics record ({error}). Each line is the JSON of one "
                    'logged step, {"step": 3, "time_s": ..., "meta_loss": ...}; remove the line.'
                ) from error
    except OSError as error:
        raise TrackingError(
            f"{path}: cannot be read ({error.strerror}). Metrics are in metrics.jsonl of a run folder."
        ) from error
    return records


def truncate_from(path: Path, step: int) -> int:
    """Drops the lines of `step` and later, and a torn last line; returns how many were dropped.

    The file is cut, where all of them are at its end, or else replaced in one motion: so a process killed
    here leaves the old or the new file, and a full disk has room for it.
    """
    if not path.exists():
        return 0
    total, kept, is_prefix = 0, list[bytes](), True
    with path.open("rb") as file:
        for line in file:
            total += 1
            if line.endswith(b"\n") and decode_line(line).step < step:
                is_prefix &= len(kept) == total - 1
                kept.append(line)
    if len(kept) == total:
        return 0
    if is_prefix:
        os.truncate(path, sum(map(len, kept)))
    else:
        replace_file(path, b"".join(kept))
    return total - len(kept)


class _Lines:
    """Lines at the end of a file, each there as a whole or not at all.

    Attributes:
        waiting: what was not written yet: each line, and the number of metrics in it.
    """

    def __init__(self, path: Path) -> None:
        # Without a buffer: one that could not be emptied would be written again in part.
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._num_torn = 0  # bytes at the end of the file, of a line that is not whole
        self.waiting: deque[tuple[bytes, int]] = deque()

    def write(self) -> None:
        """Writes what waits.

        Raises:
            OSError: not all of it could be written; what is left waits.
        """
        while self.waiting:
            self._cut()
            line, _ = self.waiting[0]
            try:
                while self._num_torn < len(line):
                    # A disk with room for a part takes that.
                    self._num_torn += self._file.write(line[self._num_torn :])
            except OSError:
                # At once, for those that read meanwhile; if not, before the next attempt.
                with contextlib.suppress(OSError):
                    self._cut()
                raise
            self._num_torn = 0
            self.waiting.popleft()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _cut(self) -> None:
        if self._num_torn:
            descriptor = self._file.fileno()
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - self._num_torn)
            self._num_torn = 0


class JsonlTracker(RunTracker):
    """Appends one line per `log` call to `path`; each line is with the operating system on return, unless the
    disk is full: then lines wait in memory for the next call.

    Args:
        path: the file, usually metrics.jsonl of the run folder; its folder is made.
        first_step: the first outer step that this process will log, the step of the checkpoint
            that it continued from, or 0 (less, where phases before meta-training count below 0).
            Lines of that step and later come from an attempt that went further than its last
            checkpoint: `start` drops them, so that no step is there twice.
        disk: the file is on; it says how long lines may wait.

    Artifacts from outside the folder of `path` are copied to `artifacts/` in it; others stay
    where they are.
    """

    def __init__(self, path: Path, *, first_step: int = 0, disk: Disk | None = None) -> None:
        self._path = path
        self._first_step = first_step
        self._disk = disk or Disk()
        self._lines: _Lines | None = None

    @property
    def num_waiting(self) -> int:
        """Metrics that were logged and are not in the file yet."""
        return 0 if self._lines is None else sum(count for _, count in self._lines.waiting)

    def start(
        self,
        *,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        resume_id: str | None,
        new_id: str | None = None,
    ) -> str:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            truncate_from(self._path, self._first_step)
            self._lines = _Lines(self._path)
        except (OSError, ValueError) as error:
            raise TrackingError(
                f"{self._path}: metrics cannot be written there ({error}). The file holds JSON lines in a "
                "writable folder; choose another run folder or move the file away."
            ) from error
        return resume_id or new_id or uuid.uuid4().hex

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        reserved = RESERVED_METRIC_NAMES & metrics.keys()
        if reserved:
            raise ValueError(
                f"a metric cannot be called {sorted(reserved)[0]!r}: the name is part of the format"
            )
        lines = self._lines
        if lines is None:
            raise RuntimeError("log() needs a tracker that was started and is not finished")
        record = MetricRecord(step, round(time.time(), 3), dict(metrics))
        lines.waiting.append((_encode(record), len(metrics)))
        self._disk.write(self._path, lines.write, lost=lambda: f"{len(lines.waiting)} lines")

    def artifact(self, path: Path, folder: str = "") -> None:
        home = self._path.parent.resolve()
        if path.resolve().is_relative_to(home):
            return
        target = home / "artifacts" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def flush(self, timeout_s: float) -> bool:
        if self._lines is None:
            return True
        try:
            self._lines.sync()
        except OSError:
            return False
        return not self._lines.waiting

    def finish(self, status: FinishStatus) -> None:
        if self._lines is not None:
            self._disk.end()
            with contextlib.suppress(OSError):  # file systems of a network may say here that the disk is full
                self._lines.close()
            self._lines = None

    def describe(self) -> str:
        return str(self._path)
