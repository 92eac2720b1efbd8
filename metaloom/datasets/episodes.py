"""Episodes and ordinary batches, drawn from an index as pure functions of (seed, split, number).

Shape letters: S support examples, Q query examples, N examples, L tokens, C classes, V variants of a class.
"""

from __future__ import annotations

import abc
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaloom.datasets.affine import Affine
from metaloom.datasets.draws import generator
from metaloom.datasets.index import Index
from metaloom.datasets.shards import ShardReader, bytes_array
from metaloom.errors import StreamError

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Episode:
    """One task's data: what to adapt on and what to be judged on.

    Each of `support`, `query`, `rehearsal` has `inputs` and `targets`; the sources below state the shapes.
    """

    number: int
    task: str  # what may come again: the module's name, or the sorted names of the classes
    support: Arrays
    query: Arrays
    rehearsal: Arrays | None = None


class EpisodeSource(abc.ABC):
    """Episodes by number, without end."""

    @abc.abstractmethod
    def episode(self, number: int) -> Episode:
        """Episode `number`, counted from 0: a pure function of the source's arguments and the number.

        Raises:
            StreamError: its samples cannot be read.
        """


class Samples(abc.ABC):
    """Ordinary training batches by number, without end: for pre-training and for baselines."""

    @abc.abstractmethod
    def batch(self, number: int, size: int) -> Arrays:
        """Batch `number` of `size` samples: a pure function of the arguments, with `inputs` and `targets`.

        Raises:
            StreamError: its samples cannot be read.
        """


class ClassEpisodes(EpisodeSource):
    """N-way classification: classes, variants and labels are drawn anew for every episode.

    Of every episode the variants (for glyphs: the faces) are dealt into two pools, one for support and
    one for query, so no query image has a face that the support showed. `support["inputs"]` is float32
    [S, 1, H, W] with 0 background and 1 ink, S = n_way * n_shot, class by class; `targets` is int64 [S], the
    place of the class among the episode's classes, whose order is random. Query likewise,
    Q = n_way * n_query.

    Args:
        n_way: classes per episode.
        n_shot: support samples per class.
        n_query: query samples per class.
        affine: distortion of every drawn image, or None.

    Raises:
        StreamError: the split has too few classes or variants, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        n_way: int,
        n_shot: int,
        n_query: int,
        seed: int,
        affine: Affine | None = None,
    ) -> None:
        self._images = _ClassImages(index, split)
        num_classes, num_variants = self._images.grid.shape
        place = f"split {split!r} of {index.dataset} at {index.url}"
        for name, count in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query)):
            if count < 1:
                raise StreamError(f"data.{name} is {count}; it must be at least 1.")
        if n_way > num_classes:
            raise StreamError(
                f"data.n_way is {n_way}, but {place} has {num_classes} classes; lower data.n_way to at most "
                f"{num_classes}."
            )
        if n_shot + n_query > num_variants:
            raise StreamError(
                f"data.n_shot + data.n_query is {n_shot} + {n_query} = {n_shot + n_query}, but a class of "
                f"{place} has {num_variants} variants (faces), and support and query share none; lower "
                f"the two to a sum of at most {num_variants}."
            )
        self._n_way, self._n_shot, self._n_query = n_way, n_shot, n_query
        self._seed = seed
        self._affine = affine
        # Spare variants are dealt to the two pools in proportion.
        spare = num_variants - n_shot - n_query
        self._support_pool = n_shot + round(spare * n_shot / (n_shot + n_query))

    @property
    def num_classes(self) -> int:
        """Classes of the split, of which an episode draws n_way."""
        return len(self._images.classes)

    def episode(self, number: int) -> Episode:
        images, grid = self._images, self._images.grid
        rng = generator("class episode", self._seed, images.split, number)
        classes = rng.permutation(grid.shape[0])[: self._n_way]
        variants = rng.permutation(grid.shape[1])
        support = self._pick(rng, classes, variants[: self._support_pool], self._n_shot)
        query = self._pick(rng, classes, variants[self._support_pool :], self._n_query)
        inputs = images.read(np.concatenate([support, query]))
        if self._affine is not None:
            inputs = self._affine.distort(inputs, rng)
        S = len(support)
        return Episode(
            number=number,
            task=" | ".join(sorted(images.classes[c] for c in classes)),
            support={"inputs": inputs[:S, None], "targets": self._targets(self._n_shot)},
            query={"inputs": inputs[S:, None], "targets": self._targets(self._n_query)},
        )

    def _pick(
        self, rng: np.random.Generator, classes: NDArray[np.int64], pool: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        """Sample numbers [n_way * count]: for each class `count` different variants of the pool."""
        orders = rng.permuted(np.tile(pool, (len(classes), 1)), axis=1)[:, :count]
        numbers: NDArray[np.int64] = self._images.grid[classes[:, None], orders].reshape(-1)
        return numbers

    def _targets(self, count: int) -> NDArray[np.int64]:
        return np.repeat(np.arange(self._n_way, dtype=np.int64), count)


class ClassSamples(Samples):
    """Images of all classes of a split, drawn evenly with replacement.

    `inputs` is float32 [N, 1, H, W] as in `ClassEpisodes`; `targets` is int64 [N], the class in the split.

    Raises:
        StreamError: there is no such split, or the index is of another layout.
    """

    def __init__(self, index: Index, split: str, *, seed: int, affine: Affine | None = None) -> None:
        self._images = _ClassImages(index, split)
        self._seed = seed
        self._affine = affine

    @property
    def num_classes(self) -> int:
        """How many values a target may take."""
        return len(self._images.classes)

    def batch(self, number: int, size: int) -> Arrays:
        images, grid = self._images, self._images.grid
        rng = generator("class samples", self._seed, images.split, number)
        classes = rng.integers(grid.shape[0], size=size)
        variants = rng.integers(grid.shape[1], size=size)
        inputs = images.read(grid[classes, variants])
        if self._affine is not None:
            inputs = self._affine.distort(inputs, rng)
        return {"inputs": inputs[:, None], "targets": classes.astype(np.int64)}


class DocumentEpisodes(EpisodeSource):
    """Byte-level language modelling of one document, such as a module of the standard library.

    Of the document, one window of (S + Q) * (L + 1) bytes is drawn and cut into stretches of L + 1 bytes; the
    first S are support, those that follow are query: no byte is in both, targets included. `inputs` is
    int64 [S, L] with values 0 to 255, `targets` int64 [S, L], the next byte of each; query and rehearsal
    likewise. Documents too short for that are no tasks of this source. Within an epoch of `num_tasks`
    episodes each document comes once, in an order of the epoch's own.

    Args:
        num_support: S, stretches to adapt on.
        num_query: Q, stretches to be judged on.
        sequence_length: L, tokens (bytes) per stretch.
        num_rehearsal: stretches of split `rehearsal`, drawn evenly over its text; 0 gives no rehearsal.

    Raises:
        StreamError: no document is long enough, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        num_support: int,
        num_query: int,
        sequence_length: int,
        seed: int,
        num_rehearsal: int = 0,
    ) -> None:
        for name, count in (
            ("num_support", num_support),
            ("num_query", num_query),
            ("sequence_length", sequence_length),
        ):
            if count < 1:
                raise StreamError(f"data.{name} is {count}; it must be at least 1.")
        if num_rehearsal < 0:
            raise StreamError(f"num_rehearsal is {num_rehearsal}; it must be at least 0.")
        self._texts = _Documents(index, [split])
        self._split = split
        self._num_support, self._length = num_support, sequence_length
        self._seed = seed
        self._needed = (num_support + num_query) * (sequence_length + 1)
        lengths = self._texts.lengths
        self._tasks = np.flatnonzero(lengths >= self._needed)
        if not len(self._tasks):
            longest = int(lengths.max(initial=0))
            raise StreamError(
                f"(data.num_support + data.num_query) * (data.sequence_length + 1) is ({num_support} + "
                f"{num_query}) * ({sequence_length} + 1) = {self._needed} bytes, but the longest document of "
                f"split {split!r} of {index.dataset} at {index.url} has {longest}; lower one of the three."
            )
        self._num_rehearsal = num_rehearsal
        self._rehearsal = (
            DocumentSamples(index, ["rehearsal"], sequence_length=sequence_length, seed=seed)
            if num_rehearsal
            else None
        )
        # The order of one epoch, as (epoch, order), so that it is not computed for every episode.
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def num_tasks(self) -> int:
        """Documents that are long enough: the episodes of an epoch."""
        return len(self._tasks)

    def episode(self, number: int) -> Episode:
        epoch, place = divmod(number, self.num_tasks)
        document = int(self._tasks[self._epoch_order(epoch)[place]])
        rng = generator("document episode", self._seed, self._split, number)
        text = self._texts.text(document)
        start = int(rng.integers(len(text) - self._needed + 1))
        stretches = text[start : start + self._needed].astype(np.int64).reshape(-1, self._length + 1)
        rehearsal = None
        if self._rehearsal is not None:
            rehearsal = self._rehearsal.draw(rng, self._num_rehearsal)
        return Episode(
            number=number,
            task=self._texts.name(document),
            support=_next_byte(stretches[: self._num_support]),
            query=_next_byte(stretches[self._num_support :]),
            rehearsal=rehearsal,
        )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        known = self._order
        if known is None or known[0] != epoch:
            order = generator("document epoch", self._seed, self._split, epoch).permutation(self.num_tasks)
            self._order = known = (epoch, order)
        return known[1]


class DocumentSamples(Samples):
    """Random stretches of the documents of some splits, every possible stretch equally likely.

    `inputs` is int64 [N, L] with values 0 to 255; `targets` is int64 [N, L], the next byte of each.

    Raises:
        StreamError: no document has L + 1 bytes, or the index is of another layout.
    """

    def __init__(self, index: Index, splits: Sequence[str], *, sequence_length: int, seed: int) -> None:
        self._texts = _Documents(index, splits)
        self._splits = "+".join(splits)
        self._length = sequence_length
        self._seed = seed
        if sequence_length < 1:
            raise StreamError(f"data.sequence_length is {sequence_length}; it must be at least 1.")
        self._ends = np.cumsum(np.maximum(self._texts.lengths - sequence_length, 0))
        if not len(self._ends) or self._ends[-1] == 0:
            raise StreamError(
                f"data.sequence_length is {sequence_length}, but no document of {', '.join(splits)} of "
                f"{index.dataset} at {index.url} has {sequence_length + 1} bytes; lower it."
            )

    def batch(self, number: int, size: int) -> Arrays:
        return self.draw(generator("document samples", self._seed, self._splits, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Arrays:
        """A batch by the draws of a given generator."""
        places = rng.integers(self._ends[-1], size=size)
        stretches = np.empty((size, self._length + 1), np.int64)
        for row, place in enumerate(places):
            document = int(np.searchsorted(self._ends, place, side="right"))
            text = self._texts.text(document)
            start = int(place - self._ends[document]) + len(text) - self._length
            stretches[row] = text[start : start + self._length + 1]
        return _next_byte(stretches)


class _ClassImages:
    """The images of a split of layout "classes"; `grid` [C, V] is the sample of each class and variant."""

    def __init__(self, index: Index, split: str) -> None:
        _require_layout(index, "classes")
        table = index.split(split)
        number, variant = table.attributes["class"], table.attributes["variant"]
        self.split = split
        self.classes = tuple(entry.name for entry in table.classes)
        num_variants = int(variant.max(initial=-1)) + 1
        self.grid = np.full((len(self.classes), num_variants), -1, np.int64)
        self.grid[number, variant] = np.arange(table.num_samples)
        if (self.grid < 0).any() or table.num_samples != self.grid.size:
            raise StreamError(
                f"split {split!r} of {index.dataset} at {index.url} has {table.num_samples} samples for "
                f"{len(self.classes)} classes of {num_variants} variants; every class must have each variant "
                f"exactly once."
            )
        self._reader = ShardReader(index)

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [N, H, W], 0 background to 1 ink."""
        read = self._reader.array
        images = np.stack([read(self.split, int(n), "png", _decode_png) for n in numbers])
        return images.astype(np.float32) / np.float32(255)


class _Documents:
    """The texts of some splits of layout "documents", in the order of the index."""

    def __init__(self, index: Index, splits: Sequence[str]) -> None:
        _require_layout(index, "documents")
        tables = [index.split(split) for split in splits]
        self._places = [(table.name, n) for table in tables for n in range(table.num_samples)]
        self._names = [key for table in tables for key in table.keys]
        lengths = [table.members["txt"].length for table in tables]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        self._reader = ShardReader(index)

    def name(self, document: int) -> str:
        return self._names[document]

    def text(self, document: int) -> NDArray[np.uint8]:
        """uint8 [its number of bytes]."""
        split, number = self._places[document]
        return self._reader.array(split, number, "txt", bytes_array)


def _next_byte(stretches: NDArray[np.int64]) -> Arrays:
    """Inputs and targets [N, L] of stretches [N, L + 1]."""
    return {
        "inputs": np.ascontiguousarray(stretches[:, :-1]),
        "targets": np.ascontiguousarray(stretches[:, 1:]),
    }


def _decode_png(payload: bytes) -> NDArray[np.uint8]:
    """uint8 [H, W]."""
    with Image.open(io.BytesIO(payload), formats=["PNG"]) as image:
        return np.array(image.convert("L"))


def _require_layout(index: Index, layout: str) -> None:
    if index.layout != layout:
        raise StreamError(
            f"{index.dataset} at {index.url} has layout {index.layout!r}; what is drawn here needs "
            f"{layout!r}: class episodes need a set such as glyphs, document episodes one such as stdlib."
        )
