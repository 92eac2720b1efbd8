"""SAMA's finite-difference hypergradient against dense mixed derivatives and hand-written rules.

Shape letters: T tasks, D fast weights of one task, E backbone weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Rehearsal, TaskBatch
from metaloom.errors import CapabilityError
from tests.numerics.end_problems import EndProblem, dense, flat, logistic_end_problem, quadratic_end_problem
from tests.numerics.problems import (
    assert_gradients_agree,
    conv4_problem,
    gpt_problem,
    last,
    relative_error,
)

RATE = 0.3
CLIP = 0.1

# (phi_{K-1} - phi_0, g_{K-1}, g_0 .. g_{K-2}), of one task, [D] -> what the last step adds to phi, up to a
# constant.
Step = Callable[[Tensor, Tensor, list[Tensor]], Tensor]
EPS = 1e-8


def descend(way: Tensor, slope: Tensor, earlier: list[Tensor]) -> Tensor:
    return -RATE * slope


def descend_by_adam(way: Tensor, slope: Tensor, earlier: list[Tensor]) -> Tensor:
    """Kingma and Ba 2015, algorithm 1, with an epsilon under the root."""
    first = second = torch.zeros_like(slope)
    for gradient in (*earlier, slope):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    count = len(earlier) + 1
    return -RATE * first / (1 - 0.9**count) / ((second / (1 - 0.999**count) + EPS).sqrt() + EPS)


def descend_by_rmsprop(way: Tensor, slope: Tensor, earlier: list[Tensor]) -> Tensor:
    average = torch.zeros_like(slope)
    for gradient in (*earlier, slope):
        average = 0.99 * average + 0.01 * gradient**2
    return -RATE * slope / ((average + EPS).sqrt() + EPS)


def descend_clipped(way: Tensor, slope: Tensor, earlier: list[Tensor]) -> Tensor:
    """With the proximal term, where the clipping is active."""
    pulled = slope + 0.1 * way
    step: Tensor = -RATE * pulled * CLIP / torch.linalg.vector_norm(pulled)
    return step


RULES: dict[str, tuple[InnerRule, Step]] = {
    "plain": (Sgd(), descend),
    # One step's gradient enters the momentum once, undamped: the same derivative.
    "momentum, decay": (Sgd(GradientTerms(weight_decay=0.1), momentum=0.7), descend),
    "adam": (Adam(eps=EPS, eps_root=EPS), descend_by_adam),
    "adamw": (
        Adam(eps=EPS, eps_root=EPS, decoupled_weight_decay=0.1),
        descend_by_adam,
    ),
    "rmsprop": (RmsProp(alpha=0.99, eps=EPS, eps_root=EPS), descend_by_rmsprop),
    "clipped, proximal": (Sgd(GradientTerms(clip_norm=CLIP, proximal=0.1), momentum=0.5), descend_clipped),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def estimate(problem: EndProblem, epsilon: float = 0.01) -> MetaGradient:
    estimator = FiniteDifference(epsilon)
    return estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)


def by_definition(problem: EndProblem, step: Step) -> dict[str, Tensor]:
    """`dLq/domega + M J^T v` and `v`, summed over tasks: J the last step's Jacobian by its gradient, which
    is taken at phi_{K-1}; M and v at phi_K. Dense."""
    init = torch.zeros_like(problem.start())
    omega = torch.zeros_like(problem.meta[problem.omega].flatten())
    path = [flat(at.fast) for at in problem.path()]
    for task, phi in enumerate(problem.adapted()):
        at = dense(problem, phi, task)
        *earlier, slope = (dense(problem, phi_k[task], task).inner_slope for phi_k in path[:-1])
        assert step is not descend_clipped or float(torch.linalg.vector_norm(slope)) > 1.2 * CLIP  # active
        jacobian = jacrev(step, argnums=1)(path[-2][task] - problem.start(), slope, earlier)
        init = init + at.query_slope
        omega = omega + at.query_omega + at.mixed @ jacobian.T @ at.query_slope
    return problem.named(init, omega)


@every_rule
def test_where_the_inner_loss_is_quadratic_it_equals_its_definition(rule: str) -> None:
    inner_rule, step = RULES[rule]
    problem = quadratic_end_problem(rule=inner_rule, rate=RATE)
    # A central difference of a linear function is exact at any distance, up to rounding of 1e-16 / epsilon.
    for epsilon in (1e-4, 1.0):
        assert_gradients_agree(estimate(problem, epsilon).gradient, by_definition(problem, step), rtol=1e-10)


@every_rule
def test_elsewhere_the_error_falls_with_the_square_of_epsilon(rule: str) -> None:
    inner_rule, step = RULES[rule]
    problem = logistic_end_problem(rule=inner_rule, rate=RATE)
    expected = by_definition(problem, step)
    errors = [
        relative_error(estimate(problem, epsilon).gradient[problem.omega], expected[problem.omega])
        for epsilon in (0.4, 0.2, 0.1, 0.05)
    ]
    assert errors[0] > 1e-5  # far above rounding
    for coarse, fine in itertools.pairwise(errors):
        # The next term of the series is of the fourth order.
        assert coarse / fine == pytest.approx(4.0, rel=0.1)
    # Rounding of 1e-16 / 1e-4, and the square of 1e-4.
    finest = estimate(problem, 1e-4).gradient
    assert_gradients_agree(finest, expected, rtol=1e-8)
    assert_gradients_agree(
        {n: finest[n] for n in finest if n != problem.omega},
        {n: v for n, v in expected.items() if n != problem.omega},
        rtol=1e-12,
    )


def test_the_distance_has_no_effect_where_the_initialisation_alone_is_learned() -> None:
    # Which is why a recipe that sets it there is refused.
    problem = logistic_end_problem(rule=Sgd(), rate=RATE)
    alone = problem.learning("init.")
    near, far = estimate(alone, 1e-4).gradient, estimate(alone, 1.0).gradient
    assert all(torch.equal(near[name], value) for name, value in far.items())
    everything = estimate(problem, 1e-4).gradient, estimate(problem, 1.0).gradient
    assert not torch.equal(everything[0][problem.omega], everything[1][problem.omega])


def test_the_inner_loss_is_that_of_the_last_step() -> None:
    mixed = Rehearsal(ratio=0.4, num_samples=1)
    for num_steps in (2, 3):
        problem = quadratic_end_problem(rule=Sgd(), num_steps=num_steps, rehearsal=mixed, rate=RATE)
        assert_gradients_agree(estimate(problem).gradient, by_definition(problem, descend), rtol=1e-10)


def test_every_task_is_moved_by_epsilon_whatever_the_length_of_its_vector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = logistic_end_problem(rule=Sgd(), rate=RATE)
    end, moved = problem.adapted(), []
    losses = type(problem.unroll.learner).losses

    def record(
        self: object,
        objective: str,
        meta: object,
        fast: dict[str, Tensor],
        *rest: object,
        derivative: str = "once",
    ) -> object:
        vectors = torch.cat([value.detach().flatten(1) for value in fast.values()], dim=1)
        distance = torch.linalg.vector_norm(vectors - end, dim=1)
        if objective == "support" and float(distance.max()) < 0.0051:
            moved.append(distance)
        return losses(self, objective, meta, fast, *rest, derivative=derivative)  # type: ignore[arg-type]

    monkeypatch.setattr(type(problem.unroll.learner), "losses", record)
    estimate(problem, 0.005)
    assert len(moved) == 2
    for distances in moved:
        assert distances.tolist() == pytest.approx([0.005] * 3, rel=1e-9)


@pytest.mark.parametrize("make", [quadratic_end_problem, logistic_end_problem])
def test_a_batch_of_tasks_gives_the_sum_of_the_tasks_alone(make: Callable[..., EndProblem]) -> None:
    problem = make(rule=Sgd(momentum=0.5), rate=RATE)
    together = estimate(problem)
    alone = [estimate(dataclasses.replace(problem, batch=one)) for one in problem.batch.split(1)]
    for name, value in together.gradient.items():
        total = torch.stack([part.gradient[name] for part in alone]).sum(0)
        # Rounding of 1e-16 is divided by the step of 0.01.
        assert relative_error(value, total) < 1e-12, name
    torch.testing.assert_close(together.losses, torch.cat([part.losses for part in alone]))


def test_a_task_without_a_slope_adds_nothing_and_spoils_nothing() -> None:
    problem = quadratic_end_problem(rule=Sgd(), rate=RATE)
    inputs = problem.batch.query["inputs"].clone()
    inputs[1] = 0.0  # the query loss of this task is constant
    batch = TaskBatch(problem.batch.numbers, problem.batch.support, {**problem.batch.query, "inputs": inputs})
    changed = dataclasses.replace(problem, batch=batch)
    first, _, third = batch.split(1)
    expected = [estimate(dataclasses.replace(problem, batch=one)).gradient for one in (first, third)]
    actual = estimate(changed).gradient
    total = {name: expected[0][name] + expected[1][name] for name in actual}
    assert_gradients_agree(actual, total, rtol=1e-12)


@every_rule
def test_it_differs_from_the_exact_hypergradient_in_every_kind(rule: str) -> None:
    problem = logistic_end_problem(rule=RULES[rule][0], rate=RATE)
    exact = Unrolled().meta_gradient(problem.unroll, problem.meta, problem.batch)
    actual = estimate(problem)
    for name, value in exact.gradient.items():
        assert relative_error(actual.gradient[name], value) > 1e-3, name
    torch.testing.assert_close(actual.losses, exact.losses, rtol=1e-13, atol=0.0)
    for name, value in exact.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-13, atol=0.0)


def test_after_one_short_step_a_backbones_gradient_is_nearly_exact() -> None:
    """The only thing left out then is that M is taken after the step: an error of the order of the rate."""
    errors = []
    for rate in (0.02, 0.01):
        problem = logistic_end_problem(rule=Sgd(), num_steps=1, rate=rate)
        exact = Unrolled().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        query_only = by_definition(problem, lambda way, slope, earlier: 0.0 * slope)[problem.omega]
        inner_part = exact[problem.omega] - query_only
        actual = estimate(problem, 1e-4).gradient[problem.omega] - query_only
        errors.append(relative_error(actual, inner_part))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.2)


def test_it_runs_on_the_built_in_models() -> None:
    gpt = gpt_problem(step_weights=last(3), backbone=True, rehearsal=Rehearsal(0.3, 2))
    conv4 = conv4_problem(step_weights=last(3))
    for problem in (gpt, conv4):
        result = FiniteDifference().meta_gradient(problem.unroll, problem.meta, problem.batch)
        for name, value in result.gradient.items():
            assert bool(value.isfinite().all()), name
            assert float(torch.linalg.vector_norm(value)) > 0.0, name


# ---------------------------------------------------------------- refusals


def test_learned_rates_are_refused() -> None:
    problem = quadratic_end_problem(rule=Sgd(), grain="shared")
    with pytest.raises(CapabilityError, match="finite_difference gives no gradient of learned inner rates"):
        estimate(problem)


def test_a_meta_loss_with_terms_at_earlier_steps_is_refused() -> None:
    problem = quadratic_end_problem(rule=Sgd())
    unroll = dataclasses.replace(problem.unroll, step_weights=(0.5, 0.0, 0.0, 0.5))
    with pytest.raises(CapabilityError, match="finite_difference looks at the fully adapted weights alone"):
        FiniteDifference().meta_gradient(unroll, problem.meta, problem.batch)


def test_bfloat16_is_refused() -> None:
    problem = gpt_problem(step_weights=last(1), compute="bfloat16")
    with pytest.raises(CapabilityError, match="a little apart, which bfloat16 rounds to the same"):
        FiniteDifference().meta_gradient(problem.unroll, problem.meta, problem.batch)
