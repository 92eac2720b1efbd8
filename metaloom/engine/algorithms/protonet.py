"""Prototypical networks.

Shape letters: T tasks, S support examples, Q query examples, D width, C classes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged, together
from metaloom.engine.backbone import Backbone
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy


@dataclasses.dataclass(frozen=True)
class Protonet(FeedForward):
    """A class is the mean of its support features, and a query belongs to the nearest one (Snell et al. 2017,
    "Prototypical Networks for Few-shot Learning", equations 1 and 2):

        c_k = mean of f(x) over the support examples of class k
        log p(y = k | x) = log softmax_k(-|f(x) - c_k|^2)

    Attributes:
        backbone: f; its weights are what is learned.
        num_classes: C, the most that a task has.
    """

    backbone: Backbone
    num_classes: int

    @property
    def scores(self) -> tuple[str, ...]:
        return CrossEntropy.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.backbone.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, weights, num_support = together(batch)
        features = self.backbone.features(meta, inputs, weights).flatten(2)
        support, query = features[:, :num_support], features[:, num_support:]
        prototypes = class_means(
            support, batch.support["targets"], self.num_classes, batch.support.get("weights")
        )
        return judged(-squared_distances(query, prototypes), batch, CrossEntropy())


def class_means(features: Tensor, targets: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """The mean feature of each class, `[T, C, D]`, in at least float32; 0 for a class without examples.

    Args:
        features: `[T, S, D]`.
        targets: `[T, S]`.
        weights: `[T, S]`, 0 for padding; None where there is none.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    members = F.one_hot(targets, num_classes).to(wide.dtype)  # [T, S, C]
    if weights is not None:
        members = members * weights.to(wide.dtype)[..., None]
    counts = members.sum(1).clamp(min=1.0)  # [T, C]
    return members.mT @ wide / counts[..., None]


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """`|p - c|^2` for points `[T, Q, D]` and centres `[T, C, D]`: `[T, Q, C]`."""
    # By the differences themselves: |p|^2 - 2pc + |c|^2 cancels where points lie close to their centre.
    return (points.to(centres.dtype)[:, :, None] - centres[:, None]).square().sum(-1)
