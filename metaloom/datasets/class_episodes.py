"""Few-shot classification: episodes and ordinary batches from class-grouped data.

Shape letters: S support examples, Q query examples, N examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.affine import Affine
from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.decoders import ImageInputs, Inputs
from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import (
    Batch,
    Episode,
    EpisodeSource,
    Samples,
    require_counts,
    require_layout,
    require_member,
)
from metaloom.datasets.grouped import Grouped
from metaloom.datasets.index import Index
from metaloom.datasets.members import Members
from metaloom.datasets.order import ClassWindows, Window
from metaloom.datasets.picking import Want, pick
from metaloom.datasets.reader import Decoded, SampleReader
from metaloom.errors import StreamError

Labels = Literal["shuffled", "kept"]


@dataclass(frozen=True)
class Ways:
    """Every task alike: `n_way` classes, `n_shot` support and `n_query` query samples of each."""

    n_way: int
    n_shot: int
    n_query: int

    def __post_init__(self) -> None:
        require_counts(dataclasses.asdict(self))

    @property
    def max_way(self) -> int:
        """The most classes that a task may have."""
        return self.n_way

    @property
    def min_samples(self) -> int:
        """What a class needs to be drawn."""
        return self.n_shot + self.n_query

    def draw(self, rng: np.random.Generator, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """(support samples of each class, query samples per class) for classes of these sizes."""
        return np.full(len(sizes), self.n_shot), self.n_query

    def num_classes(self, rng: np.random.Generator, available: int) -> int:
        """How many classes the task has."""
        return self.n_way


@dataclass(frozen=True)
class VariableWays:
    """Tasks that differ, and whose classes do: the sampling of Meta-Dataset (Triantafillou et al. 2020).

    Section 3.2 and appendix "Episode composition" there. The number of ways is even from `min_way` to
    `max_way`. Query samples per class: q = min(max_query, min_c floor(n_c / 2)). Support samples in all:
    min(max_support, sum_c ceil(b * min(max_shot, n_c - q))), b even in (0, 1]. Of these, class c gets
    min(floor(R_c * (|S| - N)) + 1, n_c - q), where R_c is proportional to exp(a_c) n_c, a_c even in
    [log 0.5, log 2).
    """

    min_way: int = 5
    max_way: int = 50
    max_support: int = 500
    max_shot: int = 100
    max_query: int = 10

    def __post_init__(self) -> None:
        require_counts({f"variable.{name}": value for name, value in dataclasses.asdict(self).items()})
        if self.min_way > self.max_way or self.max_support < self.max_way:
            raise StreamError(
                f"data.variable: min_way is {self.min_way}, max_way {self.max_way} and max_support "
                f"{self.max_support}; they must not fall in this order, since every class has a support "
                "sample."
            )

    @property
    def min_samples(self) -> int:
        """What a class needs to be drawn."""
        return 2

    def num_classes(self, rng: np.random.Generator, available: int) -> int:
        """How many classes the task has."""
        return int(rng.integers(self.min_way, min(self.max_way, available) + 1))

    def draw(self, rng: np.random.Generator, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """(support samples of each class, query samples per class) for classes of these sizes."""
        num_query = int(min(self.max_query, (sizes // 2).min()))
        share = 1.0 - rng.random()  # in (0, 1]
        free = sizes - num_query
        wanted = sum(math.ceil(share * min(self.max_shot, int(n))) for n in free)
        num_support = min(self.max_support, wanted)
        weights = np.exp(rng.uniform(math.log(0.5), math.log(2.0), len(sizes))) * sizes
        shares = weights / weights.sum()
        shots = np.floor(shares * (num_support - len(sizes))).astype(np.int64) + 1
        return np.minimum(shots, free), num_query


class ClassEpisodes(EpisodeSource):
    """N-way classification: classes, samples and labels are drawn anew for every episode.

    `support["inputs"]` is `[S, ...]` as `inputs` gives it, class by class; `targets` is int64 `[S]`, the
    label of the class, 0 to N - 1. Query likewise. No sample is in both. Where the data have variants (for
    glyphs: the faces) and every class has each of them once, these are dealt into two pools, so that no
    query sample has a face that the support showed.

    A broken sample gives its place to another of its class, and a class that has too few whole ones to
    another.

    Args:
        inputs: what a sample is read as.
        ways: how many classes and samples.
        labels: `shuffled`: a class has another label each time, so a task cannot be solved without its
            support. `kept`: every class has one label for good, and an episode has a class for each: the
            tasks are not mutually exclusive (Yin et al. 2020), and can be memorised.
        window: classes that a virtual stream draws from at a time; None for all.
        affine: distortion of every image, or None.
        query_affine: distortion of query images, after `affine`: meta-augmentation by the query set.

    Raises:
        StreamError: the split has too few classes or samples, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        ways: Ways | VariableWays,
        seed: int,
        inputs: Inputs | None = None,
        labels: Labels = "shuffled",
        window: Window | None = None,
        affine: Affine | None = None,
        query_affine: Affine | None = None,
    ) -> None:
        self._classes = class_table(index, split)
        self._inputs = inputs or ImageInputs()
        require_member(index, split, self._inputs.extensions, key="data.inputs.kind")
        self._reader = SampleReader(index, split, InputsOnly(self._inputs))
        self._ways, self._labels, self._seed, self._split = ways, labels, seed, split
        self._affine, self._query_affine = affine, query_affine
        usable = np.flatnonzero(self._classes.sizes >= ways.min_samples)
        self._windows = ClassWindows(usable, window, seed=seed, split=split)
        self._grid = variant_grid(index, split) if isinstance(ways, Ways) else None
        self._kept_labels = None if labels == "shuffled" else self._fixed_labels()
        self._require_enough(index, window)

    @property
    def num_classes(self) -> int:
        """Classes of the split, of which an episode draws some."""
        return len(self._classes.names)

    def episode(self, number: int) -> Episode:
        rng = generator("class episode", self._seed, self._split, number)
        classes, next_classes = self._draw_classes(rng, self._windows.classes(number))
        pools = self._variant_pools(rng)
        wants = self._wants(rng, classes, pools)
        picked = pick(self._reader, [want for pair in wants for want in pair])
        broken = list(picked.broken)
        support: list[list[Decoded]] = []
        query: list[list[Decoded]] = []
        for row, pair in enumerate(wants):
            shown, asked = picked.samples[2 * row : 2 * row + 2]
            while shown is None or asked is None:
                # Too few of this class are whole: another one takes its place, with as many samples.
                num_shot, num_query = (len(want.numbers) for want in pair)
                classes[row] = self._next_class(next_classes[row], num_shot + num_query, broken)
                own = self._samples_of(rng, classes[row], num_shot, num_query, pools)
                again = pick(self._reader, own, before=broken)
                (shown, asked), broken = again.samples, [*broken, *again.broken]
            support.append(shown)
            query.append(asked)
        samples = [sample for each in (*support, *query) for sample in each]
        inputs = self._inputs.batch([sample["inputs"] for sample in samples])
        if self._affine is not None:
            inputs = self._affine.distort(inputs, rng)
        S = sum(len(each) for each in support)
        query_inputs = inputs[S:]
        if self._query_affine is not None:
            query_inputs = self._query_affine.distort(query_inputs, rng)
        return Episode(
            number=number,
            task=" | ".join(sorted(self._classes.names[c] for c in classes)),
            support={"inputs": inputs[:S], "targets": _labels(support)},
            query={"inputs": query_inputs, "targets": _labels(query)},
            num_ways=len(classes),
            broken=tuple(dict.fromkeys(broken)),
        )

    def _draw_classes(
        self, rng: np.random.Generator, usable: NDArray[np.int64]
    ) -> tuple[list[int], list[deque[int]]]:
        """The classes of an episode in the order of their labels, and for each those that may take its
        place."""
        shuffled = usable[rng.permutation(len(usable))]
        if self._kept_labels is not None:
            labels = self._kept_labels[shuffled]
            of_label = [deque(shuffled[labels == way].tolist()) for way in range(self._ways.max_way)]
            return [queue.popleft() for queue in of_label], of_label
        order = shuffled.tolist()
        num_ways = self._ways.num_classes(rng, len(order))
        rest = deque(order[num_ways:])
        return order[:num_ways], [rest] * num_ways

    def _variant_pools(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Variants for support and for query; the spare ones are dealt in proportion."""
        if self._grid is None:
            return None
        ways = self._ways
        assert isinstance(ways, Ways), "variants are dealt for tasks that are alike"
        spare = self._grid.shape[1] - ways.min_samples
        num_support = ways.n_shot + round(spare * ways.n_shot / ways.min_samples)
        variants = rng.permutation(self._grid.shape[1])
        return variants[:num_support], variants[num_support:]

    def _wants(
        self,
        rng: np.random.Generator,
        classes: list[int],
        pools: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    ) -> list[tuple[Want, Want]]:
        """Support and query samples of each class."""
        shots, num_query = self._ways.draw(rng, self._classes.sizes[classes])
        if pools is None:
            return [
                self._samples_of(rng, c, int(num_shot), num_query, None)
                for c, num_shot in zip(classes, shots, strict=True)
            ]
        orders = [rng.permuted(np.tile(pool, (len(classes), 1)), axis=1) for pool in pools]
        return [
            self._of_variants(c, int(num_shot), num_query, orders[0][row], orders[1][row])
            for row, (c, num_shot) in enumerate(zip(classes, shots, strict=True))
        ]

    def _samples_of(
        self,
        rng: np.random.Generator,
        number: int,
        num_shot: int,
        num_query: int,
        pools: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    ) -> tuple[Want, Want]:
        """Support and query samples of a class."""
        if pools is not None:
            return self._of_variants(number, num_shot, num_query, *(rng.permutation(pool) for pool in pools))
        order = self._classes.shuffled(rng, number, num_shot + num_query)
        spare = deque(order[num_shot + num_query :])
        return Want(order[:num_shot], spare), Want(order[num_shot : num_shot + num_query], spare)

    def _of_variants(
        self,
        number: int,
        num_shot: int,
        num_query: int,
        support_variants: NDArray[np.int64],
        query_variants: NDArray[np.int64],
    ) -> tuple[Want, Want]:
        assert self._grid is not None
        shown = self._grid[number, support_variants].tolist()
        asked = self._grid[number, query_variants].tolist()
        return (
            Want(shown[:num_shot], deque(shown[num_shot:])),
            Want(asked[:num_query], deque(asked[num_query:])),
        )

    def _fixed_labels(self) -> NDArray[np.int64]:
        return fixed_labels(self.num_classes, self._ways.max_way, seed=self._seed, split=self._split)

    def _next_class(self, queue: deque[int], num_samples: int, broken: Sequence[BrokenSample]) -> int:
        while queue:
            number = queue.popleft()
            if self._classes.sizes[number] >= num_samples:
                return number
        raise SampleError(
            broken[-1],
            "Too few samples of its class can be read, and no other class can take its place: mend the data, "
            "or what data.inputs says of them, or lower the number of samples per task.",
            broken,
        )

    def _require_enough(self, index: Index, window: Window | None) -> None:
        ways, classes = self._ways, self._classes
        place = f"split {self._split!r} of {index.dataset} at {index.url}"
        if isinstance(ways, VariableWays):
            if self._labels == "kept":
                raise StreamError(
                    "data.labels is kept, which gives every class one label for good, and data.variable "
                    "draws tasks of any number of classes; set data.labels to shuffled."
                )
            needed, what = ways.min_way, "data.variable.min_way"
        else:
            needed, what = ways.n_way, "data.n_way"
        if window is not None and window.num_classes < ways.max_way:
            raise StreamError(
                f"data.window.num_classes is {window.num_classes}, and a task may have {ways.max_way} "
                "classes; raise it to at least that, several times that for variety."
            )
        if window is not None and self._labels == "kept":
            raise StreamError(
                "data.window draws from a few classes at a time, and data.labels is kept: leave one out."
            )
        if needed > self.num_classes:
            raise StreamError(
                f"{what} is {needed}, but {place} has {self.num_classes} classes; lower {what} to at most "
                f"{self.num_classes}."
            )
        if self._grid is not None and ways.min_samples > self._grid.shape[1]:
            assert isinstance(ways, Ways)
            raise StreamError(
                f"data.n_shot + data.n_query is {ways.n_shot} + {ways.n_query} = {ways.min_samples}, but a "
                f"class of {place} has {self._grid.shape[1]} variants (faces), and support and query share "
                f"none; lower the two to a sum of at most {self._grid.shape[1]}."
            )
        usable = np.flatnonzero(classes.sizes >= ways.min_samples)
        largest = np.sort(classes.sizes)[-needed]
        if len(usable) < needed:
            raise StreamError(
                f"a task takes {ways.min_samples} samples of each of {needed} classes, and {len(usable)} of "
                f"the {self.num_classes} classes of {place} have so many; lower the samples per class to at "
                f"most {largest}, or the classes per task."
            )
        if self._kept_labels is not None:
            lacking = ways.max_way - len(np.unique(self._kept_labels[usable]))
            if lacking:
                raise StreamError(
                    f"data.labels is kept, and {lacking} of the {ways.max_way} labels have no class with "
                    f"{ways.min_samples} samples in {place}; lower the samples per class."
                )


class ClassSamples(Samples):
    """Samples of all classes of a split, drawn evenly over classes, with replacement.

    `inputs` is `[N, ...]` as `inputs` gives it; `targets` is int64 `[N]`, the class in the split.

    Raises:
        StreamError: there is no such split, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        seed: int,
        inputs: Inputs | None = None,
        affine: Affine | None = None,
    ) -> None:
        self._classes = class_table(index, split)
        self._inputs = inputs or ImageInputs()
        require_member(index, split, self._inputs.extensions, key="data.inputs.kind")
        self._reader = SampleReader(index, split, InputsOnly(self._inputs))
        self._grid = variant_grid(index, split)
        self._filled = np.flatnonzero(self._classes.sizes)
        self._split, self._seed, self._affine = split, seed, affine

    @property
    def num_classes(self) -> int:
        return len(self._classes.names)

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(generator("class samples", self._seed, self._split, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        classes = self._filled[rng.integers(len(self._filled), size=size)]
        if self._grid is not None:
            places = rng.integers(self._grid.shape[1], size=size)
            numbers = self._grid[classes, places]
        else:
            places = rng.integers(self._classes.sizes[classes])
            numbers = np.array(
                [self._classes.sample(int(c), int(p)) for c, p in zip(classes, places, strict=True)]
            )
        # A broken one gives its place to those of its class behind it.
        wants = [
            Want([int(n)], deque(self._classes.behind(int(c), int(n))))
            for c, n in zip(classes, numbers, strict=True)
        ]
        picked = pick(self._reader, wants)
        samples = []
        for each in picked.samples:
            if each is None:
                raise SampleError(
                    picked.broken[-1], "No other of its class is whole: mend the data.", picked.broken
                )
            samples += each
        inputs = self._inputs.batch([sample["inputs"] for sample in samples])
        if self._affine is not None:
            inputs = self._affine.distort(inputs, rng)
        return Batch({"inputs": inputs, "targets": classes.astype(np.int64)}, picked.broken)


@dataclass(frozen=True)
class InputsOnly:
    """What is read of a sample whose target is drawn: its inputs."""

    inputs: Inputs

    def __call__(self, members: Members) -> dict[str, NDArray[Any]]:
        return {"inputs": self.inputs.decode(members)}


def class_table(index: Index, split: str) -> Grouped:
    """The samples of each class of a split.

    Raises:
        StreamError: there is no such split, or the index is of another layout.
    """
    require_layout(index, "classes")
    table = index.split(split)
    return Grouped(table, table.attributes.get("class", np.zeros(0, np.int32)), table.classes)


def fixed_labels(num_classes: int, num_labels: int, *, seed: int, split: str) -> NDArray[np.int64]:
    """A label for each class for good, from 0 to below `num_labels`, dealt evenly."""
    order = generator("kept labels", seed, split).permutation(num_classes)
    labels = np.empty(num_classes, np.int64)
    labels[order] = np.arange(num_classes) % num_labels
    return labels


def variant_grid(index: Index, split: str) -> NDArray[np.int64] | None:
    """The sample of each class and variant, `[classes, variants]`; None where the data have no variants.

    Raises:
        StreamError: a class lacks a variant, or has one twice.
    """
    table = index.split(split)
    variant = table.attributes.get("variant")
    if variant is None:
        return None
    num_variants = int(variant.max(initial=-1)) + 1
    grid = np.full((len(table.classes), num_variants), -1, np.int64)
    grid[table.attributes["class"], variant] = np.arange(table.num_samples)
    if (grid < 0).any() or table.num_samples != grid.size:
        raise StreamError(
            f"split {split!r} of {index.dataset} at {index.url} has {table.num_samples} samples for "
            f"{len(table.classes)} classes of {num_variants} variants; every class must have each variant "
            "exactly once."
        )
    return grid


def _labels(samples: Sequence[Sequence[Decoded]]) -> NDArray[np.int64]:
    """int64: the place of each sample's class among the classes of the episode."""
    return np.repeat(np.arange(len(samples), dtype=np.int64), [len(each) for each in samples])
