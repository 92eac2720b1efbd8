"""What an episode is, and what gives episodes and ordinary batches: pure functions of (seed, split,
number)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.draws import generator
from metaloom.datasets.index import Index
from metaloom.errors import StreamError

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Episode:
    """One task's data: what to adapt on and what to be judged on.

    Each of `support`, `query` and what is rehearsed has `inputs` and `targets`; the sources state the shapes.

    Attributes:
        number: of the episode, from 0.
        task: what may come again: the document's name, or the sorted names of the classes.
        num_ways: classes of this task; None where it has all that its data set has, or targets are no
            classes.
        group: user, domain or corruption, where the data say; in a mixture the data set, and behind it what
            the data say.
        rehearsal: data of the pre-training kind for the inner steps, and behind them what retention is
            measured on.
        outer_rehearsal: such data for the meta-loss.
        broken: samples that would have been in this episode, and were replaced.
    """

    number: int
    task: str
    support: Arrays
    query: Arrays
    num_ways: int | None = None
    group: str | None = None
    rehearsal: Arrays | None = None
    outer_rehearsal: Arrays | None = None
    broken: tuple[BrokenSample, ...] = ()


class EpisodeSource(abc.ABC):
    """Episodes by number, without end. Can be pickled, and is used by several threads and processes."""

    @abc.abstractmethod
    def episode(self, number: int) -> Episode:
        """Episode `number`, counted from 0: a pure function of the source's arguments and the number.

        Raises:
            StreamError: its samples cannot be read, or none are left that could take a broken one's place.
        """

    @property
    def groups(self) -> frozenset[str] | None:
        """The groups that episodes are of; empty where they have none; None where each tells its own, and
        has to be read for it."""
        return frozenset()


@dataclass(frozen=True, eq=False)
class Batch:
    """An ordinary training batch.

    Attributes:
        arrays: `inputs` and `targets`.
        broken: samples that would have been in it, and were replaced.
    """

    arrays: Arrays
    broken: tuple[BrokenSample, ...] = ()


class Samples(abc.ABC):
    """Ordinary training batches by number, without end: for pre-training, rehearsal and baselines."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int | None:
        """How many values a target may take; None where targets are no classes of their own."""

    @abc.abstractmethod
    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of `size` samples: a pure function of the arguments.

        Raises:
            StreamError: its samples cannot be read.
        """

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """A batch by the draws of a given generator."""


class Rehearsed(EpisodeSource):
    """Episodes of another source with data of the pre-training kind beside them: a second stream.

    What an episode rehearses is a function of its number as the episode is, so the second stream has the
    same order at any number of ranks and workers, and no position of its own.

    Args:
        num_inner: samples for the inner steps, and for measuring retention.
        num_outer: samples for the meta-loss.
        seed: of the draws.
        split: which keeps the draws of training and validation apart.
    """

    def __init__(
        self,
        source: EpisodeSource,
        samples: Samples,
        *,
        num_inner: int,
        num_outer: int,
        seed: int,
        split: str,
    ) -> None:
        self._source, self._samples = source, samples
        self._num_inner, self._num_outer = num_inner, num_outer
        self._seed, self._split = seed, split

    @property
    def groups(self) -> frozenset[str] | None:
        return self._source.groups

    def episode(self, number: int) -> Episode:
        episode = self._source.episode(number)
        rng = generator("rehearsal", self._seed, self._split, number)
        try:
            batch = self._samples.draw(rng, self._num_inner + self._num_outer)
        except SampleError as error:
            raise error.after(episode.broken) from error
        inner = {name: array[: self._num_inner] for name, array in batch.arrays.items()}
        outer = {name: array[self._num_inner :] for name, array in batch.arrays.items()}
        return dataclasses.replace(
            episode,
            rehearsal=inner if self._num_inner else None,
            outer_rehearsal=outer if self._num_outer else None,
            broken=(*episode.broken, *batch.broken),
        )


def require_layout(index: Index, *layouts: str) -> None:
    """Checks that a data set is of one of some layouts.

    Raises:
        StreamError: it is not.
    """
    if index.layout not in layouts:
        raise StreamError(
            f"{index.dataset} at {index.url} has layout {index.layout!r}, and what is drawn here needs "
            f"{' or '.join(map(repr, layouts))}: data.kind classes draws from class-grouped sets such as "
            "glyphs, documents from sets of texts such as stdlib, episodes from sets of ready episodes."
        )


def require_counts(counts: Mapping[str, int]) -> None:
    """Checks that numbers of a recipe's section `data` are at least 1.

    Raises:
        StreamError: one is not.
    """
    for name, count in counts.items():
        if count < 1:
            raise StreamError(f"data.{name} is {count}; it must be at least 1.")


def require_member(index: Index, split: str, extensions: Sequence[str], *, key: str) -> None:
    """Checks that samples of a split have one of some members.

    Args:
        key: what of the recipe asks for them.

    Raises:
        StreamError: they have none of them.
    """
    table = index.split(split)
    if table.num_samples and not set(extensions) & set(table.members):
        raise StreamError(
            f"{key} reads {', '.join(extensions)}, and samples of split {split!r} of {index.dataset} at "
            f"{index.url} have {', '.join(table.members)}: set {key} to what is there, or pack the data "
            "otherwise."
        )
