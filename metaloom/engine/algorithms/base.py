"""What an algorithm is: how an outer step learns from tasks, and how well what is learned solves others.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from metaloom.engine.hypergradients.base import MetaGradient, OnGradient
from metaloom.engine.inspection import Inspect
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales


class Algorithm(abc.ABC):
    """Learns from T tasks at a time, and adapts to T tasks at a time."""

    @property
    @abc.abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics that `meta_gradient` returns: ranks without tasks need them too."""

    @property
    @abc.abstractmethod
    def scores(self) -> tuple[str, ...]:
        """What `curve` measures beside the loss, of which higher is better."""

    @abc.abstractmethod
    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of the initial values of everything that is learned, by name. A name's first part is
        its kind: see `metaloom.engine.capabilities` for those that estimators of a hypergradient know."""

    def tracked(self) -> dict[str, Tensor]:
        """Initial values of what is counted in training beside what is learned, by name: running means of
        what `MetaGradient.tracked` reports. `curve` computes by them where they are among the meta-parameters
        that it is given."""
        return {}

    @property
    def couples_tasks(self) -> bool:
        """Whether a task's gradient depends on the other tasks of the outer step, by `at_step`: the step is
        then computed anew without the tasks that it leaves out."""
        return False

    def at_step(
        self,
        meta: Mapping[str, Tensor],
        batches: Sequence[TaskBatch],
        gather: Callable[[list[Any]], list[Any]],
    ) -> Algorithm:
        """The algorithm as it is to be used in one outer step, once that step's tasks are known: for
        meta-losses in which the tasks of all ranks have to do with each other. Every rank must call.

        Args:
            batches: this rank's micro-batches, none where it has no tasks. Those of weight 0 do not count.
            gather: all ranks' lists, joined, on every rank.
        """
        return self

    @abc.abstractmethod
    def meta_gradient(
        self,
        meta: Mapping[str, Tensor],
        batch: TaskBatch,
        scales: Scales | None = None,
        *,
        outer_step: int = 0,
        on_final: OnGradient | None = None,
        inspect: Inspect | None = None,
    ) -> MetaGradient:
        """The gradient of the meta-losses of a batch by the meta-parameters, summed over its tasks.

        A term that belongs to no task is added once per task: the mean over tasks then has it once.

        Args:
            scales: of this outer step, in half precision.
            outer_step: how many outer steps were done before, for what changes in the course of training.
            on_final: told of gradients that are final before the others are.
            inspect: begins the inspection of the tasks, which is to look at their losses, and to be settled
                before anything is differentiated that one of them could poison; None where nobody asks.

        Raises:
            NotFiniteError: the inspection found a task that is not finite; before `on_final` is told.
        """

    @abc.abstractmethod
    def curve(self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        """The query loss and scores of each task after 0 .. K adaptation steps.

        Returns:
            `loss` and the `scores`, each `[T, K + 1]`, float64, the same after every step where adaptation
            takes none; with retention data also `retention_loss` `[T, 2]`, before and after.
        """
