"""Algorithms whose adaptation takes no steps: the query losses are a function of a task's data.

Shape letters: T tasks, N examples, K inner steps.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.adapters.model import Readout
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.examples import Reading, read
from metaloom.engine.hypergradients.base import (
    MetaGradient,
    OnGradient,
    finishing,
    gradient_of,
    prefixed,
    unprefixed,
)
from metaloom.engine.inspection import Inspect
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import Criterion
from metaloom.engine.precision import Scales
from metaloom.engine.unroll import constants, leaves, unscaled

Tensors = Mapping[str, Tensor]


class FeedForward(Algorithm):
    """The meta-loss is `losses`, or `objective` where another is learned from than is measured; its gradient
    is plain back-propagation."""

    @abc.abstractmethod
    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The query loss of each task, `[T]`, differentiable in `meta`; and the `scores`, `[T]` each,
        detached, float64.

        Args:
            outer_step: as in `meta_gradient`; None where nothing is learned from the tasks.
        """

    def objective(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What is minimised for each task, `[T]`, differentiable in `meta`; then what `losses` returns."""
        losses, scores = self.losses(meta, batch, outer_step=outer_step)
        return losses, losses, scores

    def penalty(self, meta: Tensors, *, outer_step: int) -> Tensor | None:
        """A term of the meta-loss that belongs to no task, differentiable in `meta`; None for none."""
        return None

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("loss_after", *(f"{name}_after" for name in self.scores))

    def meta_gradient(
        self,
        meta: Tensors,
        batch: TaskBatch,
        scales: Scales | None = None,
        *,
        outer_step: int = 0,
        on_final: OnGradient | None = None,
        inspect: Inspect | None = None,
    ) -> MetaGradient:
        scale = 1.0 if scales is None else scales.tangent
        theta = leaves(meta)
        with torch.enable_grad():
            minimised, losses, scores = self.objective(theta, batch, outer_step=outer_step)
            if inspect is not None:
                inspection = inspect(batch.numbers)
                inspection.look("query loss", None, [minimised, losses])
                inspection.settle()
            counts = torch.ones_like(minimised) if batch.weights is None else batch.weights
            total = minimised.double() * counts
            penalty = self.penalty(theta, outer_step=outer_step)
            if penalty is not None:
                total = total + penalty.double() * counts
            gradient = gradient_of(
                [scale * total.sum()],
                prefixed("theta/", theta),
                on_gradient=finishing(on_final, lambda name, value: unscaled({name: value}, scale)[name]),
            )
        metrics = {"loss_after": losses.detach().double()}
        metrics |= {f"{name}_after": value for name, value in scores.items()}
        if batch.weights is not None:
            metrics = {name: value.masked_fill(batch.weights == 0, 0.0) for name, value in metrics.items()}
        return MetaGradient(unscaled(unprefixed("theta/", gradient), scale), total.detach(), metrics)

    def curve(self, meta: Tensors, batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        with torch.no_grad():
            losses, scores = self.losses(constants(meta), batch, outer_step=None)
        points = {"loss": losses.double(), **scores}
        return {name: value[:, None].expand(-1, num_steps + 1) for name, value in points.items()}


def together(batch: TaskBatch) -> tuple[Tensor, Tensor | None, int]:
    """Support and query inputs of each task side by side, `[T, S + Q, ...]`, their weights `[T, S + Q]` (None
    where nothing is padded), and S. In one pass, batch statistics are those of both."""
    support, query = batch.support, batch.query
    inputs = torch.cat([support["inputs"], query["inputs"]], dim=1)
    if "weights" not in support and "weights" not in query:
        return inputs, None, support["inputs"].shape[1]
    weights = [
        part["weights"]
        if "weights" in part
        else inputs.new_ones(part["targets"].shape[:2], dtype=torch.float32)
        for part in (support, query)
    ]
    return inputs, torch.cat(weights, dim=1), support["inputs"].shape[1]


def judged(outputs: Tensor, batch: TaskBatch, criterion: Criterion) -> tuple[Tensor, dict[str, Tensor]]:
    """The query loss of each task, `[T]`, and its scores, of outputs `[T, Q, ..., C]`."""
    query, reading = batch.query, Reading(criterion, None, num_ways=batch.num_ways)
    examples = read(
        Readout(outputs), query["targets"], query.get("weights"), reading, head_chunk=None, derivative="once"
    )
    return examples.loss(), examples.mean_scores()
