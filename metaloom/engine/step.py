"""One outer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.hypergradients.base import add_
from metaloom.engine.learner import TaskBatch
from metaloom.engine.left_out import LeftOut, differentiated
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Scales
from metaloom.engine.stopping import StopPoints

OnLeftOut = Callable[[Sequence[LeftOut]], None]


@dataclasses.dataclass(frozen=True)
class StepTasks:
    """This rank's share of one outer step's tasks.

    Attributes:
        batch: this rank's tasks; None where there are fewer tasks than ranks.
        num_global: tasks over all ranks.
        micro_batch: how many tasks are differentiated side by side.
    """

    batch: TaskBatch | None
    num_global: int
    micro_batch: int

    def micro_batches(self) -> list[TaskBatch]:
        return [] if self.batch is None else self.batch.split(self.micro_batch)


def outer_step(
    tasks: StepTasks,
    algorithm: Algorithm,
    combiner: Combiner,
    outer: OuterOptimizer,
    scaler: LossScaler,
    *,
    on_left_out: OnLeftOut | None = None,
    points: StopPoints | None = None,
) -> dict[str, float]:
    """Moves the meta-parameters by one step; returns what to log. Every rank must call.

    Tasks that are not finite are left out, as if the step did not have them; a step without any other is
    skipped.

    Args:
        on_left_out: told of them, those of all ranks, in the order of ranks, before a step that they leave
            without a gradient may end the run. On every rank, or on none.
        points: where the step may be broken off; None for nowhere.

    Raises:
        SkippedTooOftenError: too many steps in a row had no finite gradient.
    """
    points = points or StopPoints()
    parts = [part for batch in tasks.micro_batches() for part in combiner.parts(batch)]
    left_out, tracked = _add_up(parts, algorithm, combiner, outer, scaler.scales, points)
    outer.count(tracked)
    points.meet()
    combined = combiner.combine(tasks.num_global, num_left_out=len(left_out))  # where ranks meet
    if on_left_out is not None and combined.metrics["left_out"] > 0.0:
        on_left_out(outer.sharding.gather(left_out))
    has_tasks = combined.num_tasks > 0
    metrics = combined.metrics | scaler.metrics()
    # An overflow that smaller scales may mend is no sign of a broken run; losses have none.
    metrics |= outer.update(
        combined.gradient,
        num_tasks=combined.num_tasks,
        is_expected=scaler.can_shrink and has_tasks,
    )
    if has_tasks:
        scaler.update(is_finite=metrics["skipped"] == 0.0)
    return metrics


def _add_up(
    parts: Sequence[TaskBatch],
    algorithm: Algorithm,
    combiner: Combiner,
    outer: OuterOptimizer,
    scales: Scales,
    points: StopPoints,
) -> tuple[list[LeftOut], dict[str, Tensor]]:
    """Adds the meta-gradients of this rank's parts to the combiner, of the tasks that are finite; returns the
    others, and what was counted of these. Where tasks are coupled, all ranks begin anew without those that
    one has left out."""
    left_out: list[LeftOut] = []
    while True:
        at_step = algorithm.at_step(outer.meta, parts, outer.sharding.gather)
        tracked: dict[str, Tensor] = {}
        kept: list[TaskBatch] = []
        num_known = len(left_out)
        for index, batch in enumerate(parts):
            points.between_passes()
            # What the last part makes final is sent while the rest is computed, unless it may be revoked.
            is_final = index == len(parts) - 1 and not algorithm.couples_tasks
            found = differentiated(
                at_step,
                outer.meta,
                batch,
                scales,
                outer.sharding,
                outer_step=outer.step,
                on_final=combiner.on_final if is_final else None,
            )
            combiner.add(found.part, found.batch)
            add_(tracked, found.part.tracked)
            kept.append(found.batch)
            left_out += found.left_out
        if not algorithm.couples_tasks or not outer.sharding.any_rank(len(left_out) > num_known):
            return left_out, tracked
        combiner.discard()
        parts = kept
