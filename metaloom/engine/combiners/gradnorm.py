"""Weights of groups that let all of them train at similar rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule, group_means, weight_metrics
from metaloom.engine.combiners.cosines import group_averages

SMALLEST_WEIGHT = 1e-6
SMALLEST_LOSS = 1e-12  # a first loss is divided by
LARGEST_MOVE = 10.0  # of a weight's logarithm in a step: a large lr is no overflow


class GradNorm(TaskRule):
    """Gradient normalisation (Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing
    in Deep Multitask Networks", algorithm 1), for groups g in place of tasks.

    With the mean loss L_g of the step's tasks of a group, and the first such loss L_g(0):

        n_g = |w_g grad L_g|,  n = mean over groups of n_g                (over what `of` names)
        r_g = (L_g / L_g(0)) / (mean over groups of the same)             (relative inverse training rate)
        F = sum_g | n_g - n r_g^alpha |                                   (equation 2; its targets constant)
        log w_g <- log w_g - lr / n dF / dlog w_g,    dF / dlog w_g = sign(n_g - n r_g^alpha) n_g

    Then the weights are divided so that they add up to the number of groups. The paper steps in w itself, by
    an optimizer that it does not name: gradient descent in w goes below 0, or wildly back and forth, where
    losses are as unequal as in its own toy problem. Steps of log w, relative to n, cannot go below 0, are the
    same for losses of any size, and end within some lr of where norms are as they should be.

    The step itself has the weights from before, `1/T sum_t w_g(t) g_t`, of all meta-parameters. Means are
    over the groups in the step; a step with a single group, or with gradients that are 0, leaves the weights
    alone. A new group has weight 1; none falls below 1e-6 before the division.

    Args:
        alpha: how strongly rates are pulled together; 0 for equal norms.
        lr: of the weights' logarithms.
    """

    name = "gradnorm"
    needs_gram = True
    needs_groups = True

    def __init__(self, alpha: float, lr: float) -> None:
        self._alpha, self._lr = alpha, lr
        self._weights: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._shown: dict[str, float] = {}

    def weight(self, group: str | None) -> float:
        return self._weights.get(str(group), 1.0)

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        assert gram is not None, "this rule needs inner products"
        losses = group_means(tasks)
        for group, loss in losses.items():
            self._first.setdefault(group, max(loss, SMALLEST_LOSS))
            self._weights.setdefault(group, 1.0)
        self._shown = dict(self._weights)
        if len(losses) > 1:
            means = group_averages([task.group for task in tasks], list(losses))
            squares = (means @ gram @ means.T).diagonal().clamp(min=0.0)
            self._move(losses, dict(zip(losses, squares.sqrt().tolist(), strict=True)))
        return [1.0 / len(tasks)] * len(tasks)  # the gradients are weighted already

    def _move(self, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        ratios = {group: max(0.0, loss) / self._first[group] for group, loss in losses.items()}
        mean_ratio = math.fsum(ratios.values()) / len(ratios)
        mean_norm = math.fsum(norms.values()) / len(norms)
        if mean_norm == 0.0:
            return
        for group, norm in norms.items():
            rate = ratios[group] / mean_ratio if mean_ratio > 0.0 else 1.0
            excess = norm - mean_norm * rate**self._alpha
            slope = math.copysign(norm / mean_norm, excess) if excess != 0.0 else 0.0
            moved = self._weights[group] * math.exp(max(-LARGEST_MOVE, min(LARGEST_MOVE, -self._lr * slope)))
            self._weights[group] = max(SMALLEST_WEIGHT, moved)
        scale = len(self._weights) / math.fsum(self._weights.values())
        self._weights = {group: scale * self._weights[group] for group in sorted(self._weights)}

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self._shown)

    def scalars(self) -> dict[str, Any]:
        return {"weights": dict(self._weights), "first_losses": dict(self._first)}

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._weights, self._first = dict(scalars["weights"]), dict(scalars["first_losses"])
