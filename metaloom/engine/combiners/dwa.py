"""Weights of groups by how fast their losses fall."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.engine.combiners.base import GroupWeights, TaskRecord, group_means

SMALLEST_LOSS = 1e-12  # is divided by
SMALLEST_WEIGHT = 1e-12


@dataclasses.dataclass
class _Course:
    """The losses of one group.

    Attributes:
        last, before_last: mean losses of the last two stretches in which it came; None before there are.
        total, count: of the stretch that is not yet over.
    """

    last: float | None = None
    before_last: float | None = None
    total: float = 0.0
    count: int = 0

    @property
    def rate(self) -> float:
        """L(t - 1) / L(t - 2); 1 before there are two."""
        if self.last is None or self.before_last is None:
            return 1.0
        return max(0.0, self.last) / max(SMALLEST_LOSS, self.before_last)


class DWA(GroupWeights):
    """Dynamic weight average (Liu et al. 2019, "End-to-End Multi-Task Learning with Attention",
    equation 7), for groups g in place of tasks.

        r_g = L_g(t - 1) / L_g(t - 2)
        weight_g = G exp(r_g / temperature) / sum_i exp(r_i / temperature)

    L_g(t) is the group's mean loss over a stretch of outer steps (an epoch in the paper); one in which a
    group did not come is passed over for it. G counts the groups that have two such losses; all others have
    weight 1, as all have in the paper's first two epochs.

    Args:
        temperature: the higher, the more even.
        num_steps: outer steps of a stretch.
    """

    name = "dwa"

    def __init__(self, temperature: float, num_steps: int) -> None:
        self._temperature, self._num_steps = temperature, num_steps
        self._courses: dict[str, _Course] = {}
        self._weights: dict[str, float] = {}
        self._num_done = 0

    def weight(self, group: str) -> float:
        return self._weights.get(group, 1.0)

    def update(self, tasks: Sequence[TaskRecord]) -> None:
        for group, loss in group_means(tasks).items():
            course = self._courses.setdefault(group, _Course())
            course.total += loss
            course.count += 1
        self._num_done += 1
        if self._num_done % self._num_steps:
            return
        for group, course in self._courses.items():
            if course.count:
                mean = course.total / course.count
                self._courses[group] = _Course(last=mean, before_last=course.last)
        self._weigh()

    def _weigh(self) -> None:
        rates = {
            group: course.rate / self._temperature
            for group, course in self._courses.items()
            if course.before_last is not None
        }
        highest = max(rates.values(), default=0.0)
        exponentials = {group: math.exp(rate - highest) for group, rate in rates.items()}
        total = math.fsum(exponentials.values())
        self._weights = {
            group: max(SMALLEST_WEIGHT, len(rates) * value / total) for group, value in exponentials.items()
        }

    def shown(self) -> dict[str, float]:
        return {group: self.weight(group) for group in self._courses}

    def scalars(self) -> dict[str, Any]:
        courses = {group: dataclasses.asdict(course) for group, course in self._courses.items()}
        return {"courses": courses, "num_done": self._num_done}

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._courses = {group: _Course(**course) for group, course in scalars["courses"].items()}
        self._num_done = int(scalars["num_done"])
        self._weigh()
