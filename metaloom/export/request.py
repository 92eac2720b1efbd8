"""What the command line asks of an export. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Request:
    """An export that is asked for.

    Attributes:
        run: the run's folder.
        step: the outer step; None for the best that was validated.
        format: of `formats.FORMATS`.
        output: the folder to be written.
        merge: whether a LoRA initialisation goes into the weights beside it.
        replace: whether an export that lies there may go.
    """

    run: str
    step: int | None
    format: str
    output: str
    merge: bool
    replace: bool


def default_output(run: Path, name: str, step: int | None) -> Path:
    """Where an export goes where no place is named."""
    return run / "export" / (name if step is None else f"{name}-step-{step}")
