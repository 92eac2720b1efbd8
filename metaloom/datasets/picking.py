"""Samples for the places of an episode, where a broken one gives its place to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.reader import Decoded, SampleReader

MAX_BROKEN = 1000  # that are looked at for one episode or batch


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


def pick(reader: SampleReader, wants: Sequence[Want], *, num_broken: int = 0) -> Picked:
    """Whole samples for all places, read together.

    A function of its arguments and of the data alone: a sample that is broken is so at every reading.

    Args:
        num_broken: samples that were broken and met before, for the same episode.

    Raises:
        SampleError: MAX_BROKEN samples are broken, so that more of the same kind need not be read.
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
            if num_broken + len(broken) >= MAX_BROKEN:
                raise SampleError(
                    result,
                    f"So were {MAX_BROKEN - 1} that were tried before it: mend the data, or correct what the "
                    "recipe says of them.",
                )
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
