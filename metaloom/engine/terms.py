"""Terms of the meta-loss beside query losses, of the fast weights before or after adaptation.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

from torch import Tensor

from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import PredictionEntropy, SupportLoss

Tensors = Mapping[str, Tensor]


class MetaTerm(abc.ABC):
    """A term of each task's meta-loss, of phi_k for some k."""

    @abc.abstractmethod
    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The k for which it has a part of phi_k, where there are K = `num_steps` inner steps."""

    @abc.abstractmethod
    def losses(
        self, learner: Learner, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int, *, num_steps: int
    ) -> Tensor:
        """Its part of phi_`step` for each task, `[T]`, differentiable once in `meta` and `fast`."""


@dataclasses.dataclass(frozen=True)
class EntropyReduction(MetaTerm):
    """`weight * (H(phi_K) - H(phi_0))`, H the mean entropy of what the model says of a task's query examples
    (Jamal and Qi 2019, "Task Agnostic Meta-Learning for Few-Shot Learning", section 3.1: TAML by entropy).

    Before adaptation no class is to be preferred, after it one. Two passes over the query examples more.

    Attributes:
        weight: the paper's lambda.
    """

    weight: float

    def steps(self, num_steps: int) -> tuple[int, ...]:
        return (0, num_steps) if num_steps > 0 else ()

    def losses(
        self, learner: Learner, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int, *, num_steps: int
    ) -> Tensor:
        entropy = dataclasses.replace(
            learner, criterion=PredictionEntropy(), rehearsal=None, support_loss=SupportLoss()
        )
        values, _ = entropy.losses("query", meta, fast, batch, step)
        return self.weight * values if step == num_steps else -self.weight * values


@dataclasses.dataclass(frozen=True)
class WeightedInitialLoss(MetaTerm):
    """A function of the query losses at phi_0 of all tasks of an outer step, by its derivatives: for a task
    `value + slope * (l - l')`, l its loss and l' the same as a constant.

    Attributes:
        slopes: the derivative by a task's loss, times the number of tasks, by episode number; 0 for a task
            that has none, since its loss was not finite.
        value: of the function.
    """

    slopes: Mapping[int, float]
    value: float

    def steps(self, num_steps: int) -> tuple[int, ...]:
        return (0,)

    def losses(
        self, learner: Learner, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int, *, num_steps: int
    ) -> Tensor:
        values, _ = learner.losses("query", meta, fast, batch, step)
        values = values.double()
        slopes = values.new_tensor([self.slopes.get(number, 0.0) for number in batch.numbers])
        return self.value + slopes * (values - values.detach())
