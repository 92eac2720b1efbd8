"""Tasks count more the higher their loss: fair resource allocation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule


class QFFL(TaskRule):
    """`w_t = L_t^q / T`, the gradient of `1/T sum_t L_t^(q + 1) / (q + 1)` (Li et al. 2020, "Fair Resource
    Allocation in Federated Learning", equation 2).

    q = 0 is the mean; the larger q, the more the worst tasks count. Losses below 1 make the gradient shorter,
    losses above 1 longer. A loss that is not positive counts as 0.

    Args:
        q: above 0.
    """

    name = "q_ffl"

    def __init__(self, q: float) -> None:
        self._q = q
        self._metrics: dict[str, float] = {}

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        weights = [max(0.0, task.loss) ** self._q / len(tasks) for task in tasks]
        total = sum(weights)
        self._metrics = {"largest_share": max(weights) / total} if total > 0.0 else {}
        return weights

    def metrics(self) -> dict[str, float]:
        return self._metrics
