"""Samples for the places of an episode, where a broken one gives its place to the next."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

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
    numbers = [number for want in wants for number in want.numbers]
    found = reader.read(numbers)
    owners = [row for row, want in enumerate(wants) for _ in want.numbers]  # of each place
    broken: dict[BrokenSample, None] = {}
    empty: set[int] = set()
    asked = [place for place, result in enumerate(found) if isinstance(result, BrokenSample)]
    while asked:
        again = []
        for place in asked:
            result = found[place]
            assert isinstance(result, BrokenSample), "only these are asked for again"
            broken[result] = None
            met = dict.fromkeys((*before, *broken))
            if len(met) >= MAX_BROKEN:
                raise none_is_whole(tuple(met))
            spare = wants[owners[place]].spare
            if spare:
                numbers[place] = spare.popleft()
                again.append(place)
            else:
                empty.add(owners[place])
        for place, result in zip(again, reader.read([numbers[place] for place in again]), strict=True):
            found[place] = result
        asked = [place for place in again if isinstance(found[place], BrokenSample)]
    ends = list(itertools.accumulate(len(want.numbers) for want in wants))
    rows = [slice(end - len(want.numbers), end) for want, end in zip(wants, ends, strict=True)]
    return Picked(
        [None if want in empty else cast(list[Decoded], found[row]) for want, row in enumerate(rows)],
        [None if want in empty else numbers[row] for want, row in enumerate(rows)],
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
