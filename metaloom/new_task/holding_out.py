"""A part of a task's examples is held out, to be judged on."""

from __future__ import annotations

from collections.abc import Sequence

from metaloom.datasets.draws import generator
from metaloom.errors import StreamError

SHARE = 0.25


def held_out(labels: Sequence[str], *, seed: int) -> tuple[list[int], list[int]]:
    """(support, query): the places of the examples, a quarter of each class, at least one, drawn for query.

    Args:
        labels: names of the classes; empty names where there are none.

    Raises:
        StreamError: a class has one example.
    """
    rng = generator("held out of a new task", seed)
    support: list[int] = []
    query: list[int] = []
    for label in sorted({*labels}):
        places = [place for place, other in enumerate(labels) if other == label]
        if len(places) < 2:
            of = f" of class {label!r}" if label else ""
            raise StreamError(
                f"there is one example{of}, of which none can be held out to be judged on: give two or more, "
                "or a query part (--query PATH)."
            )
        number = count_held_out(len(places))
        order = rng.permutation(places).tolist()
        query += order[:number]
        support += order[number:]
    return sorted(support), sorted(query)


def count_held_out(num_examples: int) -> int:
    """How many of some examples are query."""
    return max(1, round(SHARE * num_examples))
