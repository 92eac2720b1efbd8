"""What a job writes into its run's folder, whose disk may be full for a while."""

from __future__ import annotations

import dataclasses
import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path

from metaloom.errors import CheckpointError
from metaloom.files import replace_file

# A full disk, a full share of one, and a disk that fails. Whatever else is no matter of waiting.
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
RETRY_S = 15.0  # between two attempts where there is nothing else to do


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """What a file lacks.

    Attributes:
        write: writes it, all that it lacks.
        lost: what is lost where it never is, in words.
    """

    write: Callable[[], None]
    lost: Callable[[], str]


class Disk:
    """Writes the files of a run's folder. What the disk does not take waits in memory, and is tried again
    with whatever is written next: the job goes on meanwhile, with one warning. For one thread.

    Args:
        patience_minutes: how long a job goes on while something waits.
        warn: shows a warning to people; the logger `metaloom` if None.
        note: shows that all is well again; nothing if None.
    """

    def __init__(
        self,
        *,
        patience_minutes: float = 60.0,
        warn: Callable[[str], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._patience_minutes = patience_minutes
        self._warn = warn or logging.getLogger("metaloom").warning
        self._note = note or (lambda text: None)
        self._waiting: dict[Path, _Waiting] = {}
        self._contents: dict[Path, bytes] = {}  # of files that are to be replaced
        self._failing_since_s: float | None = None
        self._is_ending = False
        self._has_ended = False

    def read(self, path: Path) -> bytes:
        """What a file holds that `replace` writes, or will hold; nothing where there is none."""
        if path in self._contents:
            return self._contents[path]
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""

    def replace(self, path: Path, content: str | bytes) -> None:
        """Writes a file in one motion, as `replace_file` does, or later.

        Raises:
            CheckpointError: the disk has taken nothing for longer than the patience.
            OSError: of a kind that does not pass.
        """
        new = content.encode() if isinstance(content, str) else content

        def write() -> None:
            replace_file(path, new)
            self._contents.pop(path, None)

        self._contents[path] = new
        self.write(path, write, lost=lambda: "what it should hold")

    def write(self, path: Path, write: Callable[[], None], *, lost: Callable[[], str]) -> None:
        """Calls `write`, now, or again with what is written next. It writes all that a file lacks, or raises.

        Args:
            lost: what is lost where it is never written, in words.

        Raises:
            CheckpointError: the disk has taken nothing for longer than the patience.
            OSError: of a kind that does not pass.
        """
        self._waiting[path] = _Waiting(write, lost)
        failed = self._try()
        if failed is not None:
            self._take(*failed)

    def wait(self, is_hurried: Callable[[], bool]) -> None:
        """Returns when nothing waits any more, or there is no time for it.

        Raises:
            CheckpointError: the disk has taken nothing for longer than the patience.
        """
        while (failed := self._try()) is not None and not is_hurried():
            self._take(*failed)
            time.sleep(RETRY_S)

    def raise_nothing(self) -> None:
        """From now on nothing is raised: the job ends, and why it does is for others to say."""
        self._is_ending = True

    def end(self) -> None:
        """Tries once more what waits, and says what is lost. Raises nothing."""
        self._is_ending = True
        failed = self._try()
        if failed is None or self._has_ended:
            return
        self._has_ended = True
        lost = "; ".join(f"of {path} {waiting.lost()}" for path, waiting in self._waiting.items())
        self._warn(
            f"{_why(*failed)}. Lost is: {lost}. Make room on that disk; a run that is resumed does the steps "
            "after its last checkpoint again, with what belongs to them."
        )

    def _try(self) -> tuple[Path, OSError] | None:
        """Writes what waits; returns the first error."""
        first: tuple[Path, OSError] | None = None
        for path, waiting in list(self._waiting.items()):
            try:
                waiting.write()
            except OSError as error:
                if error.errno not in PASSING and not self._is_ending:
                    raise
                first = first or (path, error)
            else:
                del self._waiting[path]
        if first is None and self._failing_since_s is not None:
            self._failing_since_s = None
            self._note("the run's folder is written again: nothing is lost")
        return first

    def _take(self, path: Path, error: OSError) -> None:
        if self._is_ending:
            return
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
            self._warn(
                f"{_why(path, error)}. The job goes on; what belongs there waits in memory, and is tried "
                f"again for up to {self._patience_minutes:g} min (checkpoint.patience_minutes). Make room on "
                "that disk."
            )
            return
        if now_s - self._failing_since_s > 60.0 * self._patience_minutes:
            raise CheckpointError(
                f"{_why(path, error)}. So it has been for {(now_s - self._failing_since_s) / 60:.0f} min, "
                "longer than checkpoint.patience_minutes. Make room on that disk, and go on from the last "
                "checkpoint."
            )


def _why(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}"
