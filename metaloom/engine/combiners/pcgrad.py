"""Gradient surgery: what conflicts with another task's gradient is projected away."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule


class PCGrad(TaskRule):
    """Projecting conflicting gradients (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning",
    algorithm 1), on the Gram matrix: see `surgery`.

    The order in which task i meets the others follows from the seed and the number of its episode, which
    stands for the outer step and the task in it.

    Args:
        seed: of the run.
    """

    name = "pcgrad"
    needs_gram = True

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        assert gram is not None, "this rule needs inner products"
        return surgery(gram, [self._order(place, tasks) for place in range(len(tasks))])

    def _order(self, place: int, tasks: Sequence[TaskRecord]) -> list[int]:
        """The places of all other tasks, in the order in which one task meets them."""
        others = [other for other in range(len(tasks)) if other != place]
        key = f"pcgrad/{self._seed}/{tasks[place].number}".encode()
        # 63 bits: a generator's seed is a signed number.
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        return [others[index] for index in order.tolist()]


def surgery(gram: Tensor, orders: Sequence[Sequence[int]]) -> list[float]:
    """w `[T]`: `sum_t w_t g_t` is the mean of the projected gradients.

    For each task i, with p_i = g_i at first, and each other task j in the order given:

        p_i <- p_i - (<p_i, g_j> / |g_j|^2) g_j        where <p_i, g_j> < 0

    Every p_i is a combination of the g, so that its inner products follow from those of the g. The paper
    takes the sum of the p_i; this is the mean, which is that of the g where nothing conflicts.

    Args:
        gram: `[T, T]`, `<g_s, g_t>`.
        orders: for each task the places of the others.
    """
    products: list[list[float]] = gram.tolist()
    num_tasks = len(products)
    total = [0.0] * num_tasks
    for place, order in enumerate(orders):
        own = [0.0] * num_tasks
        own[place] = 1.0
        along = list(products[place])  # <p_i, g_t> for all t
        for other in order:
            if along[other] < 0.0 < products[other][other]:
                step = along[other] / products[other][other]
                own[other] -= step
                along = [mine - step * its for mine, its in zip(along, products[other], strict=True)]
        total = [before + mine for before, mine in zip(total, own, strict=True)]
    return [value / num_tasks for value in total]
