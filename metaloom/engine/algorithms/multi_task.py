"""One model for groups of tasks that ask different things of the same inputs.

Shape letters: T tasks, Q query examples, C outputs.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import Criterion
from metaloom.engine.whole_model import WholeModel
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class MultiTask(FeedForward):
    """The query loss of what a model says when it is told of which group a task is: multi-task learning, with
    a group in the place of a task. There is no adaptation, and support data are not read.

    A group's own weights have the mean over the T tasks of a step, as all weights have: T times less of what
    one task says of them, whatever the number of groups.

    Attributes:
        model: its weights are what is learned; it has an output for each group, by the group's name.
        criterion: the loss of a target.
        groups: their names.
    """

    model: WholeModel
    criterion: Criterion
    groups: tuple[str, ...]

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.model.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        query = batch.query
        outputs = self.model.outputs(meta, query["inputs"], query.get("weights"), self._groups_of(batch))
        return judged(outputs, batch, self.criterion)

    def _groups_of(self, batch: TaskBatch) -> list[str]:
        """The group of each task.

        Raises:
            CapabilityError: one has none, or another than the model has.
        """
        groups = batch.groups or (None,) * batch.num_tasks
        for number, group in zip(batch.numbers, groups, strict=True):
            if group not in self.groups:
                named = "has no group" if group is None else f"is of group {group!r}"
                raise CapabilityError(
                    f"episode {number} {named}, and this model is for the groups {', '.join(self.groups)}: "
                    "name all groups of the data in algorithm.groups."
                )
        return [str(group) for group in groups]
