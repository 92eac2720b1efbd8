"""The mean of the tasks' meta-gradients, each times a weight of its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.engine.combiners.base import (
    Combined,
    Combiner,
    GroupWeights,
    TaskRecord,
    are_finite,
    groups_of,
    require_group,
    scaled,
    unscaled,
    weight_metrics,
)
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient, Tensors
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.base import Sharding


class Weighted(Combiner):
    """`1/T sum_t w_g(t) g_t`, with weights that are known before the step: tasks are weighed in the
    meta-loss, side by side as ever, and nothing is stored.

    The weights follow the step's losses, which ranks tell each other when they meet. A step with a loss that
    is not finite, which moves nothing, leaves them as they are.

    Args:
        weights: of the groups; the same on every rank.
        like, metric_names: as of `Mean`.
    """

    def __init__(
        self, weights: GroupWeights, like: Tensors, sharding: Sharding, *, metric_names: Sequence[str]
    ) -> None:
        self._weights, self._like, self._sharding = weights, like, sharding
        self._mean = Mean(like, sharding, metric_names=metric_names)
        self._records: list[TaskRecord] = []

    @property
    def on_final(self) -> OnGradient | None:
        return self._mean.on_final

    def parts(self, batch: TaskBatch) -> list[TaskBatch]:
        groups = [
            require_group(group, number, self._weights.name)
            for group, number in zip(groups_of(batch), batch.numbers, strict=True)
        ]
        return [scaled(batch, [self._weights.weight(group) for group in groups], self._like)]

    def add(self, part: MetaGradient, batch: TaskBatch) -> None:
        losses = unscaled(part.losses, batch.weights)
        self._mean.add(dataclasses.replace(part, losses=losses))
        is_real = [True] * batch.num_tasks if batch.weights is None else (batch.weights != 0).tolist()
        for number, group, loss, counts in zip(
            batch.numbers, groups_of(batch), losses.tolist(), is_real, strict=True
        ):
            if counts:
                self._records.append(TaskRecord(number, group, loss))

    def combine(self, num_global: int, *, num_left_out: int = 0) -> Combined:
        combined = self._mean.combine(num_global, num_left_out=num_left_out)
        shown = self._weights.shown()
        tasks = self._sharding.gather(self._records)
        self._records = []
        if tasks and are_finite(tasks):
            self._weights.update(tasks)
        return dataclasses.replace(combined, metrics=combined.metrics | weight_metrics(shown))

    def discard(self) -> None:
        self._mean.discard()
        self._records = []

    def scalars(self) -> dict[str, Any]:
        return self._weights.scalars()

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._weights.load(scalars)
