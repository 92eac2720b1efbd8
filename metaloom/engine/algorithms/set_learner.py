"""Networks that are given a support set and say the queries' labels: their forward pass is the learning.

Shape letters: T tasks, S support examples, Q query examples, F features of an example, P numbers of a label,
C classes, O outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged, together
from metaloom.engine.backbone import Backbone
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import Criterion

NETWORK = "network."


@dataclasses.dataclass(frozen=True)
class SetReader:
    """A network over the features of a task's examples.

    Its weights are meta-parameters as those of the backbone are: `network.<name>` and `backbone.<name>`.

    Attributes:
        backbone: what makes features of examples.
        network: called with support features `[T, S, F]`, their labels `[T, S, P]`, query features
            `[T, Q, F]` and the support's weights `[T, S]` or None. It keeps tasks and queries apart, and
            padding has no effect on it.
        num_classes: labels are one-hot over so many classes; None where they are the numbers of a
            regression's target.
    """

    backbone: Backbone
    network: nn.Module
    num_classes: int | None

    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of all weights."""
        own = {NETWORK + name: value.detach().clone() for name, value in self.network.named_parameters()}
        return self.backbone.meta_parameters() | own

    def read(self, meta: Tensors, batch: TaskBatch) -> Any:
        """What the network says of the queries of each task.

        Args:
            meta: `backbone.<name>` and `network.<name>`; what it lacks stays at the modules' own values.
        """
        inputs, weights, num_support = together(batch)
        features = self.backbone.features(meta, inputs, weights).flatten(2)
        substituted = {
            name.removeprefix(NETWORK): value for name, value in meta.items() if name.startswith(NETWORK)
        }
        support, query = features[:, :num_support], features[:, num_support:]
        arguments = (support, self._labels(batch, support.dtype), query, batch.support.get("weights"))
        with self.backbone.precision.autocast(inputs.device):
            return functional_call(self.network, substituted, arguments)

    def _labels(self, batch: TaskBatch, dtype: torch.dtype) -> Tensor:
        targets = batch.support["targets"]
        return targets if self.num_classes is None else F.one_hot(targets, self.num_classes).to(dtype)


@dataclasses.dataclass(frozen=True)
class SetLearner(FeedForward):
    """A black-box learner, `outputs = network(support set, queries)`, trained by the query loss (Santoro et
    al. 2016, Mishra et al. 2018); which network is the caller's choice.

    Attributes:
        reader: the network; its outputs are `[T, Q, O]`.
        criterion: the loss of a query's target.
    """

    reader: SetReader
    criterion: Criterion

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.reader.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return judged(self.reader.read(meta, batch), batch, self.criterion)
