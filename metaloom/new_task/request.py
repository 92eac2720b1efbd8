"""What the command line asks of an adaptation. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Where a task's examples are, and what the columns of records are for.

    Attributes:
        task: a folder or a file.
        query: what is judged on, another one; None where it is in `task`, or is held out.
        inputs: the columns of what a model is shown.
        targets: the columns of what it shall say.
        kind: of the inputs; None for what the run is shown, or the first record shows.
        tokenizer: file of a tokenizer, by which texts become tokens.
    """

    task: str
    query: str | None = None
    inputs: tuple[str, ...] = ("input",)
    targets: tuple[str, ...] = ("target",)
    kind: str | None = None
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        """What the task is called: its folder or file, without the extension."""
        return Path(self.task).resolve().stem


@dataclasses.dataclass(frozen=True)
class Request:
    """An adaptation that is asked for.

    Attributes:
        files: the task.
        num_steps: inner steps; None for those of an evaluation.
        rehearses: whether what the recipe rehearses is read.
        run, step, format, output, merge, replace: as in `metaloom.export.request`.
    """

    files: TaskFiles
    num_steps: int | None
    rehearses: bool
    run: str
    step: int | None
    format: str
    output: str
    merge: bool
    replace: bool

    def to_json(self) -> str:
        """For the process that adapts."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` returned."""
        values: dict[str, Any] = json.loads(text)
        files: dict[str, Any] = values.pop("files")
        files |= {name: tuple(files[name]) for name in ("inputs", "targets")}
        return cls(TaskFiles(**files), **values)
