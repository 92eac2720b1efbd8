"""Times, durations, nodes and ranks in words, and times as Kubernetes writes them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

_FRACTION = re.compile(r"\.(\d{6})\d+")  # a kubelet writes nanoseconds


def time_of(text: object) -> datetime.datetime | None:
    """A time of an object (RFC 3339), in UTC; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        found = datetime.datetime.fromisoformat(_FRACTION.sub(r".\1", text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def duration_words(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s, 2 h 05 min or 3 d 04 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, rest_min = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {rest_min:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def clock_words(moment: datetime.datetime, now: datetime.datetime) -> str:
    """A moment as 14:05 UTC, with its date where that is another day's."""
    moment, now = moment.astimezone(datetime.UTC), now.astimezone(datetime.UTC)
    day = "" if moment.date() == now.date() else f"{moment:%Y-%m-%d} "
    return f"{day}{moment:%H:%M} UTC"


def counted(number: int, noun: str) -> str:
    """1 node, 2 nodes."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def ranks_words(index: int, ranks_per_node: int) -> str:
    """The ranks of a node: rank 3, or ranks 24-31."""
    first = index * ranks_per_node
    return f"rank {first}" if ranks_per_node == 1 else f"ranks {first}-{first + ranks_per_node - 1}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def indices_words(indices: Sequence[int]) -> str:
    """The nodes with these indices: node 3, or nodes 0-2 and 5."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(index) for index in run]
    return ("node " if len(set(indices)) == 1 else "nodes ") + listed(parts)
