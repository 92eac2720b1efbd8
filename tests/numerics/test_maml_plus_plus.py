"""The parts of MAML++ that change in the course of training: weights of steps, and the order of derivatives.

Shape letters: K inner steps, N outer steps of annealing.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from metaloom.engine.algorithms.maml import Maml, MultiStepAnnealing
from metaloom.engine.hypergradients import HYPERGRADIENTS
from tests.numerics.problems import conv4_problem, last


def weights_by_the_authors_code(num_steps: int, num_epochs: int, epoch: int) -> list[float]:
    """What `get_per_step_loss_importance_vector` of the authors' code says of an epoch, and what its training
    loop makes of it from `num_epochs` on; of steps 1 .. K."""
    if epoch >= num_epochs:
        return [0.0] * (num_steps - 1) + [1.0]
    weights = [1.0 / num_steps] * num_steps
    decay = 1.0 / num_steps / num_epochs
    floor = 0.03 / num_steps
    for row in range(num_steps - 1):
        weights[row] = max(weights[row] - epoch * decay, floor)
    weights[-1] = min(weights[-1] + epoch * (num_steps - 1) * decay, 1.0 - (num_steps - 1) * floor)
    return weights


@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize("outer_step", [0, 1, 7, 9, 10, 11, 100])
def test_annealed_weights_are_those_of_the_authors_code(num_steps: int, outer_step: int) -> None:
    before, *weights = MultiStepAnnealing(10).step_weights(num_steps, outer_step)
    assert before == 0.0
    assert weights == pytest.approx(weights_by_the_authors_code(num_steps, 10, outer_step), abs=1e-15)
    assert sum(weights) == pytest.approx(1.0, abs=1e-15)


def test_the_floor_of_early_steps_is_reached_before_the_end() -> None:
    _, first, _ = MultiStepAnnealing(100).step_weights(2, 99)
    assert first == pytest.approx(0.015, abs=1e-15)


@pytest.mark.parametrize("outer_step", [0, 3, 4, 9])
def test_an_outer_step_takes_the_weights_of_its_time(outer_step: int) -> None:
    problem = conv4_problem(step_weights=(0.0, 0.5, 0.5))
    algorithm = Maml(problem.unroll, HYPERGRADIENTS["rematerialized"](), annealing=MultiStepAnnealing(4))
    found = algorithm.meta_gradient(problem.meta, problem.batch, outer_step=outer_step)
    weights = (0.0, *weights_by_the_authors_code(2, 4, outer_step))
    fixed = dataclasses.replace(problem.unroll, step_weights=weights)
    expected = HYPERGRADIENTS["unrolled"]().meta_gradient(fixed, problem.meta, problem.batch)
    for name, value in expected.gradient.items():
        assert torch.allclose(found.gradient[name], value, rtol=1e-9, atol=1e-12)


def test_derivatives_are_of_first_order_until_their_time_and_exact_from_then_on() -> None:
    problem = conv4_problem(step_weights=last(2))
    first_order, exact = HYPERGRADIENTS["first_order"](), HYPERGRADIENTS["unrolled"]()
    algorithm = Maml(problem.unroll, exact, first_order=first_order, num_first_order=3)
    expected = {
        outer_step: estimator.meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        for outer_step, estimator in ((0, first_order), (2, first_order), (3, exact), (50, exact))
    }
    for outer_step, gradient in expected.items():
        found = algorithm.meta_gradient(problem.meta, problem.batch, outer_step=outer_step).gradient
        for name, value in gradient.items():
            assert torch.equal(found[name], value)
    # The two differ, so that the test can tell them apart.
    assert any(not torch.allclose(expected[0][name], expected[3][name], rtol=1e-3) for name in problem.meta)
