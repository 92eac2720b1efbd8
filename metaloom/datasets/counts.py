"""How much there is in a data set, and how large its classes are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.index import SplitTable

_BAR = 40  # letters of the longest bar
_MAX_BARS = 20


def counts(table: SplitTable) -> tuple[str, str, str, str, str]:
    """A line of a table: split, samples, classes, groups, members."""
    group = table.attributes.get("group")
    num_groups = "" if group is None else str(len(np.unique(group)))
    num_classes = str(len(table.classes)) if table.classes else ""
    return (table.name, str(table.num_samples), num_classes, num_groups, ", ".join(table.members))


def histogram(table: SplitTable) -> list[str]:
    """How many samples the classes have, as bars of text; empty for a split without classes.

    Many classes of different sizes are put into ranges.
    """
    rows = table.attributes.get("class")
    if rows is None or not table.classes:
        return []
    sizes = np.bincount(rows, minlength=len(table.classes))
    if len(sizes) <= _MAX_BARS:
        title, bars = "samples by class", list(zip(table.classes, sizes.tolist(), strict=True))
    else:
        title, bars = "classes by number of samples", _ranges(sizes)
    width = max(len(name) for name, _ in bars)
    largest = max(1, max(count for _, count in bars))
    lines = [f"{table.name}: {title}"]
    for name, count in bars:
        bar = "#" * max(round(_BAR * count / largest), int(count > 0))
        lines.append(f"  {name:<{width}}  {count:>{len(str(largest))}}  {bar}".rstrip())
    return lines


def _ranges(sizes: NDArray[np.int64]) -> list[tuple[str, int]]:
    """(range of sizes, number of classes), at most `_MAX_BARS` ranges of equal width."""
    low, high = int(sizes.min()), int(sizes.max())
    width = -(-(high - low + 1) // _MAX_BARS)
    starts = range(low, high + 1, width)
    found = np.bincount((sizes - low) // width, minlength=len(starts))
    return [
        (f"{start}" if width == 1 else f"{start} to {start + width - 1}", int(count))
        for start, count in zip(starts, found, strict=True)
    ]
