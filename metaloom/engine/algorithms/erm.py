"""Empirical risk minimisation: no adaptation.

Shape letters: T tasks, Q query examples, C outputs.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import Criterion
from metaloom.engine.whole_model import WholeModel


@dataclasses.dataclass(frozen=True)
class Erm(FeedForward):
    """The query loss of a model as it is: what adaptation has to be better than. Support data are not read.

    The mean over tasks weighs groups as often as they are drawn: see `GroupEpisodes`.

    Attributes:
        model: its weights are what is learned.
        criterion: the loss of a target.
    """

    model: WholeModel
    criterion: Criterion

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.model.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        query = batch.query
        outputs = self.model.outputs(meta, query["inputs"], query.get("weights"), self.heads(batch))
        return judged(outputs, batch, self.criterion)

    def heads(self, batch: TaskBatch) -> list[str] | None:
        """Which of the model's outputs is read of each task; None for the same of all."""
        return None
