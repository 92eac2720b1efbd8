"""Samples for the places of an episode, where a broken one gives its place to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.reader import Decoded, SampleReader

T = TypeVar("T")

MAX_BROKEN = 1000  # that are looked at for one episode or batch
MAX_REPLACED = 100  # whole tasks that are looked at in place of a broken one


@dataclass(frozen=True)
class Want:
    """Some places, and who may take them.

    Attributes:
        numbers: samples that shall have the places, in order.
        spare: samples that take the place of broken ones, in order. Several wants may share one, so that none
            of them gets what another has.
    """

    numbers: Sequence[int]
    spare: deque[int] = field(default_factory=deque)


@dataclass(frozen=True)
class Picked:
    """What the places of some wants were given.

    Attributes:
        samples: of each want, those of its places; None for a want whose spare samples were too few.
        numbers: theirs.
        broken: all that were met.
    """

    samples: list[list[Decoded] | None]
    numbers: list[list[int] | None]
    broken: tuple[BrokenSample, ...]


def pick(reader: SampleReader, wants: Sequence[Want], *, before: Sequence[BrokenSample] = ()) -> Picked:
    """Whole samples for all places, read together.

    A function of its arguments and of the data alone: a sample that is broken is so at every reading.

    Args:
        before: broken samples that were met before, for the same episode.

    Raises:
        SampleError: MAX_BROKEN samples are broken, so that more of the same kind need not be read.
        StreamError: storage failed.
    """
    places = [(want, place) for want, each in enumerate(wants) for place in range(len(each.numbers))]
    asked = {(want, place): wants[want].numbers[place] for want, place in places}
    found: dict[tuple[int, int], tuple[int, Decoded]] = {}
    broken: dict[BrokenSample, None] = {}
    empty: set[int] = set()
    while asked:
        again: dict[tuple[int, int], int] = {}
        for (place, number), result in zip(asked.items(), reader.read(list(asked.values())), strict=True):
            if not isinstance(result, BrokenSample):
                found[place] = number, result
                continue
            broken[result] = None
            met = dict.fromkeys((*before, *broken))
            if len(met) >= MAX_BROKEN:
                raise none_is_whole(tuple(met))
            spare = wants[place[0]].spare
            if spare:
                again[place] = spare.popleft()
            else:
                empty.add(place[0])
        asked = again
    pairs = [
        None if want in empty else [found[want, place] for place in range(len(each.numbers))]
        for want, each in enumerate(wants)
    ]
    return Picked(
        [None if each is None else [sample for _, sample in each] for each in pairs],
        [None if each is None else [number for number, _ in each] for each in pairs],
        tuple(broken),
    )


def others(rng: np.random.Generator, num_items: int, item: int, *, limit: int = MAX_REPLACED) -> list[int]:
    """Items of `num_items` that are tried in place of one, in random order, each once: at most `limit`."""
    drawn: list[int] = rng.choice(num_items, min(num_items, limit), replace=False).tolist()
    return [other for other in drawn if other != item][: limit - 1]


def whole_task(
    read: Callable[[int], T | BrokenSample],
    item: int,
    num_items: int,
    replacements: Callable[[], np.random.Generator],
) -> tuple[int, T, tuple[BrokenSample, ...]]:
    """The item of a task, what it holds, and the broken ones whose place it takes.

    Args:
        read: what an item holds, or what is wrong with it.
        item: which of `num_items` the task is to be.
        replacements: makes the generator that puts the others in order, where the item is broken.

    Raises:
        SampleError: none of those that are tried is whole.
    """
    tried, broken = [item], list[BrokenSample]()
    while True:
        found = read(tried[len(broken)])
        if not isinstance(found, BrokenSample):
            return tried[len(broken)], found, tuple(broken)
        broken.append(found)
        if len(broken) == 1:
            tried += others(replacements(), num_items, item)
        if len(broken) == len(tried):
            raise none_is_whole(broken)


def none_is_whole(broken: Sequence[BrokenSample]) -> SampleError:
    """The error for broken samples, all different, where nothing whole was found in their place."""
    tried = (
        f"So were {len(broken) - 1} that were tried before it"
        if len(broken) > 1
        else "There is no other to take its place"
    )
    return SampleError(
        broken[-1], f"{tried}: mend the data, or correct what the recipe says of them.", broken
    )
