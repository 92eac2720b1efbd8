"""A meta-loss that couples the tasks of all ranks is the same at any number of them."""

from __future__ import annotations

import dataclasses

import pytest

from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inequality import Measure
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from tests.multirank.processes import run_ranks
from tests.multirank.test_task_batches import TASKS, Lockstep, own_tasks, problem
from tests.unit.test_engine_step import SETTINGS

Curve = list[dict[str, float]]


def train(sharding: Replicated, micro_batch: int, num_tasks: int) -> Curve:
    made = problem()
    inner = Maml(made.unroll, HYPERGRADIENTS["rematerialized"]())
    algorithm = Inequality(inner, Measure("theil"), 50.0)
    outer = OuterOptimizer(made.meta, dataclasses.replace(SETTINGS, lr=0.05, lr_rates=0.05), sharding)
    combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    return [
        outer_step(
            StepTasks(own_tasks(made.batch, step, num_tasks, sharding), num_tasks, micro_batch),
            algorithm,
            combiner,
            outer,
            LossScaler(Precision("float64")),
        )
        for step in range(2)
    ]


def on_this_rank(num_tasks: int) -> list[Curve]:
    return [
        train(kind(), micro_batch, num_tasks) for kind in (Replicated, Lockstep) for micro_batch in (1, 2)
    ]


@pytest.mark.parametrize(
    ("world_size", "num_tasks"), [(2, 4), pytest.param(3, 4, marks=pytest.mark.slow), (4, 2)]
)
def test_ranks_without_tasks_and_dummies_do_not_change_the_inequality(
    world_size: int, num_tasks: int
) -> None:
    assert num_tasks <= TASKS
    expected = train(Replicated(), num_tasks, num_tasks)
    assert expected[0]["inequality"] > 1e-5  # there is something to be seen
    assert expected[1]["inequality"] < expected[0]["inequality"]
    for curves in run_ranks(world_size, on_this_rank, num_tasks):
        for found in curves:
            for step, metrics in enumerate(found):
                # The same sums in another order, in float64; a small measure is a difference of them.
                assert metrics == pytest.approx(expected[step], rel=1e-9), step
