"""Rates that are learned as they are (Meta-SGD), and where learned rates start."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.unroll import adapt
from tests.numerics.problems import Problem, assert_gradients_agree, conv4_problem, last


def meta_sgd(num_steps: int = 2) -> Problem:
    """A rate per element, some of them negative."""
    problem = conv4_problem(step_weights=last(num_steps), grain="per_element", norm="none")
    rates = Rates(0.1, "per_element", num_steps, scale="linear")
    unroll = dataclasses.replace(problem.unroll, rates=rates)
    generator = torch.Generator().manual_seed(3)
    meta = {
        name: 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name.startswith("rates.")
        else value
        for name, value in problem.meta.items()
    }
    return dataclasses.replace(problem, unroll=unroll, meta=meta)


def meta_loss(problem: Problem, shift: dict[str, Tensor]) -> float:
    meta = {name: value + shift.get(name, 0.0) for name, value in problem.meta.items()}
    end = list(adapt(problem.unroll, meta, problem.batch, num_steps=problem.unroll.num_steps))[-1]
    losses, _ = problem.unroll.learner.losses("query", meta, end.fast, problem.batch, 0)
    return float(losses.sum())


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_the_hypergradient_of_negative_rates_too_is_the_slope_of_the_meta_loss(estimator: str) -> None:
    problem = meta_sgd()
    assert any(bool((value < 0).any()) for name, value in problem.meta.items() if name.startswith("rates."))
    gradient = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in problem.meta.items()
        if name.startswith("rates.")
    }
    slope = sum(float((gradient[name] * value).sum()) for name, value in direction.items())
    above, below = (
        meta_loss(problem, {name: sign * 1e-6 * value for name, value in direction.items()})
        for sign in (1.0, -1.0)
    )
    # Truncation falls as the square of the distance, rounding rises as its inverse: both are near 1e-9.
    assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_step_of_meta_sgd_is_the_product_of_rate_and_gradient() -> None:
    problem = meta_sgd(num_steps=1)
    start, end = adapt(problem.unroll, problem.meta, problem.batch, num_steps=1)
    leaves = {name: value.detach().requires_grad_() for name, value in start.fast.items()}
    losses, _ = problem.unroll.learner.losses("support", problem.meta, leaves, problem.batch, 0)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    for (name, value), grad in zip(start.fast.items(), grads, strict=True):
        expected = value - problem.meta[f"rates.{name}"] * grad
        torch.testing.assert_close(end.fast[name], expected, rtol=1e-12, atol=1e-15)


def test_a_logarithm_and_the_rate_itself_have_gradients_apart_by_the_rate() -> None:
    # d/d log(a) = a d/da.
    linear = conv4_problem(step_weights=last(2), grain="per_tensor")
    rates = dataclasses.replace(linear.unroll.rates, scale="linear")
    values = {
        name: value.exp() if name.startswith("rates.") else value for name, value in linear.meta.items()
    }
    estimator = HYPERGRADIENTS["rematerialized"]()
    by_log = estimator.meta_gradient(linear.unroll, linear.meta, linear.batch).gradient
    unroll = dataclasses.replace(linear.unroll, rates=rates)
    by_rate = estimator.meta_gradient(unroll, values, linear.batch).gradient
    scaled = {
        name: value * values[name] if name.startswith("rates.") else value for name, value in by_rate.items()
    }
    assert_gradients_agree(scaled, by_log, rtol=1e-11)


@pytest.mark.parametrize("grain", ["shared", "per_group", "per_tensor", "per_tensor_per_step", "per_element"])
def test_rates_that_start_spread_out_lie_between_the_two_and_follow_from_the_seed(grain: str) -> None:
    fast = {"a.weight": torch.zeros(2, 50, 40), "b.bias": torch.zeros(2, 30)}

    def started(seed: int, *, is_log: bool = False) -> dict[str, Tensor]:
        rates = Rates(
            0.5,
            grain,  # type: ignore[arg-type]
            4,
            scale="log" if is_log else "linear",
            spread=(0.005, 0.1),
            seed=seed,
        )
        return rates.meta_parameters(fast)

    one, again, other = started(0), started(0), started(1)
    for name, value in one.items():
        assert bool(((value >= 0.005) & (value <= 0.1)).all())
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        torch.testing.assert_close(started(0, is_log=True)[name].exp(), value)
    if grain == "per_element":
        values = one["rates.a.weight"].flatten()
        # Evenly: the mean of 2000 is within 5 standard errors of the middle.
        assert abs(float(values.mean()) - 0.0525) < 5 * 0.095 / math.sqrt(12 * 2000)
        assert one["rates.b.bias"][0] != one["rates.a.weight"][0, 0]


def test_rates_on_a_linear_scale_start_at_the_rate() -> None:
    rates = Rates(0.3, "shared", 2, scale="linear")
    assert rates.meta_parameters({"a": torch.zeros(1, 2)})["rates.shared"] == pytest.approx(0.3)
