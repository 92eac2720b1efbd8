"""What a family of computed tasks is.

Shape letters: N examples, P numbers of a target.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.episodes import Arrays

Floats = NDArray[np.float64]

# Part of the data's digest: goes up whenever the same recipe would give other numbers.
GENERATOR_VERSION = 1
# A family's own draws, and its finite sets of tasks, are the same in every run, as those of files are.
DATA_SEED = 0


class Task(abc.ABC):
    """One task: a distribution of inputs, and the function that is to be learned."""

    @abc.abstractmethod
    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        """Random inputs, `[N, ...]`."""

    @abc.abstractmethod
    def targets(self, inputs: NDArray[Any]) -> Floats:
        """The function's values at inputs `[N, ...]`, without noise, `[N, P]`."""


class TaskFamily(abc.ABC):
    """Tasks of one kind. Can be pickled.

    Attributes:
        name: of the kind, as recipes have it.
        noise_std: standard deviation of the Gaussian noise of targets.
    """

    name: str
    noise_std: float = 0.0

    @property
    @abc.abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""

    @property
    @abc.abstractmethod
    def num_targets(self) -> int:
        """P."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of tasks: task t is of group t modulo their number; none where tasks have
        no group."""
        return ()

    @abc.abstractmethod
    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> Task:
        """A random task of a split.

        Args:
            group: which of `groups` it is of, where there are any.
        """

    def examples(
        self,
        rng: np.random.Generator,
        count: int,
        *,
        split: str,
        rows: slice = slice(None),
        group: int = 0,
    ) -> Arrays:
        """A random task's examples: `inputs`, float32 `[N, *input_shape]`, and `targets`, float32 `[N, P]`.

        Targets are those of the inputs as they are given, after rounding to float32.

        Args:
            count: how many are drawn.
            rows: which of them are given; the targets of others are not computed.
            group: as of `task`.
        """
        task = self.task(rng, split=split, group=group)
        inputs = task.inputs(rng, count)[rows].astype(np.float32)
        targets = task.targets(inputs.astype(np.float64))
        if self.noise_std:
            targets = targets + self.noise_std * rng.standard_normal((count, self.num_targets))[rows]
        return {"inputs": inputs, "targets": targets.astype(np.float32)}
