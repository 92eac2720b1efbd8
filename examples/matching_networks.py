"""Matching networks as a new algorithm of metaloom: one file, and five lines of a recipe.

algorithm:
  kind: custom
  factory: matching_networks:build
  options: {temperature: 0.1}
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.algorithms.custom import Parts
from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, together
from metaloom.engine.backbone import Backbone
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import task_means


@dataclasses.dataclass(frozen=True)
class MatchingNetworks(FeedForward):
    """A query's label is that of the support examples it attends to (Vinyals et al. 2016, "Matching Networks
    for One Shot Learning", equations 1 and 2, without full context embeddings):

        a(q, s) = softmax over s of cos(f(q), f(s)) / temperature,    p(y | q) = sum_s a(q, s) [y_s = y]

    `temperature` is an addition: the paper has 1, and cosines lie between -1 and 1.
    """

    backbone: Backbone
    num_classes: int
    temperature: float

    @property
    def scores(self) -> tuple[str, ...]:
        return ("accuracy",)

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.backbone.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, weights, num_support = together(batch)
        features = F.normalize(self.backbone.features(meta, inputs, weights).flatten(2), dim=-1)  # [T, N, D]
        support, query = features[:, :num_support], features[:, num_support:]
        cosines = query @ support.mT / self.temperature  # [T, Q, S]
        if "weights" in batch.support:  # padding is attended to by nobody
            is_padding = batch.support["weights"] == 0
            cosines = cosines.masked_fill(is_padding[:, None], torch.finfo(cosines.dtype).min / 2)
        labels = F.one_hot(batch.support["targets"], self.num_classes).to(cosines.dtype)  # [T, S, C]
        probabilities = cosines.softmax(-1) @ labels  # [T, Q, C]
        targets, query_weights = batch.query["targets"], batch.query.get("weights")
        right = probabilities.gather(-1, targets[..., None]).squeeze(-1)
        accuracy = (probabilities.detach().argmax(-1) == targets).double()
        losses = -right.clamp(min=torch.finfo(right.dtype).tiny).log()
        return task_means(losses, query_weights), {"accuracy": task_means(accuracy, query_weights)}


def build(parts: Parts) -> MatchingNetworks:
    """What the recipe names."""
    assert parts.num_classes is not None, "matching networks tell classes apart"
    temperature = float(parts.options.get("temperature", 1.0))
    return MatchingNetworks(parts.backbone, parts.num_classes, temperature)
