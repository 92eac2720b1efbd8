"""The shortest convex combination of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule

MOST_STEPS = 10_000
TOLERANCE = 1e-12  # of the duality gap, relative to the largest squared norm


class MGDA(TaskRule):
    """Multiple-gradient descent (Désidéri 2012, "Multiple-Gradient Descent Algorithm (MGDA) for
    Multiobjective Optimization"; Sener and Koltun 2018, "Multi-Task Learning as Multi-Objective
    Optimization", equation 3): `min |sum_t w_t g_t|^2` over convex combinations, see `shortest`.

    A step along it lowers every task's loss, to first order, or the gradients' hull holds 0 and the
    meta-parameters are Pareto-stationary (`shortest_norm` near 0). Tasks with short gradients get most of the
    weight. A convex combination: not divided by T.
    """

    name = "mgda"
    needs_gram = True

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        assert gram is not None, "this rule needs inner products"
        weights = shortest(gram)
        square = float(weights @ gram @ weights)
        self._metrics = {
            "shortest_norm": max(0.0, square) ** 0.5,
            "largest_coefficient": float(weights.max()),
        }
        return weights.tolist()

    def metrics(self) -> dict[str, float]:
        return self._metrics


def shortest(gram: Tensor) -> Tensor:
    """w `[T]`, w >= 0, sum w = 1, that minimises `w^T G w`.

    Frank-Wolfe steps with exact line search (Sener and Koltun 2018, algorithm 2, whose line search is their
    algorithm 1), but in pairs: weight moves from the task of the largest `(G w)_t` among those that have some
    to the one of the smallest. Steps towards the latter alone zigzag where the minimum lies on a face; pairs
    converge linearly (Lacoste-Julien and Jaggi 2015, "On the Global Linear Convergence of Frank-Wolfe
    Optimization Variants", algorithm 2). For two tasks the first step is the closed form. Ends when the
    difference of the two, which bounds `w^T G w` above its minimum, vanishes to rounding.

    Args:
        gram: `[T, T]`, float64.
    """
    num_tasks = len(gram)
    weights = torch.full((num_tasks,), 1.0 / num_tasks, dtype=torch.float64)
    limit = TOLERANCE * float(gram.diagonal().max())
    for _ in range(MOST_STEPS):
        slope = gram @ weights
        low = int(slope.argmin())
        high = int(torch.where(weights > 0.0, slope, -torch.inf).argmax())
        gap = float(slope[high] - slope[low])
        if gap <= limit:
            break
        curvature = float(gram[low, low] - 2.0 * gram[low, high] + gram[high, high])
        whole = float(weights[high])
        step = whole if curvature <= 0.0 else min(whole, gap / curvature)
        weights[low] += step
        weights[high] = 0.0 if step == whole else weights[high] - step
    return weights / weights.sum()
