"""Tasks that are not finite, whatever their data and adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.forward_pass import Derivative
from metaloom.engine.learner import Learner, Objective, TaskBatch
from metaloom.engine.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class Poison:
    """What is wrong with some tasks.

    Attributes:
        numbers: of the tasks.
        objective: the loss that is not finite.
        step: after how many inner steps; None for all.
        factor: that the loss is multiplied by, and so its derivatives.
    """

    numbers: tuple[int, ...]
    objective: str = "support"
    step: int | None = 0
    factor: float = torch.nan


@dataclasses.dataclass(frozen=True)
class PoisonedLearner(Learner):
    """Another learner's losses, but for tasks of some numbers."""

    poison: Poison = dataclasses.field(default_factory=lambda: Poison(()))

    def losses(
        self,
        objective: Objective,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        batch: TaskBatch,
        step: int,
        *,
        derivative: Derivative = "once",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, measures = super().losses(objective, meta, fast, batch, step, derivative=derivative)
        poison = self.poison
        if objective != poison.objective or poison.step not in (None, step):
            return losses, measures
        factors = [poison.factor if number in poison.numbers else 1.0 for number in batch.numbers]
        return losses * losses.new_tensor(factors), measures


def poisoned(unroll: Unroll, poison: Poison) -> Unroll:
    """The same inner problem, some of its tasks not finite."""
    learner = unroll.learner
    fields = {field.name: getattr(learner, field.name) for field in dataclasses.fields(learner)}
    return dataclasses.replace(unroll, learner=PoisonedLearner(**fields, poison=poison))
