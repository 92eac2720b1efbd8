"""Tasks that are computed together are computed as if each were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.learner import Rehearsal, TaskBatch
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.unroll import adapt
from tests.numerics.msr_problems import msr_problem
from tests.numerics.problems import (
    FOR_EVERYTHING,
    Problem,
    assert_gradients_agree,
    conv4_problem,
    gpt_problem,
    last,
)

NUM_TASKS = 5
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "conv4": lambda: conv4_problem(
        step_weights=(0.0, 0.5, 0.5), grain="per_tensor_per_step", num_tasks=NUM_TASKS
    ),
    # Not the first layer, whose one input channel has a factor that batch norm takes away again: its gradient
    # is what is left of larger numbers.
    "symmetries": lambda: msr_problem(
        "kronecker",
        step_weights=(0.0, 0.5, 0.5),
        num_tasks=NUM_TASKS,
        layers=("blocks.1.conv", "blocks.2.conv", "head"),
    ),
    "gpt": lambda: gpt_problem(
        step_weights=(0.0, 0.5, 0.5),
        grain="per_tensor_per_step",
        backbone=True,
        rehearsal=Rehearsal(ratio=0.3, num_samples=2),
        num_tasks=NUM_TASKS,
    ),
}
both_models = pytest.mark.parametrize("model", PROBLEMS)
every_estimator = pytest.mark.parametrize("estimator", FOR_EVERYTHING)


@both_models
@every_estimator
def test_a_batch_of_tasks_gives_the_sum_of_the_tasks_alone(model: str, estimator: str) -> None:
    problem = PROBLEMS[model]()
    hypergradient = HYPERGRADIENTS[estimator]()
    together = hypergradient.meta_gradient(problem.unroll, problem.meta, problem.batch)
    alone = [hypergradient.meta_gradient(problem.unroll, problem.meta, one) for one in problem.batch.split(1)]
    total = {name: sum_of([part.gradient[name] for part in alone]) for name in problem.meta}
    # Matrix products of other sizes add in another order.
    assert_gradients_agree(together.gradient, total, rtol=1e-12)
    torch.testing.assert_close(
        together.losses, torch.cat([part.losses for part in alone]), rtol=1e-13, atol=0
    )
    for name, value in together.metrics.items():
        torch.testing.assert_close(
            value, torch.cat([part.metrics[name] for part in alone]), rtol=1e-13, atol=0
        )


@both_models
@pytest.mark.parametrize("moved", [0, 3])
def test_changing_one_tasks_data_leaves_the_other_tasks_bit_for_bit(model: str, moved: int) -> None:
    problem = PROBLEMS[model]()
    others = [task for task in range(NUM_TASKS) if task != moved]
    before = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=2))
    changed = with_other_data(problem.batch, moved)
    after = list(adapt(problem.unroll, problem.meta, changed, num_steps=2))
    for step in (1, 2):
        for name, value in before[step].fast.items():
            assert torch.equal(after[step].fast[name][others], value[others]), name
            assert not torch.equal(after[step].fast[name][moved], value[moved]), name
    losses = [
        problem.unroll.learner.losses("query", problem.meta, path[-1].fast, batch, 0)[0]
        for path, batch in ((before, problem.batch), (after, changed))
    ]
    assert torch.equal(losses[0][others], losses[1][others])
    assert losses[0][moved] != losses[1][moved]


@both_models
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_micro_batches_of_any_size_give_the_same_mean(model: str, size: int) -> None:
    problem = PROBLEMS[model]()

    def mean(micro_batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        hypergradient = HYPERGRADIENTS["mixed_mode"]()
        combiner = Mean(
            problem.meta, Replicated(), metric_names=hypergradient.metric_names(problem.unroll.learner)
        )
        for part in problem.batch.split(micro_batch):
            combiner.add(hypergradient.meta_gradient(problem.unroll, problem.meta, part))
        combined = combiner.combine(NUM_TASKS)
        return combined.gradient, combined.metrics

    gradient, metrics = mean(size)
    expected_gradient, expected_metrics = mean(NUM_TASKS)
    # The same sums, in another order.
    assert_gradients_agree(gradient, expected_gradient, rtol=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-13)


def test_batch_norm_takes_its_statistics_from_one_task_alone() -> None:
    problem = conv4_problem(step_weights=last(1))
    scaled = {**problem.batch.query, "inputs": problem.batch.query["inputs"].clone()}
    scaled["inputs"][1] *= 100.0
    fast = problem.unroll.learner.init(problem.meta, 2)
    losses = [
        problem.unroll.learner.losses(
            "query", problem.meta, fast, TaskBatch((0, 1), problem.batch.support, query), 0
        )[0]
        for query in (problem.batch.query, scaled)
    ]
    assert losses[0][0] == losses[1][0]


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def with_other_data(batch: TaskBatch, task: int) -> TaskBatch:
    """The same batch with the rows of every part of one task in reverse, and its inputs changed."""

    def changed(part: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = part["inputs"].clone()
        moved = inputs[task].flip(0)
        inputs[task] = moved * 2.0 if moved.is_floating_point() else (moved + 1) % 256
        return {**part, "inputs": inputs}

    rehearsal = None if batch.rehearsal is None else changed(dict(batch.rehearsal))
    return TaskBatch(batch.numbers, changed(dict(batch.support)), changed(dict(batch.query)), rehearsal)
