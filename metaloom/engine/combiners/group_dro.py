"""Groups count more the higher their loss: distributionally robust optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule, group_means, weight_metrics


class GroupDRO(TaskRule):
    """Exponentiated-gradient ascent on the weights of groups (Sagawa et al. 2020, "Distributionally Robust
    Neural Networks for Group Shifts", algorithm 1).

    With L_g the mean loss of the step's tasks of group g, G groups seen so far and G' of them in the step:

        q_g <- q_g exp(eta L_g)          for the groups of the step; then q is divided by its sum
        gradient = G / G' sum_g q_g (mean over the step's tasks t of group g) g_t

    A convex combination where all groups are in the step. Where they are not, `G / G'` keeps its scale: equal
    q give the mean over the step's groups. (The paper draws one group a step, uniformly, and has no such
    factor, which is constant there.) A new group comes in with q = 1 / G.

    Args:
        step_size: eta.
    """

    name = "group_dro"
    needs_groups = True

    def __init__(self, step_size: float) -> None:
        self._step_size = step_size
        self._logs: dict[str, float] = {}  # log q

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        losses = group_means(tasks)
        self._take_in(losses)
        counts = {group: sum(task.group == group for task in tasks) for group in losses}
        scale = len(self._logs) / len(losses)
        q = self._weights()
        return [scale * q[str(task.group)] / counts[str(task.group)] for task in tasks]

    def _take_in(self, losses: Mapping[str, float]) -> None:
        new = [group for group in losses if group not in self._logs]
        num_groups = len(self._logs) + len(new)
        kept = math.log(len(self._logs) / num_groups) if self._logs else 0.0
        self._logs = {group: log + kept for group, log in self._logs.items()}
        self._logs |= {group: -math.log(num_groups) for group in new}
        for group, loss in losses.items():
            self._logs[group] += self._step_size * loss
        # Logarithms: losses add up without end, and their exponentials would overflow.
        highest = max(self._logs.values())
        norm = highest + math.log(math.fsum(math.exp(log - highest) for log in self._logs.values()))
        self._logs = {group: self._logs[group] - norm for group in sorted(self._logs)}

    def _weights(self) -> dict[str, float]:
        return {group: math.exp(log) for group, log in self._logs.items()}

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self._weights())

    def scalars(self) -> dict[str, Any]:
        return {"log_weights": dict(self._logs)}

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._logs = dict(scalars["log_weights"])
