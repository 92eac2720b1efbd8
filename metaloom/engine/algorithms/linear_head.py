"""A linear head that is fitted to each task's support features, and differentiated through.

Shape letters: T tasks, S support examples, N examples, D width, C outputs (classes, or numbers of a target).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged, together
from metaloom.engine.backbone import Backbone
from metaloom.engine.heads.base import HeadSolver, Support
from metaloom.engine.heads.parameters import HeadParameters
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import IGNORE, Criterion, CrossEntropy


@dataclasses.dataclass(frozen=True)
class LinearHead(FeedForward):
    """A convex problem on the support features has the head for its solution, and the features are learned
    through it:

        W = solver(support features, support targets, lambda)
        outputs = alpha f(x) W + beta

    Ridge and logistic regression: Bertinetto et al. 2019, "Meta-learning with differentiable closed-form
    solvers"; a support vector machine: Lee et al. 2019, "Meta-Learning with Differentiable Convex
    Optimization". Features of half precision are raised to float32 first.

    Attributes:
        backbone: f; its weights are learned.
        solver: the problem.
        parameters: lambda, alpha and beta, some of which are learned.
        criterion: the loss of a query target, in a regression that of its numbers.
        num_outputs: C: the classes that a task has, at most, or numbers of a target.
    """

    backbone: Backbone
    solver: HeadSolver
    parameters: HeadParameters
    criterion: Criterion
    num_outputs: int

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        like = next(self.backbone.model.parameters())
        return self.backbone.meta_parameters() | self.parameters.meta_parameters(like)

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, weights, num_support = together(batch)
        features = self.backbone.features(meta, inputs, weights).flatten(2)
        return self.losses_of_features(meta, features[:, :num_support], features[:, num_support:], batch)

    def losses_of_features(
        self, meta: Tensors, support: Tensor, query: Tensor, batch: TaskBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `losses` returns, of the features `[T, S, D]` and `[T, N, D]` of a batch's examples."""
        wide = torch.promote_types(support.dtype, torch.float32)
        at = self.parameters.at(meta)
        head = self.solver.weights(self._support(support.to(wide), batch), at.regulariser)
        outputs = at.scale * (query.to(wide) @ head) + at.bias
        return judged(outputs, batch, self.criterion)

    def _support(self, features: Tensor, batch: TaskBatch) -> Support:
        targets, weights = batch.support["targets"], batch.support.get("weights")
        is_counted = (
            features.new_ones(features.shape[:2], dtype=torch.bool) if weights is None else weights != 0
        )
        outputs = torch.arange(self.num_outputs, device=features.device)
        num_ways = batch.num_ways
        is_class = outputs.expand(len(features), -1) < (
            self.num_outputs if num_ways is None else num_ways[:, None]
        )
        if isinstance(self.criterion, CrossEntropy):
            is_counted = is_counted & (targets != IGNORE)
            targets = F.one_hot(targets.clamp(min=0), self.num_outputs)
        return Support(features, targets.to(features.dtype), is_counted, is_class)
