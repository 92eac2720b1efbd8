"""Samples for the places of an episode, where a broken one gives its place to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from metaloom.datasets.broken import BrokenSample
from metaloom.datasets.reader import Decoded, SampleReader


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
        broken: all that were met.
    """

    samples: list[list[Decoded] | None]
    broken: tuple[BrokenSample, ...]


def pick(reader: SampleReader, wants: Sequence[Want]) -> Picked:
    """Whole samples for all places, read together.

    A function of the wants and of the data alone: a sample that is broken is so at every reading.

    Raises:
        StreamError: storage failed.
    """
    places = [(want, place) for want, each in enumerate(wants) for place in range(len(each.numbers))]
    asked = {(want, place): wants[want].numbers[place] for want, place in places}
    found: dict[tuple[int, int], Decoded] = {}
    broken: dict[BrokenSample, None] = {}
    empty: set[int] = set()
    while asked:
        again: dict[tuple[int, int], int] = {}
        for place, result in zip(asked, reader.read(list(asked.values())), strict=True):
            if not isinstance(result, BrokenSample):
                found[place] = result
                continue
            broken[result] = None
            spare = wants[place[0]].spare
            if spare:
                again[place] = spare.popleft()
            else:
                empty.add(place[0])
        asked = again
    samples = [
        None if want in empty else [found[want, place] for place in range(len(each.numbers))]
        for want, each in enumerate(wants)
    ]
    return Picked(samples, tuple(broken))
