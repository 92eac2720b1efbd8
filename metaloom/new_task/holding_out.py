"""A part of a task's examples is held out, to be judged on."""

from __future__ import annotations

from collections.abc import Sequence

from metaloom.datasets.draws import generator
from metaloom.errors import StreamError

SHARE = 0.25


def held_out(labels: Sequence[str], contents: Sequence[bytes], *, seed: int) -> tuple[list[int], list[int]]:
    """(support, query): the places of the examples, a quarter of each class, at least one, drawn for query.
    Copies of an example stay together: nothing is judged on what it was adapted to.

    Args:
        labels: names of the classes; empty names where there are none.
        contents: what each example shows.

    Raises:
        StreamError: a class has one example.
    """
    rng = generator("held out of a new task", seed)
    support: list[int] = []
    query: list[int] = []
    for label in sorted({*labels}):
        copies: dict[bytes, list[int]] = {}
        for place, other in enumerate(labels):
            if other == label:
                copies.setdefault(contents[place], []).append(place)
        if len(copies) < 2:
            of = f" of class {label!r}" if label else ""
            raise StreamError(
                f"there is one example{of} (copies count once), and none can be held out to be judged on: "
                "give two or more, or a query part (--query PATH)."
            )
        number, places = count_held_out(len(copies)), list(copies.values())
        for drawn, unit in enumerate(rng.permutation(len(places)).tolist()):
            (query if drawn < number else support).extend(places[unit])
    return sorted(support), sorted(query)


def count_held_out(num_examples: int) -> int:
    """How many of some examples are query."""
    return max(1, round(SHARE * num_examples))
