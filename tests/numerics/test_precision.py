"""What bfloat16 costs in the hypergradient, and that float64 is float64 throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import ComputeFormat, Precision
from metaloom.engine.unroll import adapt
from tests.numerics.problems import FOR_EVERYTHING, Problem, conv4_problem, gpt_problem, last

PROBLEMS: dict[str, Callable[[ComputeFormat], Problem]] = {
    "conv4": lambda compute: conv4_problem(step_weights=last(3), grain="shared", compute=compute),
    "gpt": lambda compute: gpt_problem(step_weights=last(3), grain="shared", backbone=True, compute=compute),
}


def gradient(problem: Problem, estimator: str) -> dict[str, Tensor]:
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    return result.gradient


def distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of whole gradients, relative."""
    one, other = (torch.cat([t.double().flatten() for t in g.values()]) for g in (actual, expected))
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def in_float64(problem: Problem, model: str) -> Problem:
    """The same problem, its meta-parameters and data converted."""
    double = PROBLEMS[model]("float64")
    meta = {name: value.double() for name, value in problem.meta.items()}

    def part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: value.double() if value.is_floating_point() else value for n, value in tensors.items()}

    batch = TaskBatch(problem.batch.numbers, part(problem.batch.support), part(problem.batch.query))
    return Problem(double.unroll, meta, batch, double.model)


both_models = pytest.mark.parametrize("model", PROBLEMS)
every_estimator = pytest.mark.parametrize("estimator", FOR_EVERYTHING)


@both_models
@every_estimator
def test_a_float32_hypergradient_is_within_1e_5_of_float64(model: str, estimator: str) -> None:
    problem = PROBLEMS[model]("float32")
    # float32 rounds at 6e-8, and batch norm of a dozen values amplifies: 3e-7 was measured.
    assert distance(gradient(problem, estimator), gradient(in_float64(problem, model), estimator)) < 1e-5


@both_models
@every_estimator
def test_a_bfloat16_hypergradient_is_within_6_percent_of_float32(model: str, estimator: str) -> None:
    exact = gradient(PROBLEMS[model]("float32"), estimator)
    rounded = gradient(PROBLEMS[model]("bfloat16"), estimator)
    # bfloat16 keeps 8 bits, so each product rounds at up to 0.4 %; through three inner steps and the
    # query, forward and backward twice, some dozens of these add up to 0.7 % (gpt) and 2.8 % (conv4,
    # where batch norm divides by small deviations). Measured; the bound is twice the larger.
    error = distance(rounded, exact)
    assert error < 0.06
    # And it does compute in bfloat16: float32 would be a thousand times nearer.
    assert error > 1e-4


@both_models
@every_estimator
@pytest.mark.parametrize(
    ("compute", "storage"),
    [("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)],
)
def test_gradients_and_fast_weights_are_in_the_storage_dtype_and_losses_in_float64(
    model: str, estimator: str, compute: ComputeFormat, storage: torch.dtype
) -> None:
    assert Precision(compute).storage_dtype == storage
    problem = PROBLEMS[model](compute)
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert {value.dtype for value in result.gradient.values()} == {storage}
    assert result.losses.dtype == torch.float64
    assert {value.dtype for value in result.metrics.values()} == {torch.float64}
    path = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=1))
    assert {value.dtype for at in path for value in at.fast.values()} == {storage}


@both_models
def test_losses_under_bfloat16_are_at_least_float32(model: str) -> None:
    problem = PROBLEMS[model]("bfloat16")
    fast = problem.unroll.learner.init(problem.meta, problem.batch.num_tasks)
    losses, _ = problem.unroll.learner.losses("query", problem.meta, fast, problem.batch, 0)
    assert losses.dtype == torch.float32


@both_models
@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "first_order"])
def test_a_callers_own_autocast_changes_nothing(model: str, estimator: str) -> None:
    problem = PROBLEMS[model]("bfloat16")
    alone = gradient(problem, estimator)
    # Autocast caches the casts of leaves until the outermost context ends; one found again in another
    # inner step would collect that step's gradient too. (Dual numbers are rounded by autocast also
    # around the backward pass, so `mixed_mode` is not the same bit for bit.)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient(problem, estimator)
    for name, value in alone.items():
        assert torch.equal(inside[name], value), name
