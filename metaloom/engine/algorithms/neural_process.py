"""Conditional neural processes, of regressions.

Shape letters: T tasks, Q query examples, P numbers of a target.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors
from metaloom.engine.algorithms.set_learner import SetReader
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import MeanSquaredError, task_means

LOG_LIKELIHOOD = "log_likelihood"


@dataclasses.dataclass(frozen=True)
class NeuralProcess(FeedForward):
    """Trained by the likelihood of the queries' targets, measured by the squared error of their means
    (Garnelo et al. 2018, "Conditional Neural Processes", section 2):

        (mu, sigma) = network(support set, x),    minimise -log N(y; mu, sigma^2), of the query examples

    The loss that is told and compared is that of other regressions, (mu - y)^2 averaged over a target's
    numbers. The score `log_likelihood` is what is trained on: log N summed over a target's numbers, in nats,
    averaged over the query examples. (The paper's targets are the support examples too.)

    Attributes:
        reader: the network; it says mean and standard deviation, `[T, Q, P]` each.
    """

    reader: SetReader

    @property
    def scores(self) -> tuple[str, ...]:
        return (LOG_LIKELIHOOD,)

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.reader.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _, losses, scores = self.objective(meta, batch, outer_step=outer_step)
        return losses, scores

    def objective(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, std = self.reader.read(meta, batch)
        targets, weights = batch.query["targets"], batch.query.get("weights")
        (errors,) = MeanSquaredError().of_targets(mean, targets, num_ways=batch.num_ways)
        log_density = -0.5 * (errors / std.square() + math.log(2.0 * math.pi)) - std.log()
        log_likelihood = task_means(log_density.sum(-1), weights)
        scores = {LOG_LIKELIHOOD: log_likelihood.detach().double()}
        return -log_likelihood, task_means(errors.mean(-1), weights), scores
