"""Where a rank is in its job, and why it failed: in files, so that a rank that was killed has said it too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

START = "the start"
END = "the end"

# mistake: an error that users can meet, as a message for them. defect: anything else that was raised.
# stopped: the job was asked to stop, from outside. lost_partner: a collective failed, since another rank was
# gone or silent: an effect, never the cause.
FailureKind = Literal["mistake", "defect", "stopped", "lost_partner"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a rank ended, in its own words."""

    kind: FailureKind
    text: str


class Whereabouts:
    """Where this rank is, in words that follow "at": `outer step 14`, `step 30 of pretrain`.

    Args:
        folder: where to keep it, on a disk of this machine; None keeps it in memory alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.text = START
        self._folder = folder
        self._file = None if folder is None else os.open(_place(folder), os.O_WRONLY | os.O_CREAT)

    def enter(self, text: str) -> None:
        """Says where the rank is from now on. It costs one small write, which no power cut has to survive."""
        self.text = text
        self.begin("")

    def begin(self, phase: str) -> None:
        """Says what the rank does there from now on, in words such as `reading tasks`."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk is no reason to end
                os.pwrite(self._file, f"{self.text}\n{phase}\n".encode().ljust(160), 0)

    def record(self, failure: Failure) -> None:
        """Leaves the reason of a failure for whoever started the rank, where the disk takes it: it must not
        hide the failure."""
        if self._folder is not None:
            partial = self._folder / "failure.partial"
            with contextlib.suppress(OSError):
                partial.write_text(json.dumps(dataclasses.asdict(failure)), encoding="utf-8")
                partial.replace(_failure(self._folder))


def last_place(folder: Path) -> str:
    """Where the rank was that keeps its whereabouts in a folder."""
    try:
        return _place(folder).read_text(encoding="utf-8", errors="replace").partition("\n")[0] or START
    except FileNotFoundError:
        return START


def last_seen(folder: Path) -> str:
    """The same, with what the rank did there, where it has said so: `outer step 14, reading tasks`."""
    try:
        place, phase, *_ = [*_place(folder).read_text(encoding="utf-8", errors="replace").split("\n"), "", ""]
    except FileNotFoundError:
        return START
    return ", ".join(filter(None, (place or START, phase)))


def last_failure(folder: Path) -> Failure | None:
    """What the rank has said of its failure; None where it said nothing, killed for instance."""
    try:
        return Failure(**json.loads(_failure(folder).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _place(folder: Path) -> Path:
    return folder / "place"


def _failure(folder: Path) -> Path:
    return folder / "failure.json"
