"""The table before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping

from metaloom.engine.losses import bits
from metaloom.recipe import Recipe
from metaloom.recipe.tasks import loss_name
from metaloom.tracking.console import format_value

_PARTS = ("support", "query", "retention")


def before_and_after(
    recipe: Recipe, measures: Mapping[str, tuple[float, float]], sizes: Mapping[str, int]
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): a row for each part of the task's data.

    Args:
        measures: as in `Outcome`.
        sizes: examples of each part.
    """
    names = list(dict.fromkeys(name.partition("_")[2] for name in measures))
    shown = {name: loss_name(recipe) if name == "loss" else name for name in names}
    columns = ["part", "examples"]
    columns += [f"{shown[name]} {when}" for name in names for when in ("before", "after")]
    rows = []
    for part in _PARTS:
        if f"{part}_loss" not in measures:
            continue
        row = [part, str(sizes[part])]
        for name in names:
            pair = measures.get(f"{part}_{name}")
            row += ["-", "-"] if pair is None else [_told(shown[name], value) for value in pair]
        rows.append(row)
    return columns, rows


def _told(name: str, value: float) -> str:
    return format_value(name, bits(value) if name.startswith("bits") else value)
