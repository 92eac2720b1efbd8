"""Several sources of episodes as one, with weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import SampleError
from metaloom.datasets.class_episodes import ClassSamples
from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import Batch, Episode, EpisodeSource, Samples
from metaloom.datasets.pixels import of_one_form
from metaloom.datasets.streams import NUM_STREAMS, virtual_stream
from metaloom.errors import StreamError

BLOCK = 256  # episodes of a virtual stream in which every source has its share


class Mixture(EpisodeSource):
    """Episodes of several sources, in random order, each with its share.

    Of the first n blocks of 256 episodes of a virtual stream source k has w_k * 256 * n, to less than one;
    within a block the order is random. A source gives its own episodes one after the other in each virtual
    stream: what is true of its order (each document once per epoch) is true of it here.

    Args:
        weights: of the sources; need not add up to 1.
        names: of the sources: they are the groups of episodes that have none, and stand before those of
            others, since several data sets may have groups of the same names. None where groups are as the
            sources give them.

    Raises:
        StreamError: a source has less than one episode in 256.
    """

    def __init__(
        self,
        sources: Sequence[EpisodeSource],
        weights: Sequence[float],
        *,
        seed: int,
        split: str,
        names: Sequence[str] | None = None,
    ) -> None:
        for weight in weights:
            if not weight * BLOCK >= sum(weights):
                raise StreamError(
                    f"data.parts: a weight is {weight} of {sum(weights)} in all; a part needs at least one "
                    f"episode in {BLOCK}: raise it, or leave the part out."
                )
        self._sources = tuple(sources)
        self._names = None if names is None else tuple(names)
        self._shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._seed, self._split = seed, split

    def episode(self, number: int) -> Episode:
        source, own = self.place(number)
        episode = dataclasses.replace(self._sources[source].episode(own), number=number)
        if self._names is None:
            return episode
        name, group = self._names[source], episode.group
        return dataclasses.replace(episode, group=name if group is None else f"{name}/{group}")

    @property
    def groups(self) -> frozenset[str] | None:
        found: set[str] = set()
        for place, source in enumerate(self._sources):
            own = source.groups
            if own is None:
                return None
            name = None if self._names is None else self._names[place]
            found |= own if name is None else {f"{name}/{group}" for group in own} or {name}
        return frozenset(found)

    def place(self, number: int) -> tuple[int, int]:
        """(source, its own number) of episode `number`."""
        stream, position = virtual_stream(number)
        block, place = divmod(position, BLOCK)
        before, after = self._quotas(block), self._quotas(block + 1)
        of_block = np.repeat(np.arange(len(self._sources)), after - before)
        order = generator("mixture", self._seed, self._split, stream, block).permutation(of_block)
        source = int(order[place])
        own_position = int(before[source]) + int((order[:place] == source).sum())
        return source, own_position * NUM_STREAMS + stream

    def _quotas(self, num_blocks: int) -> NDArray[np.int64]:
        """Episodes of each source in the first blocks of a stream: shares rounded so that they add up,
        `[sources]`.

        Cumulative shares are rounded, so no quota ever falls from one block to the next.
        """
        bounds = np.floor(np.cumsum(self._shares) * (BLOCK * num_blocks) + 0.5).astype(np.int64)
        bounds[-1] = BLOCK * num_blocks
        return np.diff(bounds, prepend=0)


class MixedSamples(Samples):
    """Samples of several sources, each sample of a batch from one that is drawn by its weight.

    Classes that the data state (of groups, of ready episodes) mean the same in all sources, and stay as they
    are. Classes of `ClassSamples`, whose labels tasks draw, are classes of their own: behind the stated ones
    come those of the first such source, then those of the next.
    """

    def __init__(
        self, sources: Sequence[Samples], weights: Sequence[float], *, seed: int, purpose: str
    ) -> None:
        self._sources = tuple(sources)
        self._shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._seed, self._purpose = seed, purpose
        own = [source.num_classes if isinstance(source, ClassSamples) else 0 for source in sources]
        stated = [source.num_classes or 0 for source in sources if not isinstance(source, ClassSamples)]
        ends = max(stated, default=0) + np.cumsum(own)
        # What is added to the targets of each source.
        self._firsts = [int(end) - count if count else 0 for end, count in zip(ends, own, strict=True)]
        self._num_classes = int(ends[-1]) or None

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(generator("mixed samples", self._seed, self._purpose, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        counts = rng.multinomial(size, self._shares)
        batches: list[Batch] = []
        for source, count, first in zip(self._sources, counts, self._firsts, strict=True):
            if count:
                try:
                    batch = source.draw(rng, int(count))
                except SampleError as error:
                    raise error.after([each for done in batches for each in done.broken]) from error
                targets = batch.arrays["targets"]
                batches.append(
                    Batch(batch.arrays | {"targets": targets + first if first else targets}, batch.broken)
                )
        arrays = {
            name: np.concatenate(of_one_form([batch.arrays[name] for batch in batches]))
            for name in ("inputs", "targets")
        }
        return Batch(arrays, tuple(broken for batch in batches for broken in batch.broken))
