"""The derivatives of the inner rules, alone and inside hypergradients, in float64.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.inner_loops.adam import COUNT, Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.unroll import adapt, leaves
from tests.numerics.problems import (
    RATE,
    Problem,
    assert_gradients_agree,
    conv4_problem,
    gpt_problem,
    last,
    relative_error,
)

T = 2
SHAPES = {"w": (T, 3, 2), "b": (T, 2)}
ADAM_STEP = 1e-4 + 1e-8  # sqrt(eps_root) + eps: what Adam and RMSProp divide by at a zero gradient
CLIP = 1.0  # active: all gradients that are drawn here are longer

Rule = Sgd | Adam | RmsProp
RULES: dict[str, Rule] = {
    "sgd": Sgd(),
    "sgd, all but clipping": Sgd(GradientTerms(weight_decay=0.05, proximal=0.3), momentum=0.7),
    "sgd, all": Sgd(GradientTerms(weight_decay=0.05, clip_norm=CLIP, proximal=0.3), momentum=0.7),
    "nesterov": Sgd(momentum=0.7, nesterov=True),
    "nesterov, all": Sgd(
        GradientTerms(weight_decay=0.05, clip_norm=CLIP, proximal=0.3), momentum=0.7, nesterov=True
    ),
    "adam": Adam(),
    "adam, all": Adam(GradientTerms(weight_decay=0.05, clip_norm=CLIP, proximal=0.3), betas=(0.8, 0.95)),
    "adamw": Adam(decoupled_weight_decay=0.05),
    "adamw, all": Adam(
        GradientTerms(clip_norm=CLIP, proximal=0.3), betas=(0.8, 0.95), decoupled_weight_decay=0.05
    ),
    "rmsprop": RmsProp(),
    "rmsprop, centered": RmsProp(alpha=0.9, centered=True),
    "rmsprop, all": RmsProp(
        GradientTerms(weight_decay=0.05, clip_norm=CLIP, proximal=0.3), alpha=0.9, momentum=0.6, centered=True
    ),
}
AFFINE = {"sgd", "sgd, all but clipping", "nesterov"}


# ---------------------------------------------------------------- one update


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a rule is differentiated: (phi, s, g, rates)."""

    fast: dict[str, Tensor]
    state: dict[str, Tensor]
    grads: dict[str, Tensor]
    rates: dict[str, Tensor]

    def parts(self) -> tuple[dict[str, Tensor], ...]:
        return self.fast, self.state, self.grads, self.rates


def point(rule: InnerRule, *, per_element: bool) -> Point:
    """After two steps, so that the state is a reachable one, and no entry of it zero."""
    generator = torch.Generator().manual_seed(4)

    def noise(prefix: int) -> dict[str, Tensor]:
        shapes = {name: shape[prefix:] for name, shape in SHAPES.items()}
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    logs = noise(1)
    rates = {name: (0.3 * logs[name] - 1.5).exp() for name in SHAPES}
    if not per_element:
        rates = {name: value.mean() for name, value in rates.items()}
    fast = noise(0)
    state = rule.init_state(fast)
    for _ in range(2):
        fast, state = rule.update(fast, state, noise(0), rates)
    return Point(fast, state, noise(0), rates)


def flat_update(rule: InnerRule, at: Point) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """`update` as a function of a flat list of tensors, and that list at a point. Adam's step count is no
    variable and stays what it is."""
    parts = at.parts()
    names = [(number, name) for number, part in enumerate(parts) for name in part if name != COUNT]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = [dict(part) for part in parts]
        for (number, name), tensor in zip(names, tensors, strict=True):
            arguments[number][name] = tensor
        fast, state = rule.update(*arguments)
        return (*fast.values(), *(value for name, value in state.items() if name != COUNT))

    return function, [parts[number][name].clone().requires_grad_() for number, name in names]


@pytest.mark.parametrize("per_element", [False, True], ids=["scalar rates", "rates per element"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rules_derivatives_by_weights_state_gradient_and_rates_are_right(
    rule: str, per_element: bool
) -> None:
    function, tensors = flat_update(RULES[rule], point(RULES[rule], per_element=per_element))
    assert torch.autograd.gradcheck(function, tensors, eps=1e-7, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("rule", [name for name in RULES if name.startswith("sgd") or "nesterov" in name])
def test_gradient_descents_derivatives_are_right_at_an_exactly_zero_gradient_and_state(rule: str) -> None:
    function, tensors = flat_update(RULES[rule], zero_point(RULES[rule]))
    assert torch.autograd.gradcheck(function, tensors, eps=1e-7, atol=1e-7, rtol=1e-5)


def zero_point(rule: InnerRule) -> Point:
    """The first step of a weight whose gradient is exactly zero."""
    at = point(rule, per_element=True)
    zeros = {name: torch.zeros_like(value) for name, value in at.grads.items()}
    return Point(at.fast, rule.init_state(at.fast), zeros, at.rates)


def jacobians(rule: InnerRule, at: Point) -> dict[str, Tensor]:
    """The diagonals of d phi' / d (phi, s, g, rates) for the weight `w`, by what is differentiated by:
    these rules move each number by itself."""
    arguments = [
        {name: value.detach().clone().requires_grad_() for name, value in part.items()} for part in at.parts()
    ]
    fast, _ = rule.update(*arguments)
    names = [(n, name) for n, part in enumerate(arguments) for name in part if name.rpartition("/")[2] == "w"]
    derivatives = torch.autograd.grad(
        fast["w"].sum(), [arguments[n][name] for n, name in names], allow_unused=True, materialize_grads=True
    )
    kinds = ("phi", "", "g", "rate")
    return {
        kinds[number] or name.partition("/")[0]: value
        for (number, name), value in zip(names, derivatives, strict=True)
    }


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adams_derivatives_at_an_exactly_zero_gradient_and_state_equal_the_closed_form(decay: float) -> None:
    rule = Adam(betas=(0.8, 0.95), decoupled_weight_decay=decay)
    at = zero_point(rule)
    rate = at.rates["w"].expand(SHAPES["w"])
    actual = jacobians(rule, at)
    # m_hat = (0.8 m + 0.2 g) / 0.2, over a root that is flat in g and, m being 0, without a part in v.
    expected = {
        "phi": 1.0 - rate * decay,
        "first_moment": -rate * 4.0 / ADAM_STEP,
        "second_moment": torch.zeros_like(rate),
        "g": -rate / ADAM_STEP,
        "rate": -decay * at.fast["w"].sum(0),
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprops_derivatives_at_an_exactly_zero_gradient_and_state_equal_the_closed_form(
    centered: bool,
) -> None:
    rule = RmsProp(momentum=0.6, centered=centered)
    at = zero_point(rule)
    rate = at.rates["w"].expand(SHAPES["w"])
    expected = {
        "phi": torch.ones_like(rate),
        "square_average": torch.zeros_like(rate),
        "momentum": -0.6 * rate,
        "g": -rate / ADAM_STEP,
        "rate": torch.zeros_like(at.rates["w"]),
    } | ({"average": torch.zeros_like(rate)} if centered else {})
    actual = jacobians(rule, at)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_every_derivative_at_an_exactly_zero_gradient_and_state_is_finite(rule: str) -> None:
    assert all(
        bool(value.isfinite().all()) for value in jacobians(RULES[rule], zero_point(RULES[rule])).values()
    )


@pytest.mark.parametrize("rule", [Adam(eps_root=0.0), RmsProp(eps_root=0.0)], ids=["adam", "rmsprop"])
def test_without_an_epsilon_under_the_root_the_derivative_at_a_zero_gradient_is_not_a_number(
    rule: InnerRule,
) -> None:
    assert bool(jacobians(rule, zero_point(rule))["g"].isnan().all())


def test_the_proximal_anchors_derivative_reaches_phi_0() -> None:
    rule = Sgd(GradientTerms(proximal=0.5))
    start = {"w": torch.full((1, 2), 3.0, dtype=torch.float64, requires_grad=True)}
    state = rule.init_state(start)
    fast = {"w": torch.ones(1, 2, dtype=torch.float64)}
    zeros, rate = {"w": torch.zeros(1, 2, dtype=torch.float64)}, {"w": torch.tensor(0.1)}
    after, _ = rule.update(fast, state, zeros, rate)
    # phi' = phi - 0.1 * 0.5 * (phi - phi_0)
    torch.testing.assert_close(after["w"].detach(), torch.full((1, 2), 1.1, dtype=torch.float64))
    (derivative,) = torch.autograd.grad(after["w"].sum(), start["w"])
    torch.testing.assert_close(derivative, torch.full((1, 2), 0.05, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_called_affine_where_its_vjp_by_the_gradient_is_the_same_at_two_gradients(
    rule: str,
) -> None:
    at = point(RULES[rule], per_element=True)
    other = {name: 0.3 - 2.0 * value for name, value in at.grads.items()}
    first, second = (gradient_adjoint(RULES[rule], at, grads) for grads in (at.grads, other))
    errors = [relative_error(first[name], second[name]) for name in SHAPES]
    assert RULES[rule].is_affine_in_gradient == (rule in AFFINE)
    assert max(errors) < 1e-15 if rule in AFFINE else min(errors) > 1e-2


def gradient_adjoint(rule: InnerRule, at: Point, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vjp by g of the whole update, state included, for a fixed cotangent."""
    generator = torch.Generator().manual_seed(9)
    inputs = {name: value.clone().requires_grad_() for name, value in grads.items()}
    fast, state = rule.update(at.fast, at.state, inputs, at.rates)
    outputs = [value for value in (*fast.values(), *state.values()) if value.requires_grad]
    cotangents = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in outputs]
    derivatives = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    return dict(zip(inputs, derivatives, strict=True))


# ---------------------------------------------------------------- hypergradients through a rule

# Clipping is active: these problems' gradients are longer.
ACTIVE: dict[str, Rule] = {
    "nesterov": Sgd(GradientTerms(weight_decay=0.05, clip_norm=0.05), momentum=0.7, nesterov=True),
    "adam": Adam(GradientTerms(weight_decay=0.05, clip_norm=0.05), betas=(0.8, 0.95)),
    "adamw": Adam(GradientTerms(clip_norm=0.05), decoupled_weight_decay=0.05),
    "rmsprop": RmsProp(GradientTerms(weight_decay=0.05, clip_norm=0.05), alpha=0.9),
    "rmsprop, centered, momentum": RmsProp(
        GradientTerms(clip_norm=0.05), alpha=0.9, momentum=0.6, centered=True
    ),
}
PROXIMAL: dict[str, Rule] = {
    f"{name}, proximal": dataclasses.replace(rule, terms=dataclasses.replace(rule.terms, proximal=2.0))
    for name, rule in ACTIVE.items()
}


def rate_of(rule: Rule) -> float:
    """Adam's and RMSProp's steps are as long as the rate, whatever the gradient."""
    return RATE if isinstance(rule, Sgd) else 0.01


def conv4(rule: Rule, *, num_steps: int, grain: Grain, init: bool = True) -> Problem:
    weights = last(num_steps) if num_steps == 8 else step_weights("uniform", num_steps)
    return at_rate(conv4_problem(step_weights=weights, grain=grain, rule=rule, init=init), rate_of(rule))


def gpt(rule: Rule, *, num_steps: int, grain: Grain, init: bool = True) -> Problem:
    """LoRA with B exactly zero, so that the first inner gradient of A is, too."""
    weights = last(num_steps) if num_steps == 8 else step_weights("uniform", num_steps)
    problem = gpt_problem(step_weights=weights, grain=grain, rule=rule, init=init, backbone=True)
    for name, value in problem.meta.items():
        if name.startswith("init.") and name.endswith("lora_b"):
            value.zero_()
    return at_rate(problem, rate_of(rule))


def at_rate(problem: Problem, rate: float) -> Problem:
    """The problem with its rates, learned or not, scaled so that they start around `rate`."""
    shift = math.log(rate / RATE)
    meta = {n: value + shift if n.startswith("rates.") else value for n, value in problem.meta.items()}
    rates = dataclasses.replace(problem.unroll.rates, initial=rate)
    return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, rates=rates), meta=meta)


CASES: dict[str, Callable[[Rule], Problem]] = {
    "conv4, K=1, rates per element": lambda rule: conv4(rule, num_steps=1, grain="per_element"),
    "conv4, K=3, rates per element": lambda rule: conv4(rule, num_steps=3, grain="per_element"),
    "conv4, K=8, rates per group": lambda rule: conv4(rule, num_steps=8, grain="per_group"),
    "gpt, K=1, backbone, one rate": lambda rule: gpt(rule, num_steps=1, grain="shared"),
    "gpt, K=3, backbone, rates per element": lambda rule: gpt(rule, num_steps=3, grain="per_element"),
    "gpt, K=8, backbone, rates per group": lambda rule: gpt(rule, num_steps=8, grain="per_group"),
}


def meta_gradient(problem: Problem, estimator: str = "unrolled") -> MetaGradient:
    return HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)


@pytest.mark.parametrize("make", [conv4, gpt])
@pytest.mark.parametrize("rule", ACTIVE)
def test_clipping_is_active_at_every_step_of_every_task(rule: str, make: Callable[..., Problem]) -> None:
    problem = make(ACTIVE[rule], num_steps=8, grain="per_element")
    for step, grads in enumerate(inner_gradients(problem)):
        for task in range(problem.batch.num_tasks):
            whole = torch.cat([value[task].flatten() for value in grads.values()])
            assert float(torch.linalg.vector_norm(whole)) > 0.05, f"step {step}, task {task}"


def test_the_first_inner_gradient_of_a_lora_matrix_a_is_exactly_zero_and_later_ones_are_not() -> None:
    first, *later = inner_gradients(gpt(ACTIVE["adam"], num_steps=3, grain="none"))
    names = [name for name in first if name.endswith("lora_a")]
    assert names
    for name in names:
        assert not first[name].any()
        assert all(bool(grads[name].any()) for grads in later)


def inner_gradients(problem: Problem) -> list[dict[str, Tensor]]:
    unroll, meta, batch = problem.unroll, problem.meta, problem.batch
    path = list(adapt(unroll, meta, batch, num_steps=unroll.num_steps))[:-1]
    return [
        unroll.support_gradient(meta, leaves(at.fast), batch, step, create_graph=False)
        for step, at in enumerate(path)
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ACTIVE)
def test_the_exact_estimators_agree_through_every_rule(rule: str, case: str) -> None:
    problem = CASES[case](ACTIVE[rule])
    expected = meta_gradient(problem)
    assert all(bool(value.isfinite().all()) for value in expected.gradient.values())
    for estimator in ("rematerialized", "mixed_mode"):
        actual = meta_gradient(problem, estimator)
        # The same sums in another order: rounding of 1e-16, which at a zero gradient a step multiplies
        # by up to 1 / sqrt(eps_root) = 1e4.
        assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-9)
        torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rule", PROXIMAL)
def test_the_exact_estimators_agree_with_a_proximal_term(rule: str) -> None:
    problem = gpt(PROXIMAL[rule], num_steps=3, grain="per_element")
    expected = meta_gradient(problem)
    for estimator in ("rematerialized", "mixed_mode"):
        assert_gradients_agree(meta_gradient(problem, estimator).gradient, expected.gradient, rtol=1e-9)


# With eps_root = 1e-8 a rule bends over gradients of 1e-4: the difference is of the fourth order, over a
# distance well below, which also crosses no kink of the ReLUs. Rounding: 1e-15 of the losses over it.
DISTANCE = 3e-7


@pytest.mark.parametrize("model", ["conv4", "gpt"])
@pytest.mark.parametrize("rule", [*ACTIVE, *PROXIMAL])
def test_unrolled_through_every_rule_equals_finite_differences_of_the_meta_loss(
    rule: str, model: str
) -> None:
    make = conv4 if model == "conv4" else gpt
    problem = make((ACTIVE | PROXIMAL)[rule], num_steps=3, grain="per_element")
    gradient = meta_gradient(problem).gradient
    generator = torch.Generator().manual_seed(0)
    for kind in sorted({name.partition(".")[0] for name in problem.meta}):
        direction = {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in problem.meta.items()
            if name.startswith(f"{kind}.")
        }
        slope = sum(float((gradient[name] * value).sum()) for name, value in direction.items())
        losses = {
            shift: meta_loss(problem, {n: shift * DISTANCE * value for n, value in direction.items()})
            for shift in (-2, -1, 1, 2)
        }
        difference = (8.0 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12.0 * DISTANCE)
        assert difference == pytest.approx(slope, rel=1e-6, abs=1e-7), kind


def meta_loss(problem: Problem, shift: Mapping[str, Tensor]) -> float:
    """The sum of the tasks' meta-losses at shifted meta-parameters, from forward passes alone."""
    unroll, batch = problem.unroll, problem.batch
    meta = {name: value + shift.get(name, 0.0) for name, value in problem.meta.items()}
    path = adapt(unroll, meta, batch, num_steps=unroll.num_steps)
    losses = [unroll.learner.losses("query", meta, at.fast, batch, 0)[0] for at in path]
    return float(sum(w * loss.sum() for w, loss in zip(unroll.step_weights, losses, strict=True)))
