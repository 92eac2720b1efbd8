"""A task is a group of samples: a user, a domain, a corruption. Targets mean the same in all tasks.

Shape letters: S support examples, Q query examples, N examples, P numbers of a target.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.class_episodes import InputsOnly
from metaloom.datasets.decoders import ClassTargets, Inputs, Targets
from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import (
    Arrays,
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
from metaloom.datasets.order import EpochOrder
from metaloom.datasets.picking import MAX_BROKEN, Want, others, pick
from metaloom.datasets.reader import Decoded, SampleReader
from metaloom.errors import StreamError


class GroupEpisodes(EpisodeSource):
    """An episode is a group: S and Q of its samples, drawn anew each time, none in both; or S of them, which
    are support and query alike.

    `inputs` is `[S, ...]` as `inputs` gives it, `targets` int64 `[S]` or float32 `[S, P]`. Where the index
    has classes, the target of a sample is the place of its class among the sorted names of all splits: a
    class is the same number in each of them, whatever its `cls` holds. Within an epoch of
    `num_tasks` episodes each group comes once; or, by size, each comes as often as it has samples, drawn for
    each episode by itself. Groups with fewer than S + Q samples are no tasks. A broken
    sample gives its place to another of its group, and a group that has too few whole ones to another.

    Args:
        num_query: Q; None where the support examples are the queries.
        by_size: whether a group comes as often as it has samples.

    Raises:
        StreamError: no group is large enough, the samples have no groups, or the index has another number of
            classes than `targets`.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        inputs: Inputs,
        targets: Targets,
        num_support: int,
        num_query: int | None,
        seed: int,
        by_size: bool = False,
    ) -> None:
        counts = {"num_support": num_support}
        require_counts(counts if num_query is None else counts | {"num_query": num_query})
        self._groups = _groups(index, split)
        self._stated = _Stated(index, split, inputs, targets)
        self._reader = self._stated.reader
        self._num_support, self._num_query = num_support, num_query
        self._num_ways = targets.num_classes if isinstance(targets, ClassTargets) else None
        self._split, self._seed = split, seed
        needed = self._num_needed = num_support + (num_query or 0)
        asked, remedy = f"data.num_support is {num_support}", "lower it"
        if num_query is not None:
            asked = f"data.num_support + data.num_query is {num_support} + {num_query} = {needed}"
            remedy = "lower one of the two"
        sizes = self._groups.sizes
        self._tasks = np.flatnonzero(sizes >= needed)
        if not len(self._tasks):
            raise StreamError(
                f"{asked}, but the largest group of split {split!r} of {index.dataset} at {index.url} has "
                f"{int(sizes.max(initial=0))} samples; {remedy}."
            )
        self._order = EpochOrder(
            self._groups.num_bytes[self._tasks], purpose="group epoch", seed=seed, split=split
        )

        self._ends = np.cumsum(sizes[self._tasks]) if by_size else None

    @property
    def num_tasks(self) -> int:
        """Groups that are large enough: the episodes of an epoch."""
        return len(self._tasks)

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(self._groups.names[int(group)] for group in self._tasks)

    def episode(self, number: int) -> Episode:
        group, arrays, broken = self._whole(number)
        name = self._groups.names[group]
        support = {name: array[: self._num_support] for name, array in arrays.items()}
        query = {name: array[self._num_support :] for name, array in arrays.items()}
        return Episode(
            number=number,
            task=name,
            support=support,
            query=support if self._num_query is None else query,
            num_ways=self._num_ways,
            group=name,
            broken=broken,
        )

    def _first(self, number: int) -> int:
        """Which of the tasks an episode is of, where its samples can be read."""
        if self._ends is None:
            return self._order.item(number)
        rng = generator("group by size", self._seed, self._split, number)
        return int(np.searchsorted(self._ends, rng.integers(self._ends[-1]), side="right"))

    def _whole(self, number: int) -> tuple[int, Arrays, tuple[BrokenSample, ...]]:
        """The group of an episode, its support and query in one, and the broken samples that it passed
        over."""
        rng = generator("group episode", self._seed, self._split, number)
        needed = self._num_needed
        tried, attempt = [self._first(number)], 0
        broken: list[BrokenSample] = []
        while True:
            group = int(self._tasks[tried[attempt]])
            order = self._groups.shuffled(rng, group, needed)
            picked = pick(self._reader, [Want(order[:needed], deque(order[needed:]))], before=broken)
            broken += picked.broken
            (samples,), (numbers,) = picked.samples, picked.numbers
            if samples is not None and numbers is not None:
                return group, self._stated.batch(samples, numbers), tuple(broken)
            attempt += 1
            if attempt == 1:
                replacement = generator("group replacement", self._seed, self._split, number)
                # Each such group has a broken sample at least: pick stops before they run out.
                tried += others(replacement, self.num_tasks, tried[0], limit=MAX_BROKEN + 1)
            if attempt == len(tried):
                raise SampleError(
                    broken[-1],
                    "No group has enough samples that can be read: mend the data, "
                    "or what data.inputs and data.targets say of them.",
                    broken,
                )


class GroupSamples(Samples):
    """Samples of all groups, each equally likely, with replacement: `inputs` `[N, ...]`, `targets` as of
    episodes.

    Raises:
        StreamError: the samples have no groups, or the index has another number of classes than `targets`.
    """

    def __init__(self, index: Index, split: str, *, inputs: Inputs, targets: Targets, seed: int) -> None:
        _groups(index, split)
        self._stated = _Stated(index, split, inputs, targets)
        self._reader = self._stated.reader
        self._split, self._seed = split, seed
        self._num_classes = targets.num_classes if isinstance(targets, ClassTargets) else None

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(generator("group samples", self._seed, self._split, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        num_samples = self._reader.table.num_samples
        numbers = rng.integers(num_samples, size=size).tolist()
        spare = deque(rng.integers(num_samples, size=max(size, 256)).tolist())
        picked = pick(self._reader, [Want(numbers, spare)])
        (samples,), (found,) = picked.samples, picked.numbers
        if samples is None or found is None:
            raise SampleError(
                picked.broken[-1],
                f"So were {len(picked.broken) - 1} others of one batch: mend the data.",
                picked.broken,
            )
        return Batch(self._stated.batch(samples, found), picked.broken)


@dataclass(frozen=True)
class InputsAndTarget:
    """What is read of a sample that states its own target."""

    inputs: Inputs
    targets: Targets

    def __call__(self, members: Members) -> dict[str, NDArray[Any]]:
        return {"inputs": self.inputs.decode(members), "target": self.targets.decode(members)}


class _Stated:
    """Samples of a split whose targets are stated: by the index where these are classes and it has them, else
    by the samples."""

    def __init__(self, index: Index, split: str, inputs: Inputs, targets: Targets) -> None:
        require_member(index, split, inputs.extensions, key="data.inputs.kind")
        self._inputs = inputs
        self._classes: NDArray[np.int64] | None = None
        if isinstance(targets, ClassTargets) and "class" in index.split(split).attributes:
            self._classes = class_targets(index, split, targets)
            self.reader = SampleReader(index, split, InputsOnly(inputs))
        else:
            require_member(index, split, (targets.extension,), key="data.targets.kind")
            self.reader = SampleReader(index, split, InputsAndTarget(inputs, targets))

    def batch(self, samples: list[Decoded], numbers: list[int]) -> Arrays:
        """`inputs` and `targets` of samples that were read, and their numbers in the split."""
        return {
            "inputs": self._inputs.batch([sample["inputs"] for sample in samples]),
            "targets": np.stack([sample["target"] for sample in samples])
            if self._classes is None
            else self._classes[numbers],
        }


def class_targets(index: Index, split: str, targets: ClassTargets) -> NDArray[np.int64]:
    """The class of each sample of a split, int64 `[number of samples]`: its place in the sorted names of all
    splits, since a split numbers its own.

    Raises:
        StreamError: there are not as many classes as `targets` has.
    """
    names = sorted({name for table in index.splits.values() for name in table.classes})
    if targets.num_classes != len(names):
        raise StreamError(
            f"data.targets.num_classes is {targets.num_classes}, and the splits of {index.dataset} at "
            f"{index.url} have {len(names)} classes in all; set it to that."
        )
    place = {name: number for number, name in enumerate(names)}
    table = index.split(split)
    own = np.array([place[name] for name in table.classes], np.int64)
    of_samples: NDArray[np.int64] = own[table.attributes["class"]]
    return of_samples


def _groups(index: Index, split: str) -> Grouped:
    require_layout(index, "groups", "classes")
    table = index.split(split)
    if "group" not in table.attributes:
        raise StreamError(
            f"samples of split {split!r} of {index.dataset} at {index.url} have no groups; pack the data "
            "with a column that says which group (user, domain) a sample belongs to: metaloom data pack "
            "--group COLUMN."
        )
    return Grouped(table, table.attributes["group"], table.groups)
