"""Weights of groups by their learned uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.engine.combiners.base import GroupWeights, TaskRecord, group_means

LARGEST_LOG_VARIANCE = 30.0  # either way: a weight is neither 0 nor infinite


class Uncertainty(GroupWeights):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to
    Weigh Losses for Scene Geometry and Semantics", equation 7), the form of a regression.

    Each group has a noise sigma_g, learned as s_g = log sigma_g^2 by gradient descent beside the
    meta-parameters:

        1/T sum_t ( L_t / (2 sigma_g(t)^2) + log sigma_g(t) )
        weight_g = exp(-s_g) / 2;      s_g <- s_g - lr (1 - exp(-s_g) L_g) / 2

    L_g is the mean loss of the step's tasks of the group. A group's s follows the gradient of its own mean,
    so that its speed does not depend on its share of the tasks; at rest sigma_g^2 = L_g. All s start at 0,
    all weights at 1/2.

    Args:
        lr: of s.
    """

    name = "uncertainty"

    def __init__(self, lr: float) -> None:
        self._lr = lr
        self._log_variances: dict[str, float] = {}

    def weight(self, group: str) -> float:
        return 0.5 * math.exp(-self._log_variances.get(group, 0.0))

    def update(self, tasks: Sequence[TaskRecord]) -> None:
        for group, loss in group_means(tasks).items():
            before = self._log_variances.get(group, 0.0)
            moved = before - self._lr * 0.5 * (1.0 - math.exp(-before) * loss)
            self._log_variances[group] = min(LARGEST_LOG_VARIANCE, max(-LARGEST_LOG_VARIANCE, moved))

    def shown(self) -> dict[str, float]:
        return {group: self.weight(group) for group in self._log_variances}

    def scalars(self) -> dict[str, Any]:
        return {"log_variances": dict(self._log_variances)}

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._log_variances = dict(scalars["log_variances"])
