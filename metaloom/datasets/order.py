"""Which samples or classes come when, as pure functions of the number of an episode.

Reading at random is what episodes want, reading in stretches is what object stores are good at. Both orders
here are random, and such that one virtual stream (`streams.py`) stays within a few stretches of a data set
for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.draws import generator
from metaloom.datasets.streams import NUM_STREAMS, virtual_stream

STRETCH_BYTES = 4 << 20
STRETCHES_AT_A_TIME = 8


class EpochOrder:
    """Each of M items once per epoch, in another order each time.

    In an epoch the items are cut into stretches of about 4 MiB, these are shuffled and dealt to the virtual
    streams one after the other; a stream goes through eight stretches at a time, their items shuffled. A
    data set of fewer than eight stretches per stream is shuffled as a whole.

    Takes 24 bytes per item: its stretch, and its place in each of the two epochs that were asked for last,
    since some streams begin an epoch while others end the one before. Shuffling takes five times that, for
    a moment.

    Args:
        lengths: bytes of each item, `[M]`, in the order in which they lie.
        purpose: names the draws.
    """

    def __init__(self, lengths: NDArray[np.int64], *, purpose: str, seed: int, split: str) -> None:
        self._num_items = len(lengths)
        ends = np.cumsum(lengths)
        # Row of its stretch for each item; a stretch ends where the next 4 MiB begin.
        self._stretch = ((ends - 1) // STRETCH_BYTES).astype(np.int64) if len(lengths) else ends
        self._draw = (purpose, seed, split)
        self._known: dict[int, NDArray[np.int64]] = {}  # by epoch

    def item(self, number: int) -> int:
        """The item of episode `number`: of the numbers e * M .. (e + 1) * M - 1 each item has one."""
        epoch, place = divmod(number, self._num_items)
        known = self._known
        if epoch not in known:
            # Another dictionary, since other threads may be looking into this one.
            newest = dict(list(known.items())[-1:])
            self._known = known = newest | {epoch: self._order(epoch)}
        return int(known[epoch][place])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The item of each place of an epoch, `[M]`."""
        purpose, seed, split = self._draw
        rng = generator(purpose, seed, split, epoch)
        stretches = np.unique(self._stretch)
        if len(stretches) < STRETCHES_AT_A_TIME * NUM_STREAMS:
            return rng.permutation(self._num_items)
        rank = np.empty(int(stretches[-1]) + 1, np.int64)
        rank[stretches] = rng.permutation(len(stretches))
        dealt = np.argsort(rank[self._stretch], kind="stable")
        # Eight stretches at a time are one bag, and the items of a bag are shuffled.
        bag = rank[self._stretch[dealt]] // STRETCHES_AT_A_TIME
        dealt = dealt[np.lexsort((rng.random(len(dealt)), bag))]
        order = np.empty(self._num_items, np.int64)
        start = 0
        for stream in range(NUM_STREAMS):
            places = np.arange(stream, self._num_items, NUM_STREAMS)
            order[places] = dealt[start : start + len(places)]
            start += len(places)
        return order


@dataclass(frozen=True)
class Window:
    """How many classes a virtual stream draws from at a time, and for how many of its episodes.

    Args:
        num_classes: more than an episode has, for variety; their samples are what caches hold.
        num_episodes: of one virtual stream, until it goes on to other classes.
    """

    num_classes: int
    num_episodes: int


class ClassWindows:
    """The classes that an episode may draw from: all, or those of its stream's window.

    A stream goes through all classes in windows, in an order of its own, and again in another one. Where the
    classes do not divide into windows, what is left over is not seen in that round.

    Args:
        classes: rows of those that can be drawn, int64 `[C]`: a window has none that is too small for a task.
        window: None for all classes.
    """

    def __init__(self, classes: NDArray[np.int64], window: Window | None, *, seed: int, split: str) -> None:
        self._all = classes
        self._window = window if window is not None and window.num_classes < len(classes) else None
        self._draw = (seed, split)

    def classes(self, number: int) -> NDArray[np.int64]:
        """Rows of classes, for episode `number`."""
        if self._window is None:
            return self._all
        stream, position = virtual_stream(number)
        size = self._window.num_classes
        round_, place = divmod(position // self._window.num_episodes, len(self._all) // size)
        order = generator("class window", *self._draw, stream, round_).permutation(self._all)
        return order[place * size : (place + 1) * size]
