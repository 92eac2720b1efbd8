"""Truncated back-propagation against a whole graph whose earlier steps count as the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.sweep import AdjointSweep
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.snapshots import Binomial
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, relative_error
from tests.numerics.token_problems import distance, hypergradient, transformer_problem

K = 4
# Terms before and after every place of truncation.
WEIGHTS = (0.2, 0.5, 0.0, 0.3, 1.0)
EXACT_SWEEPS: tuple[AdjointSweep, ...] = (Rematerialized(), MixedMode())
RULES: dict[str, InnerRule] = {
    "momentum": Sgd(GradientTerms(weight_decay=0.1), momentum=0.6),
    "proximal": Sgd(GradientTerms(proximal=0.3), momentum=0.6),  # s_0 depends on theta
}


def problem_of(rule: str) -> Problem:
    return transformer_problem(
        step_weights=WEIGHTS, grain="per_tensor_per_step", backbone=True, rule=RULES[rule]
    )


def as_identity(value: Tensor, first: Tensor) -> Tensor:
    """The value, whose derivative is that of `first`."""
    return first + (value - first).detach()


def by_the_whole_graph(problem: Problem, num_steps: int) -> dict[str, Tensor]:
    """d/dtheta where the steps before the last `num_steps` have the identity as their Jacobian."""
    unroll, batch = problem.unroll, problem.batch
    theta = {name: value.detach().requires_grad_() for name, value in problem.meta.items()}
    fast, state = first_fast, first_state = unroll.start(theta, batch.num_tasks)
    total = torch.zeros((), dtype=torch.float64)
    for step in range(K + 1):
        if step > 0:
            fast, state = unroll.inner_step(theta, fast, state, batch, step - 1, create_graph=True)
        if step <= K - num_steps:
            fast = {name: as_identity(value, first_fast[name]) for name, value in fast.items()}
            state = {name: as_identity(value, first_state[name]) for name, value in state.items()}
        losses, _ = unroll.learner.losses("query", theta, fast, batch, step)
        total = total + WEIGHTS[step] * losses.sum()
    grads = torch.autograd.grad(total, list(theta.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(theta, grads, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_steps", range(K))
@pytest.mark.parametrize("exact", EXACT_SWEEPS, ids=["rematerialized", "mixed_mode"])
def test_truncated_equals_a_graph_with_the_identity_for_earlier_steps(
    rule: str, num_steps: int, exact: AdjointSweep
) -> None:
    problem = problem_of(rule)
    actual = hypergradient(problem, Truncated(num_steps=num_steps, exact=exact))
    expected = by_the_whole_graph(problem, num_steps)
    for name, value in expected.items():
        # Sums in another order; the rates of earlier steps have no gradient at all.
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-13)
    assert any(float(value.abs().max()) > 1e-3 for value in expected.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_steps", [K, K + 3])
def test_truncated_at_all_steps_is_exact(rule: str, num_steps: int) -> None:
    problem = problem_of(rule)
    expected = hypergradient(problem)
    assert distance(by_the_whole_graph(problem, K), expected) < 1e-12  # the oracle of the test above
    for exact in EXACT_SWEEPS:
        assert distance(hypergradient(problem, Truncated(num_steps=num_steps, exact=exact)), expected) < 1e-9


@pytest.mark.parametrize("num_steps", range(K))
def test_truncated_before_all_steps_differs_from_exact(num_steps: int) -> None:
    problem = problem_of("momentum")
    truncated = hypergradient(problem, Truncated(num_steps=num_steps, exact=Rematerialized()))
    # Exact estimators agree to 1e-9.
    assert distance(truncated, hypergradient(problem)) > 1e-3


def test_a_rate_of_a_step_that_is_not_differentiated_has_no_gradient() -> None:
    problem = problem_of("momentum")
    truncated = hypergradient(problem, Truncated(num_steps=2, exact=Rematerialized()))
    exact = hypergradient(problem)
    for name, value in truncated.items():
        if name.startswith("rates."):
            assert torch.equal(value[:2], torch.zeros_like(value[:2])), name
            assert relative_error(value[2:], exact[name][2:]) < 1e-9, name


@pytest.mark.parametrize("num_graph_steps", [1, 2])
def test_truncated_with_kept_graphs_and_few_snapshots_is_the_same(num_graph_steps: int) -> None:
    problem = problem_of("proximal")
    expected = hypergradient(problem, Truncated(num_steps=2, exact=Rematerialized()))
    estimator: Hypergradient = Truncated(Binomial(1), num_graph_steps, num_steps=2, exact=Rematerialized())
    assert distance(hypergradient(problem, estimator), expected) < 1e-9


def test_truncated_refuses_to_keep_more_graphs_than_it_differentiates_steps() -> None:
    with pytest.raises(CapabilityError, match="graph of 3 inner steps is kept and 2 are differentiated"):
        Truncated(num_graph_steps=3, num_steps=2, exact=Rematerialized())
