"""One outer step."""

from __future__ import annotations

import dataclasses

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.learner import TaskBatch
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler
from metaloom.engine.stopping import StopPoints


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
    points: StopPoints | None = None,
) -> dict[str, float]:
    """Moves the meta-parameters by one step; returns what to log. Every rank must call.

    Args:
        points: where the step may be broken off; None for nowhere.
    """
    points = points or StopPoints()
    parts = [part for batch in tasks.micro_batches() for part in combiner.parts(batch)]
    algorithm = algorithm.at_step(outer.meta, parts, outer.sharding.gather)
    for index, batch in enumerate(parts):
        points.between_passes()
        # What the last part makes final is sent while the rest is computed.
        on_final = combiner.on_final if index == len(parts) - 1 else None
        part = algorithm.meta_gradient(
            outer.meta, batch, scaler.scales, outer_step=outer.step, on_final=on_final
        )
        combiner.add(part, batch)
        outer.count(part.tracked)
    points.meet()
    combined = combiner.combine(tasks.num_global)  # out of lockstep the one place where ranks meet
    metrics = combined.metrics | scaler.metrics()
    # An overflow that smaller scales may mend is no sign of a broken run.
    metrics |= outer.update(combined.gradient, num_tasks=tasks.num_global, is_expected=scaler.can_shrink)
    scaler.update(is_finite=metrics["skipped"] == 0.0)
    return metrics
