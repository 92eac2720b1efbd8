"""The mean of single tasks' gradients, for what is measured between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule


class Even(TaskRule):
    """`w_t = 1/T`: what `Mean` gives, at the cost of `PerTask`. It is there for the cosines."""

    name = "mean"

    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        return [1.0 / len(tasks)] * len(tasks)
