"""The inner rule and its rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd, clip_per_task

T = 3
SHAPES = {"weight": (T, 4, 2), "bias": (T, 4)}


def noise(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_equals_torchs_sgd_over_several_steps(momentum: float, weight_decay: float) -> None:
    rule = Sgd(momentum=momentum, weight_decay=weight_decay)
    fast = noise(0)
    rates = {"weight": torch.tensor(0.1), "bias": torch.tensor(0.03)}
    parameters = {name: value.clone().requires_grad_() for name, value in fast.items()}
    optimizer = torch.optim.SGD(
        [{"params": [parameters[name]], "lr": float(rates[name])} for name in fast],
        lr=1.0,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    state = rule.init_state(fast)
    for step in range(5):
        grads = noise(step + 1)
        fast, state = rule.update(fast, state, grads, rates)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
        for name, value in fast.items():
            # The rates above are float32 numbers; the rest is the same arithmetic.
            torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-14, atol=1e-14)


def test_clipping_is_that_of_torch_for_each_task_alone() -> None:
    grads = noise(1)
    grads = {
        name: value * torch.tensor([0.01, 1.0, 5.0]).view(T, *(1,) * (value.ndim - 1))
        for name, value in grads.items()
    }
    clipped = clip_per_task(grads, 1.5)
    for task in range(T):
        parameters = [torch.zeros_like(value[task]).requires_grad_() for value in grads.values()]
        for parameter, value in zip(parameters, grads.values(), strict=True):
            parameter.grad = value[task].clone()
        torch.nn.utils.clip_grad_norm_(parameters, 1.5)
        for parameter, value in zip(parameters, clipped.values(), strict=True):
            # Torch divides by the norm plus 1e-6.
            torch.testing.assert_close(value[task], parameter.grad, rtol=1e-6, atol=0)


def test_clipping_an_exactly_zero_gradient_is_zero_with_a_finite_derivative() -> None:
    grads = {
        name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()
    }
    clipped = clip_per_task(grads, 0.5)
    assert not any(value.any() for value in clipped.values())
    total = torch.stack([value.sum() for value in clipped.values()]).sum()
    for derivative in torch.autograd.grad(total, list(grads.values())):
        assert torch.equal(derivative, torch.ones_like(derivative))


def test_sgd_keeps_no_state_without_momentum() -> None:
    assert Sgd(weight_decay=0.1).init_state(noise(0)) == {}
    assert Sgd(momentum=0.5).init_state(noise(0)).keys() == SHAPES.keys()


def test_sgd_leaves_its_arguments_as_they_were() -> None:
    rule = Sgd(momentum=0.5, weight_decay=0.1)
    fast, grads = noise(0), noise(1)
    state = rule.init_state(fast)
    rule.update(fast, state, grads, dict.fromkeys(fast, torch.tensor(0.1)))
    assert all(torch.equal(fast[name], noise(0)[name]) for name in fast)
    assert all(torch.equal(grads[name], noise(1)[name]) for name in grads)
    assert all(not value.any() for value in state.values())


@pytest.mark.parametrize(
    ("grain", "shapes"),
    [
        ("none", {}),
        ("shared", {"rates.shared": ()}),
        ("per_tensor", {"rates.weight": (), "rates.bias": ()}),
        ("per_tensor_per_step", {"rates.weight": (4,), "rates.bias": (4,)}),
    ],
)
def test_learned_rates_are_logarithms_in_the_shapes_of_their_grain(
    grain: Grain, shapes: dict[str, tuple[int, ...]]
) -> None:
    like = torch.zeros((), dtype=torch.float64)
    meta = Rates(0.05, grain, 4).meta_parameters(SHAPES, like)
    assert {name: tuple(value.shape) for name, value in meta.items()} == shapes
    for value in meta.values():
        assert value.dtype == torch.float64
        assert value.flatten().tolist() == pytest.approx([math.log(0.05)] * value.numel())


@pytest.mark.parametrize("grain", ["none", "shared", "per_tensor", "per_tensor_per_step"])
def test_every_grain_starts_at_the_initial_rate(grain: Grain) -> None:
    rates, fast = Rates(0.05, grain, 3), noise(0)
    meta = rates.meta_parameters(fast, fast["bias"])
    for step in range(5):
        at_step = rates.at(meta, fast, step)
        assert at_step.keys() == fast.keys()
        assert [float(value) for value in at_step.values()] == pytest.approx([0.05, 0.05], rel=1e-15)


def test_rates_per_step_are_read_in_order_and_later_steps_reuse_the_last() -> None:
    rates, fast = Rates(0.1, "per_tensor_per_step", 3), noise(0)
    values = {"weight": [0.1, 0.2, 0.3], "bias": [0.4, 0.5, 0.6]}
    meta = {f"rates.{name}": torch.tensor(value).double().log() for name, value in values.items()}
    for step, column in enumerate([0, 1, 2, 2, 2]):
        at_step = rates.at(meta, fast, step)
        assert float(at_step["weight"]) == pytest.approx(values["weight"][column])
        assert float(at_step["bias"]) == pytest.approx(values["bias"][column])


def test_a_shared_rate_and_rates_per_tensor_reach_the_fast_weights_they_name() -> None:
    fast = noise(0)
    shared = Rates(0.1, "shared", 2).at({"rates.shared": torch.tensor(0.3).log()}, fast, 1)
    assert [float(value) for value in shared.values()] == pytest.approx([0.3, 0.3])
    meta = {"rates.bias": torch.tensor(0.2).log(), "rates.weight": torch.tensor(0.7).log()}
    apart = Rates(0.1, "per_tensor", 2).at(meta, fast, 1)
    assert float(apart["weight"]) == pytest.approx(0.7)
    assert float(apart["bias"]) == pytest.approx(0.2)
