"""Episodes and ordinary batches of computed tasks.

Shape letters: S support examples, Q query examples, N examples, P numbers of a target.
"""

from __future__ import annotations

import numpy as np

from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import Arrays, Batch, Episode, EpisodeSource, Samples, require_counts
from metaloom.datasets.order import EpochOrder
from metaloom.datasets.synthetic.base import DATA_SEED, TaskFamily


class SyntheticEpisodes(EpisodeSource):
    """An episode is a task of a family: `inputs` is float32 `[S, *input_shape]`, `targets` float32 `[S, P]`.

    Without end (`num_tasks` None), each episode is a new task with new examples. Else there are `num_tasks`
    tasks of S + Q examples, the same in every run as those of a file are: within an epoch of `num_tasks`
    episodes each task comes once, and which of its examples are support is drawn anew each time. Where the
    family has G groups, task t is of group t modulo G.

    Raises:
        StreamError: there are no support or no query examples.
    """

    def __init__(
        self,
        family: TaskFamily,
        split: str,
        *,
        num_support: int,
        num_query: int,
        num_tasks: int | None,
        seed: int,
    ) -> None:
        require_counts({"num_support": num_support, "num_query": num_query})
        self._family, self._split, self._seed = family, split, seed
        self._num_tasks = num_tasks
        self._num_support, self._num_examples = num_support, num_support + num_query
        self._order = (
            None
            if num_tasks is None
            else EpochOrder(np.ones(num_tasks, np.int64), purpose="synthetic epoch", seed=seed, split=split)
        )

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(self._family.groups[: self._num_tasks])

    def episode(self, number: int) -> Episode:
        rng = generator("synthetic episode", self._seed, self._family.name, self._split, number)
        if self._order is None:
            task = number
            group = _group_of(self._family, task)
            arrays = self._family.examples(rng, self._num_examples, split=self._split, group=group)
        else:
            task = self._order.item(number)
            kept = _kept_examples(self._family, self._split, task, self._num_examples)
            order = rng.permutation(self._num_examples)
            arrays = {name: array[order] for name, array in kept.items()}
        groups = self._family.groups
        return Episode(
            number=number,
            task=f"{self._family.name} {task}",
            support={name: array[: self._num_support] for name, array in arrays.items()},
            query={name: array[self._num_support :] for name, array in arrays.items()},
            group=groups[_group_of(self._family, task)] if groups else None,
        )


class SyntheticSamples(Samples):
    """Examples of tasks, each of one that is drawn for it: `inputs` float32 `[N, *input_shape]`, `targets`
    float32 `[N, P]`.

    Args:
        num_tasks: as of the episodes of that split.
        num_examples: S + Q, of each of them; of no consequence where `num_tasks` is None.
    """

    def __init__(
        self, family: TaskFamily, split: str, *, num_tasks: int | None, num_examples: int, seed: int
    ) -> None:
        self._family, self._split, self._seed = family, split, seed
        self._num_tasks, self._num_examples = num_tasks, num_examples

    @property
    def num_classes(self) -> int | None:
        return None

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(
            generator("synthetic samples", self._seed, self._family.name, self._split, number), size
        )

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        examples = [self._example(rng) for _ in range(size)]
        names = ("inputs", "targets")
        return Batch({name: np.concatenate([each[name] for each in examples]) for name in names})

    def _example(self, rng: np.random.Generator) -> Arrays:
        """One example, `[1, ...]`."""
        if self._num_tasks is None:
            group = int(rng.integers(len(self._family.groups))) if self._family.groups else 0
            return self._family.examples(rng, 1, split=self._split, group=group)
        task, row = int(rng.integers(self._num_tasks)), int(rng.integers(self._num_examples))
        one = slice(row, row + 1)
        return _kept_examples(self._family, self._split, task, self._num_examples, rows=one)


def _kept_examples(
    family: TaskFamily, split: str, task: int, num_examples: int, *, rows: slice = slice(None)
) -> Arrays:
    """The examples of one of finitely many tasks, or some of them: the same in every run."""
    rng = generator("synthetic task", DATA_SEED, family.name, split, task)
    return family.examples(rng, num_examples, split=split, rows=rows, group=_group_of(family, task))


def _group_of(family: TaskFamily, task: int) -> int:
    return task % len(family.groups) if family.groups else 0
