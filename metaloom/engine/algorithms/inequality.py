"""A meta-loss that wants the tasks of an outer step to start alike.

Shape letters: T tasks of a micro-batch, M tasks of an outer step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient
from metaloom.engine.inequality import Measure
from metaloom.engine.inspection import Inspect
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales
from metaloom.engine.terms import WeightedInitialLoss
from metaloom.engine.unroll import constants, first_snapshot


@dataclasses.dataclass(frozen=True)
class Inequality(Algorithm):
    """MAML whose meta-loss has `weight * I(l_1 .. l_M)` more, l_t the query loss of task t before adaptation
    and I a measure of inequality over all tasks of an outer step (Jamal and Qi 2019, "Task Agnostic
    Meta-Learning for Few-Shot Learning", section 3.2: TAML by inequality), so that the start is not better
    for some tasks than for others.

    The gradient is `sum_t dI/dl_t * dl_t`, so what couples the tasks is one number each: `at_step` computes
    the losses of this rank's tasks without a graph, micro-batch by micro-batch, tells them to all ranks, and
    gives each task its slope. One more forward pass over the query examples than the term itself needs.

    Attributes:
        inner: adapts; its estimator has to take meta-losses with a part at phi_0.
        measure: I.
        weight: the paper's lambda.
        term: of the outer step whose tasks are known; None: those of a batch are taken for all.
    """

    inner: Maml
    measure: Measure
    weight: float
    term: WeightedInitialLoss | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.inner.metric_names, "inequality")

    @property
    def scores(self) -> tuple[str, ...]:
        return self.inner.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.inner.meta_parameters()

    def tracked(self) -> dict[str, Tensor]:
        return self.inner.tracked()

    @property
    def couples_tasks(self) -> bool:
        return True

    def at_step(
        self,
        meta: Mapping[str, Tensor],
        batches: Sequence[TaskBatch],
        gather: Callable[[list[Any]], list[Any]],
    ) -> Inequality:
        losses = dict(gather([pair for batch in batches for pair in self._initial_losses(meta, batch)]))
        # In one order, so that all ranks sum alike, whatever their number.
        numbers = sorted(losses)
        if not numbers:
            return dataclasses.replace(self, term=WeightedInitialLoss({}, 0.0))
        in_order = torch.tensor([losses[number] for number in numbers], dtype=torch.float64)
        value, slopes = self.measure.slopes(in_order)
        scaled = (self.weight * len(numbers) * slopes).tolist()
        term = WeightedInitialLoss(dict(zip(numbers, scaled, strict=True)), self.weight * value)
        return dataclasses.replace(self, term=term)

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
        term = self.term or self.at_step(meta, [batch], list).term
        assert term is not None, "it is what at_step makes"
        unroll = dataclasses.replace(self.inner.unroll, terms=(*self.inner.unroll.terms, term))
        found = dataclasses.replace(self.inner, unroll=unroll).meta_gradient(
            meta, batch, scales, outer_step=outer_step, on_final=on_final, inspect=inspect
        )
        share = term.value / self.weight
        measured = torch.full_like(found.losses, share, dtype=torch.float64)
        if batch.weights is not None:
            measured = measured * (batch.weights != 0)
        return dataclasses.replace(found, metrics=found.metrics | {"inequality": measured})

    def curve(self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        return self.inner.curve(meta, batch, num_steps=num_steps)

    def _initial_losses(self, meta: Mapping[str, Tensor], batch: TaskBatch) -> list[tuple[int, float]]:
        """Number and query loss at phi_0 of each task that counts and has a finite one."""
        start = first_snapshot(self.inner.unroll, meta, batch.num_tasks)
        with torch.no_grad():
            losses, _ = self.inner.unroll.learner.losses("query", constants(meta), start.fast, batch, 0)
        counts = [True] * batch.num_tasks if batch.weights is None else (batch.weights != 0).tolist()
        pairs = zip(batch.numbers, losses.double().tolist(), counts, strict=True)
        # Another would be no number's like: it is left out of the step.
        return [(number, loss) for number, loss, is_counted in pairs if is_counted and math.isfinite(loss)]
