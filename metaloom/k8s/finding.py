"""What a look at a job before it is sent finds."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        text: what, where, and what to do.
        is_problem: whether the job could not run, or would lose what it does; else it may be meant so, or
            could not be looked at.
    """

    text: str
    is_problem: bool = True


def note(text: str) -> Finding:
    return Finding(text, is_problem=False)
