"""Linear layers with the symmetry of shifts, in full or in part.

Shape letters: N examples, L numbers of an input, F of a filter, P = L - F + 1 of a target, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.draws import generator
from metaloom.datasets.synthetic.base import DATA_SEED, Floats, Task, TaskFamily


@dataclass(frozen=True, eq=False)
class LocallyConnected(Task):
    """y_p = sum_f filters[p, f] x_(p + f), for x of `[N, L]` drawn from N(0, 1): no padding, no bias.

    Attributes:
        filters: of each place, `[P, F]`.
    """

    filters: Floats

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        num_targets, filter_size = self.filters.shape
        return rng.standard_normal((count, num_targets + filter_size - 1))

    def targets(self, inputs: NDArray[Any]) -> Floats:
        num_targets, filter_size = self.filters.shape
        values = np.zeros((len(inputs), num_targets))
        # Place by place and not as a matrix product, whose rounding differs with the number of threads.
        for offset in range(filter_size):
            values += inputs[:, offset : offset + num_targets] * self.filters[:, offset]
        return values


class Equivariant1d(TaskFamily):
    """The problems "rank 1", "rank 2" and "rank 5" of Zhou et al. 2021, "Meta-Learning Symmetries by
    Reparameterization", section 5.1.

    A task is a locally connected layer without bias. Its R basis filters `[R, F]` are N(0, 1), new in every
    task; the filter of place p is their mean with weights `[P, R]`, which are the same in all tasks: the
    symmetry that is to be learned. As in the authors' code, they are the softmax over R of N(0, 1). With
    R = 1 all places share one filter: a convolution, equivariant to shifts.

    Sizes are those of the authors' code: L = 70, F = 3, P = 68; 10,000 tasks of 20 examples, 1 of them
    support, 8000 tasks to train on. Here the validation tasks are others than the test tasks, by default new
    ones without end; the authors have none.
    """

    name = "equivariant_1d"

    def __init__(self, *, rank: int = 1, length: int = 70, filter_size: int = 3) -> None:
        self._length, self._filter_size = length, filter_size
        rng = generator("synthetic connectivity", DATA_SEED, rank, length, filter_size)
        weights = np.exp(rng.standard_normal((self.num_targets, rank)))
        self._weights: Floats = weights / weights.sum(axis=1, keepdims=True)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self._length,)

    @property
    def num_targets(self) -> int:
        return self._length - self._filter_size + 1

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> LocallyConnected:
        basis = rng.standard_normal((self._weights.shape[1], self._filter_size))
        return LocallyConnected((self._weights[:, :, None] * basis).sum(axis=1))
