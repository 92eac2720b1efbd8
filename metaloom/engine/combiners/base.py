"""What combines the meta-gradients of an outer step's tasks into one, and what all combiners share.

Shape letters: T tasks of an outer step, over all ranks.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaloom.engine.combiners.cosines import Cosines
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient, Tensors
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import CapabilityError

MOST_GROUPS_SHOWN = 16


@dataclasses.dataclass(frozen=True)
class Combined:
    """One outer step's gradient.

    Attributes:
        gradient: not finite where every task was left out.
        metrics: averaged over the tasks of all ranks, but those that are left out; `left_out`, how many those
            are.
        num_tasks: over which they are averaged.
    """

    gradient: dict[str, Tensor]
    metrics: dict[str, float]
    num_tasks: int


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """What every rank knows of a task once ranks have met.

    Attributes:
        number: the global episode number.
        group: user, domain, corruption, or data set of a mixture; None where the data do not say.
        loss: the meta-loss, not weighted.
    """

    number: int
    group: str | None
    loss: float


class Combiner(abc.ABC):
    """Combines the meta-gradients of all tasks of all ranks, outer step by outer step.

    In each: `parts` for each micro-batch, `add` for each part, then `combine` once.

    Attributes:
        per_task: whether it takes the gradients of single tasks.
    """

    per_task: ClassVar[bool] = False

    @property
    def on_final(self) -> OnGradient | None:
        """What takes gradients of the last part that are final before the others are; None where that is of
        no use."""
        return None

    @property
    def cosines(self) -> Cosines | None:
        """Between the gradients of the last step that was combined; None where they were not measured."""
        return None

    def parts(self, batch: TaskBatch) -> list[TaskBatch]:
        """What is to be differentiated of a micro-batch, one after the other."""
        return [batch]

    @abc.abstractmethod
    def add(self, part: MetaGradient, batch: TaskBatch) -> None:
        """Takes in the meta-gradient of one of `parts`. Tasks of weight 0 do not count."""

    @abc.abstractmethod
    def combine(self, num_global: int, *, num_left_out: int = 0) -> Combined:
        """The combination over the tasks of all ranks. Every rank must call: out of lockstep the one place
        where ranks meet.

        Starts the next outer step.

        Args:
            num_global: tasks of all ranks.
            num_left_out: of this rank's tasks, those that do not count.
        """

    @abc.abstractmethod
    def discard(self) -> None:
        """Forgets what was added in this outer step, of which nothing was final early."""

    def scalars(self) -> dict[str, Any]:
        """What the next step's combination depends on besides its gradients, as plain JSON values; the same
        on every rank."""
        return {}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Takes over what `scalars` returned."""
        assert not scalars, "of a combiner that keeps nothing"


class GroupWeights(abc.ABC):
    """Weights of groups that are known before a step, and follow its losses afterwards.

    Attributes:
        name: as in a recipe.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def weight(self, group: str) -> float:
        """What the meta-loss of a task of this group is multiplied by in the next step, above 0; also of one
        that was never seen."""

    @abc.abstractmethod
    def update(self, tasks: Sequence[TaskRecord]) -> None:
        """Takes in a step's tasks, T of them in global order; losses are finite."""

    @abc.abstractmethod
    def shown(self) -> dict[str, float]:
        """The weight of every group that was seen."""

    @abc.abstractmethod
    def scalars(self) -> dict[str, Any]:
        """What the next weights depend on, as plain JSON values."""

    @abc.abstractmethod
    def load(self, scalars: Mapping[str, Any]) -> None:
        """Takes over what `scalars` returned."""


class TaskRule(abc.ABC):
    """The coefficients of single tasks' gradients, from their losses and inner products alone.

    Attributes:
        name: as in a recipe.
        needs_gram: whether it looks at inner products.
        needs_groups: whether every task needs a group.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    def weight(self, group: str | None) -> float:
        """What the meta-loss of a task is multiplied by before it is differentiated."""
        return 1.0

    @abc.abstractmethod
    def coefficients(self, tasks: Sequence[TaskRecord], gram: Tensor | None) -> list[float]:
        """w `[T]`: the step's gradient is `sum_t w_t g_t`. The same on every rank.

        Args:
            tasks: T of them in global order; losses are finite.
            gram: `[T, T]`, float64, on the CPU: the inner products of the gradients g, which are those of the
                weighted meta-losses; None where they were not computed.
        """

    def metrics(self) -> dict[str, float]:
        """What to log of the last step."""
        return {}

    def scalars(self) -> dict[str, Any]:
        """What the next step's coefficients depend on, as plain JSON values."""
        return {}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Takes over what `scalars` returned."""
        assert not scalars, "of a rule that keeps nothing"


class MetricSums:
    """Sums over the tasks of a step, of the meta-loss and of what the estimator reports.

    Args:
        names: beside the meta-loss: known before the first task, since ranks without tasks take part.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = ("meta_loss", *names)
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in self._names}

    def add(self, part: MetaGradient) -> None:
        for name, value in {"meta_loss": part.losses, **part.metrics}.items():
            self._sums[name] += value.double().sum().cpu()

    def means(
        self, num_global: int, num_left_out: int, sharding: Sharding, device: torch.device
    ) -> tuple[int, dict[str, float]]:
        """Over how many tasks of all ranks, and the means; among these `left_out`, the number of the others.
        Every rank must call.

        Args:
            num_left_out: of this rank's tasks, those of which nothing was added.
        """
        own = self._sums | {"left_out": torch.tensor(num_left_out, dtype=torch.float64)}
        total = sharding.sum_over_ranks({name: value.to(device) for name, value in own.items()})
        left_out = float(total["left_out"])
        num_tasks = num_global - round(left_out)
        means = {name: float(total[name]) / num_tasks if num_tasks else math.nan for name in self._names}
        return num_tasks, means | {"left_out": left_out}


def groups_of(batch: TaskBatch) -> tuple[str | None, ...]:
    """The group of each of the T tasks."""
    return (None,) * batch.num_tasks if batch.groups is None else batch.groups


def require_group(group: str | None, number: int, combiner: str) -> str:
    """The group.

    Raises:
        CapabilityError: there is none.
    """
    if group is None:
        raise CapabilityError(
            f"outer.combiner.kind: {combiner}; weighs groups of tasks, and episode {number} has no group. "
            "Take data.kind groups or mixture, or ready episodes that state their group."
        )
    return group


def scaled(batch: TaskBatch, factors: Sequence[float], like: Tensors) -> TaskBatch:
    """The batch with each task's weight times a factor.

    Args:
        factors: T of them.
        like: meta-parameters, for their dtype and device.
    """
    if all(factor == 1.0 for factor in factors):
        return batch
    of = next(iter(like.values()))
    weights = torch.tensor(factors, dtype=of.dtype, device=of.device)
    return dataclasses.replace(batch, weights=weights if batch.weights is None else batch.weights * weights)


def unscaled(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The meta-losses that were multiplied by `weights`, `[T]`, float64; 0 where the weight is 0."""
    if weights is None:
        return losses.double()
    counts = weights != 0
    return torch.where(counts, losses.double() / torch.where(counts, weights.double(), 1.0), 0.0)


def group_means(tasks: Sequence[TaskRecord]) -> dict[str, float]:
    """The mean loss of each group in a step, in the order of names; tasks without a group are passed over."""
    losses: dict[str, list[float]] = {}
    for task in tasks:
        if task.group is not None:
            losses.setdefault(task.group, []).append(task.loss)
    return {group: math.fsum(losses[group]) / len(losses[group]) for group in sorted(losses)}


def are_finite(tasks: Sequence[TaskRecord]) -> bool:
    """Whether all losses are: a rule's state must not take in others, and the step is skipped anyway."""
    return all(math.isfinite(task.loss) for task in tasks)


def weight_metrics(weights: Mapping[str, float]) -> dict[str, float]:
    """`weight/<group>` of each group; of more than 16 groups, the smallest and the largest alone."""
    if len(weights) > MOST_GROUPS_SHOWN:
        return {"weight_smallest": min(weights.values()), "weight_largest": max(weights.values())}
    # Trackers take letters, digits, and few other signs.
    return {f"weight/{re.sub(r'[^A-Za-z0-9_-]', '_', group)}": weights[group] for group in sorted(weights)}
