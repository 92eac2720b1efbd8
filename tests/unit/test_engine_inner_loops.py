"""The inner rules and their rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metaloom.build import build_rule
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms, clip_per_task
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.errors import CapabilityError
from metaloom.recipe import AdamRule, AdamWRule, RMSPropRule, SGDRule

T = 3
SHAPES = {"weight": (T, 4, 2), "bias": (T, 4)}
RATES = {"weight": 0.1, "bias": 0.03}


def noise(seed: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}


def scalars(rates: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}


# ---------------------------------------------------------------- the rules, against torch.optim

Rule = Sgd | Adam | RmsProp
Groups = list[dict[str, object]]

# Each rule beside torch's own, which has no epsilon under the root.
PAIRS: dict[str, tuple[Rule, Callable[[Groups], torch.optim.Optimizer]]] = {
    "sgd": (Sgd(), lambda groups: torch.optim.SGD(groups, lr=1.0)),
    "sgd, momentum": (Sgd(momentum=0.9), lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9)),
    "sgd, weight decay": (
        Sgd(GradientTerms(weight_decay=0.1)),
        lambda groups: torch.optim.SGD(groups, lr=1.0, weight_decay=0.1),
    ),
    "sgd, momentum, weight decay": (
        Sgd(GradientTerms(weight_decay=0.1), momentum=0.9),
        lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.1),
    ),
    "sgd, nesterov, weight decay": (
        Sgd(GradientTerms(weight_decay=0.1), momentum=0.8, nesterov=True),
        lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (Adam(eps_root=0.0), lambda groups: torch.optim.Adam(groups, foreach=False)),
    "adam, weight decay": (
        Adam(GradientTerms(weight_decay=0.1), betas=(0.7, 0.95), eps=1e-2, eps_root=0.0),
        lambda groups: torch.optim.Adam(groups, betas=(0.7, 0.95), eps=1e-2, weight_decay=0.1, foreach=False),
    ),
    "adam, no memory": (
        Adam(betas=(0.0, 0.0), eps_root=0.0),
        lambda groups: torch.optim.Adam(groups, betas=(0.0, 0.0), foreach=False),
    ),
    "adamw": (
        Adam(eps_root=0.0, decoupled_weight_decay=0.3),
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.3, foreach=False),
    ),
    "rmsprop": (
        RmsProp(eps_root=0.0),
        lambda groups: torch.optim.RMSprop(groups, foreach=False),
    ),
    "rmsprop, momentum, weight decay": (
        RmsProp(GradientTerms(weight_decay=0.1), alpha=0.9, eps=1e-2, eps_root=0.0, momentum=0.6),
        lambda groups: torch.optim.RMSprop(
            groups, alpha=0.9, eps=1e-2, momentum=0.6, weight_decay=0.1, foreach=False
        ),
    ),
    "rmsprop, centered": (
        RmsProp(alpha=0.8, eps_root=0.0, centered=True),
        lambda groups: torch.optim.RMSprop(groups, alpha=0.8, centered=True, foreach=False),
    ),
}


@pytest.mark.parametrize("proximal", [0.0, 0.4])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_rule_over_several_steps_equals_torchs_optimizer_of_each_task(pair: str, proximal: float) -> None:
    rule, optimizer_of = PAIRS[pair]
    rule = dataclasses.replace(rule, terms=dataclasses.replace(rule.terms, proximal=proximal))
    start = noise(0)
    tasks = [
        {name: value[task].clone().requires_grad_() for name, value in start.items()} for task in range(T)
    ]
    optimizers = [optimizer_of([{"params": [task[n]], "lr": RATES[n]} for n in SHAPES]) for task in tasks]
    fast, state = start, rule.init_state(start)
    for step in range(6):
        grads = noise(step + 1)
        fast, state = rule.update(fast, state, grads, scalars(RATES))
        for task, (weights, optimizer) in enumerate(zip(tasks, optimizers, strict=True)):
            for name, weight in weights.items():
                weight.grad = grads[name][task] + proximal * (weight.detach() - start[name][task])
            optimizer.step()
            for name, weight in weights.items():
                # The same arithmetic but for its order; the centered rule's variance, written in another
                # way, loses a digit or two to cancellation in torch's.
                torch.testing.assert_close(fast[name][task], weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [Sgd(momentum=0.5), Adam(eps_root=0.0), RmsProp()],
    ids=["sgd", "adam", "rmsprop"],
)
def test_a_rule_that_clips_steps_as_it_does_on_gradients_that_torch_has_clipped_task_by_task(
    rule: Rule,
) -> None:
    rule = dataclasses.replace(rule, terms=GradientTerms(0.2, clip_norm=1.5, proximal=0.3))
    start = noise(0)
    free = dataclasses.replace(rule, terms=GradientTerms(0.2))
    fast, state = start, rule.init_state(start)
    fast_2, state_2 = start, free.init_state(start)
    for step in range(3):
        # The second task's gradient is short enough to stay.
        grads = {n: value * factors_like(value, [3.0, 0.02, 1.0]) for n, value in noise(step + 1).items()}
        fast, state = rule.update(fast, state, grads, scalars(RATES))
        whole = {name: grad + 0.3 * (fast_2[name] - start[name]) for name, grad in grads.items()}
        fast_2, state_2 = free.update(fast_2, state_2, clipped_by_torch(whole, 1.5), scalars(RATES))
        for name, value in fast_2.items():
            # Torch divides by the norm plus 1e-6.
            torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-6)


def factors_like(value: Tensor, factors: list[float]) -> Tensor:
    return torch.tensor(factors, dtype=value.dtype).view(T, *(1,) * (value.ndim - 1))


def clipped_by_torch(grads: dict[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    clipped = {name: value.clone() for name, value in grads.items()}
    for task in range(T):
        parameters = [torch.zeros_like(value[task]).requires_grad_() for value in grads.values()]
        for parameter, value in zip(parameters, clipped.values(), strict=True):
            parameter.grad = value[task]
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return clipped


def test_clipping_is_that_of_torch_for_each_task_alone() -> None:
    grads = {name: value * factors_like(value, [0.01, 1.0, 5.0]) for name, value in noise(1).items()}
    expected = clipped_by_torch(grads, 1.5)
    for name, value in clip_per_task(grads, 1.5).items():
        # Torch divides by the norm plus 1e-6.
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)


def test_clipping_an_exactly_zero_gradient_is_zero_with_a_finite_derivative() -> None:
    grads = {
        name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()
    }
    clipped = clip_per_task(grads, 0.5)
    assert not any(value.any() for value in clipped.values())
    total = torch.stack([value.sum() for value in clipped.values()]).sum()
    for derivative in torch.autograd.grad(total, list(grads.values())):
        assert torch.equal(derivative, torch.ones_like(derivative))


EVERY_MEMORY: dict[str, InnerRule] = {
    "sgd": Sgd(GradientTerms(weight_decay=0.1, clip_norm=1.0, proximal=0.2), momentum=0.5),
    "adam": Adam(GradientTerms(weight_decay=0.1, clip_norm=1.0, proximal=0.2)),
    "rmsprop": RmsProp(
        GradientTerms(weight_decay=0.1, clip_norm=1.0, proximal=0.2), momentum=0.5, centered=True
    ),
}


@pytest.mark.parametrize("rule", EVERY_MEMORY)
def test_a_rule_leaves_its_arguments_as_they_were(rule: str) -> None:
    fast, grads = noise(0), noise(1)
    _, state = EVERY_MEMORY[rule].update(fast, EVERY_MEMORY[rule].init_state(fast), noise(2), scalars(RATES))
    arguments = (fast, state, grads, scalars(RATES))
    before = [{name: value.clone() for name, value in tensors.items()} for tensors in arguments]
    first = EVERY_MEMORY[rule].update(*arguments)
    for tensors, copies in zip(arguments, before, strict=True):
        assert all(torch.equal(value, copies[name]) for name, value in tensors.items())
    again = EVERY_MEMORY[rule].update(*arguments)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        (Sgd(GradientTerms(weight_decay=0.1, clip_norm=1.0)), set()),
        (Sgd(momentum=0.5), {"momentum"}),
        (Sgd(GradientTerms(proximal=0.5)), {"anchor"}),
        (Adam(), {"first_moment", "second_moment", "step_count"}),
        (RmsProp(), {"square_average"}),
        (
            RmsProp(GradientTerms(proximal=0.1), momentum=0.5, centered=True),
            {"square_average", "average", "momentum", "anchor"},
        ),
    ],
)
def test_the_state_keeps_what_the_rule_needs_and_its_names_and_shapes_stay(
    rule: InnerRule, kinds: set[str]
) -> None:
    fast = noise(0)
    state = rule.init_state(fast)
    assert {name.partition("/")[0] for name in state} == kinds
    _, after = rule.update(fast, state, noise(1), scalars(RATES))
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in state.items()}
    assert all(value.is_floating_point() for value in state.values())  # so that each has an adjoint


def test_the_proximal_anchor_is_phi_0_itself_and_is_never_copied() -> None:
    rule, fast = Sgd(GradientTerms(proximal=0.5)), noise(0)
    state = rule.init_state(fast)
    _, after = rule.update(fast, state, noise(1), scalars(RATES))
    for name, value in fast.items():
        assert state[f"anchor/{name}"] is value
        assert after[f"anchor/{name}"] is value


def test_a_recomputed_step_of_adam_sees_the_same_count() -> None:
    rule, fast = Adam(), noise(0)
    state = rule.init_state(fast)
    for step in range(3):
        assert float(state["step_count"]) == step
        rule.update(fast, state, noise(step), scalars(RATES))  # once more, as the adjoint sweep does
        fast, state = rule.update(fast, state, noise(step), scalars(RATES))


def test_adams_bias_correction_is_exact_in_float32_too() -> None:
    rule = Adam(eps=0.0, eps_root=0.0)
    fast = {"w": torch.zeros(1, 5)}
    after, _ = rule.update(fast, rule.init_state(fast), {"w": torch.ones(1, 5)}, {"w": torch.tensor(1.0)})
    # 1 - 0.999 in float32 would be wrong by 1e-5; the first step is the rate itself.
    torch.testing.assert_close(after["w"], -torch.ones(1, 5), rtol=1e-6, atol=0.0)
    assert after["w"].dtype == torch.float32


def test_nesterovs_momentum_needs_momentum() -> None:
    with pytest.raises(CapabilityError, match=r"nesterov: true; has no effect, since momentum is 0; set"):
        Sgd(nesterov=True)


# ---------------------------------------------------------------- from a recipe


@pytest.mark.parametrize(
    ("section", "rule", "others"),
    [
        (
            SGDRule(lr=0.1, momentum=0.5),
            Sgd(momentum=0.5),
            {"momentum": 0.3, "nesterov": True, "weight_decay": 0.2, "clip_norm": 2.0, "proximal": 0.4},
        ),
        (
            AdamRule(lr=0.1),
            Adam(),
            {
                "betas": (0.1, 0.2),
                "eps": 1e-3,
                "eps_root": 1e-4,
                "weight_decay": 0.2,
                "clip_norm": 2.0,
                "proximal": 0.4,
            },
        ),
        (
            AdamWRule(lr=0.1),
            Adam(decoupled_weight_decay=0.01),
            {
                "betas": (0.1, 0.2),
                "eps": 1e-3,
                "eps_root": 1e-4,
                "weight_decay": 0.2,
                "clip_norm": 2.0,
                "proximal": 0.4,
            },
        ),
        (
            RMSPropRule(lr=0.1),
            RmsProp(),
            {
                "alpha": 0.5,
                "eps": 1e-3,
                "eps_root": 1e-4,
                "momentum": 0.3,
                "centered": True,
                "weight_decay": 0.2,
                "clip_norm": 2.0,
                "proximal": 0.4,
            },
        ),
    ],
)
def test_every_value_of_a_rules_section_reaches_the_rule(
    section: SGDRule | AdamRule | AdamWRule | RMSPropRule, rule: Rule, others: dict[str, object]
) -> None:
    assert build_rule(section) == rule
    # These are those of the rates, which are apart from the rule.
    assert others.keys() == type(section).model_fields.keys() - {"kind", "lr", "learned", "rates"}
    for name, value in others.items():
        built = build_rule(section.model_copy(update={name: value}))
        is_decoupled = isinstance(section, AdamWRule) and name == "weight_decay"
        assert values(built) == values(rule) | {"decoupled_weight_decay" if is_decoupled else name: value}


def values(rule: InnerRule) -> dict[str, object]:
    """A rule's values and those of its gradient's terms, by name."""
    assert isinstance(rule, Sgd | Adam | RmsProp)
    return {name: value for name, value in vars(rule).items() if name != "terms"} | vars(rule.terms)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("grain", "shapes"),
    [
        ("none", {}),
        ("shared", {"rates.shared": ()}),
        ("per_group", {"rates.group.weight": (), "rates.group.bias": ()}),
        ("per_tensor", {"rates.0.weight": (), "rates.0.bias": (), "rates.1.weight": (), "rates.1.bias": ()}),
        (
            "per_tensor_per_step",
            {"rates.0.weight": (4,), "rates.0.bias": (4,), "rates.1.weight": (4,), "rates.1.bias": (4,)},
        ),
        (
            "per_element",
            {"rates.0.weight": (4, 2), "rates.0.bias": (4,), "rates.1.weight": (4, 2), "rates.1.bias": (4,)},
        ),
    ],
)
def test_learned_rates_are_logarithms_in_the_names_and_shapes_of_their_grain(
    grain: Grain, shapes: dict[str, tuple[int, ...]]
) -> None:
    meta = Rates(0.05, grain, 4).meta_parameters(two_layers())
    assert {name: tuple(value.shape) for name, value in meta.items()} == shapes
    for value in meta.values():
        assert value.dtype == torch.float64
        assert value.flatten().tolist() == pytest.approx([math.log(0.05)] * value.numel())


def two_layers() -> dict[str, Tensor]:
    return {f"{layer}.{name}": value for layer in range(2) for name, value in noise(layer).items()}


GRAINS: tuple[Grain, ...] = (
    "none",
    "shared",
    "per_group",
    "per_tensor",
    "per_tensor_per_step",
    "per_element",
)


@pytest.mark.parametrize("grain", GRAINS)
def test_every_grain_starts_at_the_initial_rate(grain: Grain) -> None:
    rates, fast = Rates(0.05, grain, 3), noise(0)
    meta = rates.meta_parameters(fast)
    for step in range(5):
        at_step = rates.at(meta, fast, step)
        assert at_step.keys() == fast.keys()
        for name, value in at_step.items():
            expected = torch.full(SHAPES[name], 0.05, dtype=torch.float64)
            torch.testing.assert_close(value.expand(SHAPES[name]), expected, rtol=1e-15, atol=0.0)


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


def test_rates_per_group_reach_the_fast_weights_whose_names_end_so() -> None:
    meta = {"rates.group.bias": torch.tensor(0.2).log(), "rates.group.weight": torch.tensor(0.7).log()}
    at_step = Rates(0.1, "per_group", 2).at(meta, two_layers(), 1)
    assert {name: round(float(value), 6) for name, value in at_step.items()} == {
        "0.weight": 0.7,
        "0.bias": 0.2,
        "1.weight": 0.7,
        "1.bias": 0.2,
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_rates_per_element_move_each_number_of_each_task_at_its_own_rate(pair: str) -> None:
    rule, _ = PAIRS[pair]
    fast, grads = noise(0), noise(1)
    logs = {f"rates.{name}": value[0] for name, value in noise(2).items()}
    rates = Rates(0.1, "per_element", 2).at(logs, fast, 0)
    together, _ = rule.update(fast, rule.init_state(fast), grads, rates)
    for name in SHAPES:
        for index in range(logs[f"rates.{name}"].numel()):
            rate = {n: logs[f"rates.{name}"].flatten()[index].exp() for n in SHAPES}
            alone, _ = rule.update(fast, rule.init_state(fast), grads, rate)
            column = together[name].flatten(1)[:, index]
            torch.testing.assert_close(column, alone[name].flatten(1)[:, index], rtol=1e-14, atol=0.0)
