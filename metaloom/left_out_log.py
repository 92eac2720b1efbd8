"""The tasks that a run leaves out, named on the console."""

from __future__ import annotations

from collections.abc import Sequence

from metaloom.engine.left_out import LeftOut
from metaloom.engine.sharding.base import Sharding
from metaloom.tracking.console import Console

NUM_NAMED = 3  # of a step's tasks
NUM_TOLD = 10  # steps; the metric `left_out` counts the tasks of all


class LeftOutLog:
    """Warns of the first outer steps that leave tasks out, on rank 0 for the tasks of all ranks.

    Args:
        num_tasks: of an outer step.
    """

    def __init__(self, sharding: Sharding, console: Console, *, num_tasks: int) -> None:
        self._sharding, self._console, self._num_tasks = sharding, console, num_tasks
        self._num_told = 0

    def take(self, tasks: Sequence[LeftOut], *, step: int) -> None:
        """Takes in the tasks, at least one, that an outer step leaves out."""
        self._num_told += 1
        if self._sharding.rank != 0 or self._num_told > NUM_TOLD + 1:
            return
        if self._num_told > NUM_TOLD:
            self._console.warn("more tasks are left out: the metric left_out counts them")
            return
        named = [f"episode {task.number} ({task.reason})" for task in tasks[:NUM_NAMED]]
        if len(tasks) > NUM_NAMED:
            named.append(f"{len(tasks) - NUM_NAMED} more")
        self._console.warn(
            f"outer step {step}: {len(tasks)} of {self._num_tasks} tasks are not finite and left out: "
            + ", ".join(named)
        )
