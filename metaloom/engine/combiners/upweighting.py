"""Weights of groups by how rare they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.engine.combiners.base import GroupWeights, TaskRecord


class Upweighting(GroupWeights):
    """Inverse frequency: importance weighting, as in Sagawa et al. 2020, "Distributionally Robust Neural
    Networks for Group Shifts", section 3.

        weight_g = N / (G n_g)

    of the N tasks seen so far, n_g of them of group g, G groups: over these tasks the weights average to 1,
    and every group counts alike. A new group has weight 1.
    """

    name = "upweighting"

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def weight(self, group: str) -> float:
        if group not in self._counts:
            return 1.0
        return sum(self._counts.values()) / (len(self._counts) * self._counts[group])

    def update(self, tasks: Sequence[TaskRecord]) -> None:
        for task in tasks:
            group = str(task.group)
            self._counts[group] = self._counts.get(group, 0) + 1

    def shown(self) -> dict[str, float]:
        return {group: self.weight(group) for group in self._counts}

    def scalars(self) -> dict[str, Any]:
        return {"counts": dict(self._counts)}

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._counts = dict(scalars["counts"])
