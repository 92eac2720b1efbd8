"""One model for groups of tasks that ask different things of the same inputs.

Shape letter: T tasks.
"""

from __future__ import annotations

import dataclasses

from metaloom.engine.algorithms.erm import Erm
from metaloom.engine.learner import TaskBatch
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class MultiTask(Erm):
    """The query loss of what a model says when it is told of which group a task is: multi-task learning, with
    a group in the place of a task. There is no adaptation, and support data are not read.

    A group's own weights have the mean over the T tasks of a step, as all weights have: T times less of what
    one task says of them, whatever the number of groups.

    Attributes:
        groups: their names; the model has an output for each.
    """

    groups: tuple[str, ...]

    def heads(self, batch: TaskBatch) -> list[str]:
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
