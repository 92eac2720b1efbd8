"""Reptile against a loop written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import grad

from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.rates import Grain
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.errors import CapabilityError
from tests.numerics.end_problems import logistic_end_problem
from tests.numerics.problems import assert_gradients_agree, conv4_problem, gpt_problem, last, relative_error

RATE, STEPS = 0.3, 4


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_it_is_the_sum_over_tasks_of_the_start_minus_the_end_of_a_loop_by_hand(momentum: float) -> None:
    problem = logistic_end_problem(rule=Sgd(momentum=momentum), num_steps=STEPS, rate=RATE)
    omega, total, losses = problem.meta[problem.omega], torch.zeros_like(problem.start()), []
    for task in range(problem.batch.num_tasks):
        phi, velocity = problem.start(), torch.zeros_like(problem.start())
        for _ in range(STEPS):
            velocity = momentum * velocity + grad(problem.inner)(phi, omega, task)
            phi = phi - RATE * velocity
        total = total + problem.start() - phi
        losses.append(float(problem.outer(phi, omega, task)))
    expected = problem.named(total, omega)
    del expected[problem.omega]
    alone = problem.learning("init.")
    actual = Reptile().meta_gradient(alone.unroll, alone.meta, alone.batch)
    assert_gradients_agree(actual.gradient, expected, rtol=1e-12)
    assert actual.losses.tolist() == pytest.approx(losses, rel=1e-12)
    exact = Unrolled().meta_gradient(alone.unroll, alone.meta, alone.batch)
    assert actual.metrics.keys() == exact.metrics.keys()
    for name, value in exact.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-12, atol=0.0)
    for name, value in exact.gradient.items():
        assert relative_error(actual.gradient[name], value) > 0.1, name


def test_query_data_does_not_move_the_initialisation() -> None:
    problem = conv4_problem(step_weights=last(2))
    before = Reptile().meta_gradient(problem.unroll, problem.meta, problem.batch)
    inputs, targets = problem.batch.query["inputs"] + 1.0, problem.batch.query["targets"]
    batch = dataclasses.replace(problem.batch, query={"inputs": inputs, "targets": targets})
    after = Reptile().meta_gradient(problem.unroll, problem.meta, batch)
    assert all(torch.equal(after.gradient[name], value) for name, value in before.gradient.items())
    assert not torch.equal(after.losses, before.losses)


def test_an_outer_step_of_rate_one_goes_to_the_mean_of_the_adapted_weights() -> None:
    problem = gpt_problem(step_weights=last(3), num_tasks=3)
    gradient = Reptile().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
    fast, state = problem.unroll.start(problem.meta, 3)
    for step in range(3):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in fast.items()}
        fast, state = problem.unroll.inner_step(
            problem.meta, leaves, state, problem.batch, step, create_graph=False
        )
    for name, value in fast.items():
        moved = problem.meta[f"init.{name}"] - gradient[f"init.{name}"] / 3
        torch.testing.assert_close(moved, value.detach().mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["backbone", "rates"])
def test_everything_but_the_initialisation_is_refused(kind: str) -> None:
    grain: Grain = "shared" if kind == "rates" else "none"
    problem = gpt_problem(step_weights=last(1), backbone=kind == "backbone", grain=grain)
    words = {"backbone": "the backbone", "rates": "learned inner rates"}[kind]
    with pytest.raises(CapabilityError, match=f"reptile gives no gradient of {words}: it moves the init"):
        Reptile().meta_gradient(problem.unroll, problem.meta, problem.batch)


def test_a_meta_loss_with_terms_at_earlier_steps_is_refused() -> None:
    problem = conv4_problem(step_weights=(0.0, 0.5, 0.5))
    with pytest.raises(CapabilityError, match="reptile looks at the fully adapted weights alone"):
        Reptile().meta_gradient(problem.unroll, problem.meta, problem.batch)
