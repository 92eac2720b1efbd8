"""The estimators of the hypergradient on real models, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn import functional as F

from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Rehearsal
from metaloom.engine.unroll import adapt
from tests.numerics.msr_problems import msr_problem
from tests.numerics.problems import (
    CLIPPED,
    HEAVY,
    RATE,
    Problem,
    assert_gradients_agree,
    conv4_problem,
    gpt_problem,
    last,
    relative_error,
)

EXACT = ("unrolled", "rematerialized", "mixed_mode")
# c_0 > 0, a step without a term, unequal weights.
UNEVEN = (0.3, 0.0, 0.5, 1.2)
MIXED = Rehearsal(ratio=0.3, num_samples=2)

CASES: dict[str, Callable[[], Problem]] = {
    "conv4, K=1": lambda: conv4_problem(step_weights=last(1)),
    "conv4, K=3, one rate, multi-step": lambda: conv4_problem(
        step_weights=step_weights("uniform", 3), grain="shared"
    ),
    "conv4, K=3, rate per tensor, momentum, uneven": lambda: conv4_problem(
        step_weights=UNEVEN, grain="per_tensor", rule=HEAVY
    ),
    "conv4, K=8, rate per tensor and step, momentum": lambda: conv4_problem(
        step_weights=last(8), grain="per_tensor_per_step", rule=HEAVY
    ),
    "conv4, K=3, rates alone": lambda: conv4_problem(
        step_weights=UNEVEN, grain="per_tensor_per_step", init=False
    ),
    "conv4, K=3, clipped, momentum": lambda: conv4_problem(
        step_weights=last(3), grain="per_tensor", rule=CLIPPED
    ),
    "gpt, K=3, backbone, clipped, rehearsal": lambda: gpt_problem(
        step_weights=last(3), grain="per_tensor_per_step", rule=CLIPPED, backbone=True, rehearsal=MIXED
    ),
    "dense symmetries, K=3, rate per tensor, momentum, uneven": lambda: msr_problem(
        "dense", step_weights=UNEVEN, rule=HEAVY
    ),
    "symmetries as products, K=3, clipped, momentum": lambda: msr_problem(
        "kronecker", step_weights=last(3), rule=CLIPPED
    ),
    "gpt, K=1": lambda: gpt_problem(step_weights=last(1)),
    "gpt, K=1, backbone, one rate, rehearsal": lambda: gpt_problem(
        step_weights=last(1), grain="shared", backbone=True, rehearsal=MIXED
    ),
    "gpt, K=3, tied backbone, rate per tensor, momentum, uneven": lambda: gpt_problem(
        step_weights=UNEVEN, grain="per_tensor", rule=HEAVY, backbone=True, tied_embeddings=True
    ),
    "gpt, K=3, backbone alone": lambda: gpt_problem(
        step_weights=step_weights("uniform", 3), init=False, backbone=True
    ),
    "gpt, K=3, rates alone, rehearsal": lambda: gpt_problem(
        step_weights=last(3), grain="per_tensor", init=False, rehearsal=MIXED
    ),
    "gpt, K=8, backbone, rate per tensor and step, momentum, rehearsal, multi-step": lambda: gpt_problem(
        step_weights=step_weights("uniform", 8),
        grain="per_tensor_per_step",
        rule=HEAVY,
        backbone=True,
        rehearsal=MIXED,
    ),
}


def meta_gradient(problem: Problem, estimator: str = "unrolled") -> MetaGradient:
    return HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)


@pytest.mark.parametrize("case", CASES)
def test_every_exact_estimator_equals_unrolled(case: str) -> None:
    problem = CASES[case]()
    expected = meta_gradient(problem)
    for estimator in ("rematerialized", "mixed_mode"):
        actual = meta_gradient(problem, estimator)
        # The same sums in another order: rounding of 1e-16, amplified by at most 8 steps.
        assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-9)
        torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-12, atol=0.0)
        assert actual.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            torch.testing.assert_close(actual.metrics[name], value, rtol=1e-12, atol=0.0)
    assert expected.metrics.keys() == {"loss_after", "accuracy_after", "not_finite"}


@pytest.mark.parametrize(
    ("model", "kind"),
    [("conv4", "init."), ("conv4", "rates."), ("gpt", "init."), ("gpt", "backbone."), ("gpt", "rates.")],
)
@pytest.mark.parametrize("rule", [HEAVY, CLIPPED], ids=["heavy", "clipped"])
def test_unrolled_equals_finite_differences_of_the_meta_loss(model: str, kind: str, rule: Sgd) -> None:
    if model == "conv4":
        problem = conv4_problem(step_weights=UNEVEN, grain="per_tensor_per_step", rule=rule)
    else:
        problem = gpt_problem(
            step_weights=UNEVEN, grain="per_tensor_per_step", rule=rule, backbone=True, rehearsal=MIXED
        )
    gradient = meta_gradient(problem).gradient
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in problem.meta.items()
            if name.startswith(kind)
        }
        slope = sum(float((gradient[name] * value).sum()) for name, value in direction.items())
        # Truncation falls as the square of the distance, rounding rises as its inverse: for losses of
        # order 1 both are near 1e-9 here. Small enough also not to cross a kink of the ReLUs.
        distance = 1e-6
        above, below = (
            meta_loss(problem, {n: sign * distance * value for n, value in direction.items()})
            for sign in (1.0, -1.0)
        )
        assert (above - below) / (2.0 * distance) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def meta_loss(problem: Problem, shift: dict[str, Tensor]) -> float:
    """The sum of the tasks' meta-losses at shifted meta-parameters, from forward passes alone."""
    unroll, batch = problem.unroll, problem.batch
    meta = {name: value + shift.get(name, 0.0) for name, value in problem.meta.items()}
    path = adapt(unroll, meta, batch, num_steps=unroll.num_steps)
    losses = [unroll.learner.losses("query", meta, at.fast, batch, 0)[0] for at in path]
    return float(sum(w * loss.sum() for w, loss in zip(unroll.step_weights, losses, strict=True)))


@pytest.mark.parametrize("model", ["conv4", "gpt"])
def test_first_order_differs_from_second_order_in_every_kind_of_meta_parameter(model: str) -> None:
    if model == "conv4":
        problem = conv4_problem(step_weights=last(3), grain="per_tensor")
    else:
        problem = gpt_problem(step_weights=last(3), grain="per_tensor", backbone=True)
    exact, first = meta_gradient(problem).gradient, meta_gradient(problem, "first_order").gradient
    for name, value in exact.items():
        # Exact estimators agree to 1e-9: a difference of 1e-4 is the second order's, not rounding's.
        assert relative_error(first[name], value) > 1e-4, name


def test_first_order_is_exact_in_the_last_steps_rate_and_in_no_other() -> None:
    problem = conv4_problem(step_weights=last(3), grain="per_tensor_per_step")
    exact, first = meta_gradient(problem).gradient, meta_gradient(problem, "first_order").gradient
    for name in exact:
        if name.startswith("rates."):
            assert relative_error(first[name][-1], exact[name][-1]) < 1e-9, name
            assert relative_error(first[name][:-1], exact[name][:-1]) > 1e-4, name


def test_first_order_moves_a_backbone_by_the_query_loss_alone() -> None:
    problem = gpt_problem(step_weights=last(3), backbone=True)
    first = meta_gradient(problem, "first_order").gradient
    fast = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=3))[-1].fast
    names = [name for name in problem.meta if name.startswith("backbone.")]
    meta = {name: value.requires_grad_() for name, value in problem.meta.items()}
    losses, _ = problem.unroll.learner.losses("query", meta, fast, problem.batch, 0)
    expected = torch.autograd.grad(losses.sum(), [meta[name] for name in names])
    assert_gradients_agree(
        {name: first[name] for name in names}, dict(zip(names, expected, strict=True)), rtol=1e-12
    )


def test_one_step_maml_on_a_network_without_norms_equals_torch_func() -> None:
    problem = conv4_problem(step_weights=last(1), norm="none", num_tasks=3)
    support, query = problem.batch.support, problem.batch.query

    def loss(weights: dict[str, Tensor], part: Mapping[str, Tensor], task: int) -> Tensor:
        logits = functional_call(problem.model, weights, (part["inputs"][task],))
        return F.cross_entropy(logits, part["targets"][task])

    def one_task(weights: dict[str, Tensor], task: int) -> Tensor:
        inner = grad(loss)(weights, support, task)
        return loss({name: value - RATE * inner[name] for name, value in weights.items()}, query, task)

    def all_tasks(weights: dict[str, Tensor]) -> Tensor:
        return torch.stack([one_task(weights, task) for task in range(3)]).sum()

    initial = {name.removeprefix("init."): value for name, value in problem.meta.items()}
    expected = {f"init.{name}": value for name, value in grad(all_tasks)(initial).items()}
    for estimator in EXACT:
        # Another implementation of the same second-order gradient: rounding only.
        assert_gradients_agree(meta_gradient(problem, estimator).gradient, expected, rtol=1e-11)


@pytest.mark.parametrize("estimator", [*EXACT, "first_order"])
def test_lora_that_starts_at_zero_has_a_finite_hypergradient(estimator: str) -> None:
    problem = gpt_problem(step_weights=last(3), rule=HEAVY, backbone=True, rehearsal=MIXED)
    for name, value in problem.meta.items():
        if name.endswith("lora_b"):
            value.zero_()
    result = meta_gradient(problem, estimator)
    assert all(bool(value.isfinite().all()) for value in result.gradient.values())
    if estimator != "first_order":
        assert_gradients_agree(result.gradient, meta_gradient(problem).gradient, rtol=1e-9)


@pytest.mark.parametrize("estimator", [*EXACT, "first_order"])
def test_an_estimator_leaves_model_meta_parameters_and_data_as_they_were(estimator: str) -> None:
    problem = gpt_problem(step_weights=UNEVEN, grain="shared", backbone=True, rehearsal=MIXED)
    tensors = {**problem.meta, **problem.batch.support, **dict(problem.model.named_parameters())}
    before = {name: value.detach().clone() for name, value in tensors.items()}
    meta_gradient(problem, estimator)
    for name, value in tensors.items():
        assert torch.equal(value, before[name]), name
        assert value.grad is None, name
    assert not any(value.requires_grad for value in problem.meta.values())
    assert not any(module._forward_hooks for module in problem.model.modules())


@pytest.mark.parametrize("estimator", [*EXACT, "first_order"])
def test_an_estimator_keeps_no_graph_in_what_it_returns(estimator: str) -> None:
    result = meta_gradient(gpt_problem(step_weights=UNEVEN, grain="per_tensor", backbone=True), estimator)
    for tensor in (*result.gradient.values(), result.losses, *result.metrics.values()):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


@pytest.mark.parametrize("make", [conv4_problem, gpt_problem])
def test_clipping_is_active_in_the_clipped_cases(make: Callable[..., Problem]) -> None:
    clipped = meta_gradient(make(step_weights=last(3), rule=CLIPPED))
    free = meta_gradient(make(step_weights=last(3), rule=Sgd(momentum=0.5)))
    assert max(relative_error(clipped.gradient[name], value) for name, value in free.gradient.items()) > 0.01
