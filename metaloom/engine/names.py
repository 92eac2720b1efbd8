"""Parameters that are chosen by what they are called."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

_MOST_SHOWN = 8


def matching(names: Iterable[str], entry: str) -> list[str]:
    """The names that an entry means: a pattern of `fnmatch` (`*`, `?`, `[...]`) of whole names, or else of
    what they begin with, such as a kind of meta-parameters ("init", "rates")."""
    names = list(names)
    by_pattern = [name for name in names if fnmatch.fnmatchcase(name, entry)]
    return by_pattern or [name for name in names if fnmatch.fnmatchcase(name, f"{entry}.*")]


def in_short(names: Iterable[str]) -> str:
    """The first names, for a message."""
    names = sorted(names)
    rest = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
