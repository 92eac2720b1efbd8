"""The tasks of an outer step, over ranks and micro-batches: one update, gradients across ranks once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.datasets import share_of_rank
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.solvers import ConjugateGradient
from metaloom.engine.learner import TaskBatch
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from tests.multirank.processes import run_ranks
from tests.numerics.problems import Problem, gpt_problem
from tests.numerics.test_implicit import matrices, solve
from tests.unit.test_engine_step import SETTINGS

TASKS, STEPS = 4, 2
MICRO_BATCHES = (1, 2, 4)
BUCKET_BYTES = 2048  # a handful of the problem's tensors: theta takes about ten buckets
Curve = list[dict[str, float]]


class Lockstep(Replicated):
    """Ranks that could do without each other, and fill up with dummies all the same."""

    is_lockstep = True


def problem() -> Problem:
    return gpt_problem(
        step_weights=(0.0, 0.0, 1.0),
        grain="per_tensor_per_step",
        backbone=True,
        num_tasks=TASKS * STEPS,
        tied_embeddings=True,
    )


def own_tasks(batch: TaskBatch, step: int, num_tasks: int, sharding: Replicated) -> TaskBatch | None:
    """This rank's share of the tasks of an outer step."""
    share = share_of_rank(num_tasks, sharding.rank, sharding.world_size, is_lockstep=sharding.is_lockstep)
    rows = [step * num_tasks + position for position in share.positions]
    if not rows:
        return None

    def picked(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in part.items()}

    weights = torch.tensor([1.0] * len(rows), dtype=torch.float64)
    weights[len(rows) - share.num_dummies :] = 0.0
    return TaskBatch(
        tuple(batch.numbers[row] for row in rows),
        picked(batch.support),
        picked(batch.query),
        weights=weights if share.num_dummies else None,
    )


def train(
    sharding: Replicated, micro_batch: int, *, num_tasks: int = TASKS, estimator: str = "rematerialized"
) -> tuple[Curve, dict[str, Tensor]]:
    """What some outer steps log, and the meta-parameters after them."""
    made = problem()
    algorithm = Maml(made.unroll, HYPERGRADIENTS[estimator]())
    outer = OuterOptimizer(made.meta, dataclasses.replace(SETTINGS, lr=0.05, lr_rates=0.05), sharding)
    combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    scaler = LossScaler(Precision("float64"))
    curve = []
    for step in range(STEPS):
        batch = own_tasks(made.batch, step, num_tasks, sharding)
        tasks = StepTasks(batch, num_tasks, micro_batch)
        curve.append(outer_step(tasks, algorithm, combiner, outer, scaler))
    return curve, outer.meta


def on_this_rank(num_tasks: int) -> dict[str, tuple[Curve, dict[str, Tensor]]]:
    """Every way to spread the tasks over the ranks of this world, by name."""
    return {
        f"{kind.__name__}, micro-batches of {micro_batch}": train(
            kind(bucket_bytes=BUCKET_BYTES), micro_batch, num_tasks=num_tasks
        )
        # They differ where tasks do not divide by ranks.
        for kind in ([Replicated, Lockstep] if num_tasks % Replicated().world_size else [Replicated])
        for micro_batch in MICRO_BATCHES
        if micro_batch <= num_tasks
    }


@functools.cache
def on_one_rank(num_tasks: int) -> Curve:
    return train(Replicated(), num_tasks, num_tasks=num_tasks)[0]


# Three ranks have two tasks, one and one; and of the two tasks on four ranks, two have none.
@pytest.mark.parametrize(("world_size", "num_tasks"), [(1, 4), (2, 4), (3, 4), (4, 4), (4, 2)])
def test_neither_ranks_nor_micro_batches_change_the_loss_curve(world_size: int, num_tasks: int) -> None:
    expected = on_one_rank(num_tasks)
    assert min(metrics["gradient_norm"] for metrics in expected) > 0.1  # the update is one that can be seen
    results = [on_this_rank(num_tasks)] if world_size == 1 else run_ranks(world_size, on_this_rank, num_tasks)
    for name, (curve, meta) in results[0].items():
        for step, metrics in enumerate(curve):
            # The same sums in another order, in float64, and two steps of plain gradient descent.
            assert metrics == pytest.approx(expected[step], rel=1e-11), f"{name}, step {step}"
        for others in results[1:]:
            assert others[name][0] == curve, name
            for parameter, value in meta.items():
                assert torch.equal(others[name][1][parameter], value), f"{name}: {parameter}"


# ---------------------------------------------------------------- what crosses ranks, and when


def events_of_a_step(num_tasks: int, micro_batch: int, bucket_bytes: int) -> list[tuple[str, int]]:
    """What one outer step does, in order: backward passes that begin and end, and all-reduces of so many
    numbers."""
    events: list[tuple[str, int]] = []
    plain_grad, plain_reduce = torch.autograd.grad, dist.all_reduce

    def grad(*args: Any, **options: Any) -> Any:
        events.append(("begin", 0))
        result = plain_grad(*args, **options)
        events.append(("end", 0))
        return result

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        events.append(("all_reduce", tensor.numel()))
        return plain_reduce(tensor, *args, **options)

    made = problem()
    sharding = Replicated(bucket_bytes=bucket_bytes)
    algorithm = Maml(made.unroll, HYPERGRADIENTS["rematerialized"]())
    outer = OuterOptimizer(made.meta, SETTINGS, sharding)
    combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    tasks = StepTasks(own_tasks(made.batch, 0, num_tasks, sharding), num_tasks, micro_batch)
    torch.autograd.grad, dist.all_reduce = grad, all_reduce
    try:
        outer_step(tasks, algorithm, combiner, outer, LossScaler(Precision("float64")))
    finally:
        torch.autograd.grad, dist.all_reduce = plain_grad, plain_reduce
    return events


def events_of_steps(cases: list[tuple[int, int, int]]) -> list[list[tuple[str, int]]]:
    return [events_of_a_step(*case) for case in cases]


def test_gradients_cross_ranks_once_in_buckets_while_the_last_micro_batch_is_computed() -> None:
    num_numbers = sum(value.numel() for value in problem().meta.values())
    # Meta-loss, loss, accuracy, tasks that are not finite or left out: a collective of their own.
    num_metrics = 5
    whole = num_numbers * 8
    cases = [(4, 2, BUCKET_BYTES), (4, 1, BUCKET_BYTES), (1, 1, BUCKET_BYTES), (4, 2, whole)]
    ranks = run_ranks(2, events_of_steps, cases)
    for case, events in enumerate(ranks[0]):
        sent = [place for place, (what, _) in enumerate(events) if what == "all_reduce"]
        sizes = [events[place][1] for place in sent]
        # Every number once, and the metrics.
        assert sum(sizes[:-1]) == num_numbers
        assert sizes[-1] == num_metrics
        assert sizes == [size for what, size in ranks[1][case] if what == "all_reduce"]
        passes = [place for place, (what, _) in enumerate(events) if what == "end"]
        if cases[case][2] == whole:
            assert len(sent) == 2
            continue
        assert len(sizes) > 5
        # Not before the last micro-batch, which has as many passes as the one before it...
        num_micro_batches = 2 if cases[case][:2] == (4, 1) else 1
        assert sent[0] > passes[len(passes) * (num_micro_batches - 1) // num_micro_batches]
        # ... and most of it in the midst of its last pass over the model.
        within = [place for place in sent if is_within_a_pass(events, place)]
        assert sum(events[place][1] for place in within) > 0.5 * num_numbers
    # A rank without tasks sends its zeros at once.
    assert [what for what, _ in ranks[1][2]] == ["all_reduce"] * len(ranks[1][2])


def is_within_a_pass(events: list[tuple[str, int]], place: int) -> bool:
    before = [what for what, _ in events[:place]]
    return before.count("begin") > before.count("end")


# ---------------------------------------------------------------- solvers in lockstep


def solve_in_lockstep(tolerance: float) -> tuple[Tensor, Tensor, int]:
    """This rank's solution, that of a solver on its own, and how many products were made together."""
    sharding = Lockstep()
    a, b = matrices(1e3, num_tasks=2)
    if sharding.rank == 0:
        a = 2.0 * torch.eye(a.shape[1], dtype=torch.float64).expand_as(a)  # one iteration is enough
    elif sharding.rank == 1:
        b = torch.zeros_like(b)  # none is needed
    num_products = 0

    def multiply(vectors: Tensor) -> Tensor:
        nonlocal num_products
        num_products += 1
        dist.barrier()  # a product is a collective
        return torch.einsum("tij,tj->ti", a, vectors)

    together = ConjugateGradient(30, tolerance, sharding.any_rank).solve(multiply, b)
    alone = solve(ConjugateGradient(30, tolerance), a, b)
    return together.x, alone.x, num_products


def test_ranks_that_converge_at_different_iterations_stop_together_with_their_own_solutions() -> None:
    results = run_ranks(3, solve_in_lockstep, 1e-8)
    assert len({num_products for _, _, num_products in results}) == 1
    assert 10 < results[0][2] < 30
    for together, alone, _ in results:
        assert torch.equal(together, alone)
