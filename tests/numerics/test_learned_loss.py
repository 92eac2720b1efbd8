"""Adaptation by a learned loss of the outputs (ARM-LL), against loops and differences."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.learned_loss import LearnedLoss
from metaloom.engine.learner import Rehearsal
from metaloom.engine.losses import SupportLoss
from metaloom.engine.unroll import adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import RATE, Problem, assert_gradients_agree, conv4_problem, last

LOSS = LearnedLoss(num_outputs=3, width=6, num_layers=2, seed=4)


def problem(num_steps: int = 2, *, tasks: Literal["loop", "vmap"] = "loop", norm: str = "batch") -> Problem:
    plain = conv4_problem(step_weights=last(num_steps), tasks=tasks, norm=norm)
    learner = dataclasses.replace(plain.unroll.learner, learned_loss=LOSS)
    unroll = dataclasses.replace(plain.unroll, learner=learner)
    like = torch.empty(0, dtype=torch.float64)
    return dataclasses.replace(plain, unroll=unroll, meta=plain.meta | LOSS.meta_parameters(like))


def by_hand(meta: dict[str, Tensor], outputs: Tensor) -> float:
    """The loss of one task's outputs, unit by unit."""
    squares = 0.0
    for output in outputs.tolist():
        values = output
        for layer in range(3):
            weight = meta[f"loss.network.{layer}.weight"].tolist()
            bias = meta[f"loss.network.{layer}.bias"].tolist()
            values = [
                sum(w * value for w, value in zip(row, values, strict=True)) + b
                for row, b in zip(weight, bias, strict=True)
            ]
            if layer < 2:
                values = [max(0.0, value) for value in values]
        squares += values[0] ** 2
    return math.sqrt(squares)


def test_the_loss_is_the_norm_of_what_the_network_says_of_each_example() -> None:
    meta = LOSS.meta_parameters(torch.empty(0, dtype=torch.float64))
    outputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = LOSS.of_outputs(meta, outputs, None)
    # The constant under the root is 1e-12.
    assert losses.tolist() == pytest.approx([by_hand(meta, task) for task in outputs], rel=1e-10)
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    padded = LOSS.of_outputs(meta, outputs, weights)
    expected = [by_hand(meta, outputs[0, :3]), by_hand(meta, outputs[1])]
    assert padded.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_order_of_examples_has_no_influence() -> None:
    meta = LOSS.meta_parameters(torch.empty(0, dtype=torch.float64))
    outputs = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shuffled = LOSS.of_outputs(meta, outputs[:, [2, 0, 3, 1]], None)
    torch.testing.assert_close(shuffled, LOSS.of_outputs(meta, outputs, None), rtol=1e-14, atol=0.0)


def test_initial_weights_follow_from_the_seed_and_lie_within_torchs_bounds() -> None:
    like = torch.empty(0, dtype=torch.float64)
    one = LOSS.meta_parameters(like)
    assert [tuple(value.shape) for value in one.values()] == [(6, 3), (6,), (6, 6), (6,), (1, 6), (1,)]
    assert all(torch.equal(value, LOSS.meta_parameters(like)[name]) for name, value in one.items())
    other = dataclasses.replace(LOSS, seed=5).meta_parameters(like)
    assert not any(torch.equal(value, other[name]) for name, value in one.items())
    assert all(value.abs().max() <= 1 / math.sqrt(3 if ".0." in name else 6) for name, value in one.items())


def test_an_inner_step_goes_down_the_learned_loss() -> None:
    case = problem(1)
    (before, after) = adapt(case.unroll, case.meta, case.batch, num_steps=1)
    for task in range(2):
        weights = {name: value[task].clone().requires_grad_() for name, value in before.fast.items()}
        outputs = functional_call(case.model, weights, (case.batch.support["inputs"][task],))
        # Of the plain definition: sqrt of the sum of squares, by torch's own layers.
        hidden = outputs
        for layer in range(3):
            weight, bias = (case.meta[f"loss.network.{layer}.{part}"] for part in ("weight", "bias"))
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            hidden = torch.relu(hidden) if layer < 2 else hidden
        gradients = torch.autograd.grad(torch.linalg.vector_norm(hidden), list(weights.values()))
        for (name, value), gradient in zip(weights.items(), gradients, strict=True):
            expected = value.detach() - RATE * gradient
            torch.testing.assert_close(after.fast[name][task], expected, rtol=1e-9, atol=1e-11)


WAYS: dict[str, Hypergradient] = {
    "rematerialized": Rematerialized(),
    "mixed_mode": MixedMode(),
    "mixed_mode, graphs kept": MixedMode(num_graph_steps=1),
}


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("way", WAYS)
def test_every_exact_way_equals_unrolled(way: str, tasks: Literal["loop", "vmap"]) -> None:
    case = problem(3, tasks=tasks)
    expected = Unrolled().meta_gradient(problem(3).unroll, case.meta, case.batch).gradient
    actual = WAYS[way].meta_gradient(case.unroll, case.meta, case.batch).gradient
    assert all(bool(expected[name].any()) for name in expected if name.endswith("weight"))
    assert_gradients_agree(actual, expected, rtol=1e-9)  # sums in another order


def test_the_hypergradient_of_the_network_is_that_of_differences() -> None:
    case = problem()
    gradient = Rematerialized().meta_gradient(case.unroll, case.meta, case.batch).gradient
    generator = torch.Generator().manual_seed(3)
    along = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in case.meta.items()
        if name.startswith("loss.")
    }

    def meta_loss(step: float) -> float:
        moved = case.meta | {name: case.meta[name] + step * value for name, value in along.items()}
        *_, end = adapt(case.unroll, moved, case.batch, num_steps=2)
        return float(case.unroll.learner.losses("query", moved, end.fast, case.batch, 2)[0].sum())

    slope = sum(float((gradient[name] * value).sum()) for name, value in along.items())
    assert abs(slope) > 1e-6
    # Truncation and rounding of the difference.
    assert slope == pytest.approx((meta_loss(1e-5) - meta_loss(-1e-5)) / 2e-5, rel=1e-5)


def test_labels_of_support_data_have_no_influence() -> None:
    case = problem()
    other = dataclasses.replace(
        case.batch, support={**case.batch.support, "targets": (case.batch.support["targets"] + 1) % 3}
    )
    one = Rematerialized().meta_gradient(case.unroll, case.meta, case.batch)
    two = Rematerialized().meta_gradient(case.unroll, case.meta, other)
    assert torch.equal(one.losses, two.losses)
    assert all(torch.equal(value, two.gradient[name]) for name, value in one.gradient.items())


def test_outputs_that_are_all_zero_have_finite_second_derivatives() -> None:
    zeros = {
        name: torch.zeros_like(value).requires_grad_()
        for name, value in LOSS.meta_parameters(torch.empty(0, dtype=torch.float64)).items()
    }
    outputs = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(LOSS.of_outputs(zeros, outputs, None).sum(), outputs, create_graph=True)
    second = torch.autograd.grad(first.sum(), list(zeros.values()), allow_unused=True)
    assert all(value is None or bool(value.isfinite().all()) for value in second)


def test_an_estimator_that_holds_inner_gradients_constant_is_refused() -> None:
    case = problem()
    with pytest.raises(CapabilityError, match="first_order gives no gradient of loss parameters"):
        FirstOrder().meta_gradient(case.unroll, case.meta, case.batch)


def test_a_learned_loss_has_no_other_beside_it() -> None:
    learner = problem().unroll.learner
    for change in (
        {"support_loss": SupportLoss(2.0)},
        {"head_chunk": 4},
        {"rehearsal": Rehearsal(0.5, 1)},
    ):
        with pytest.raises(CapabilityError, match="a learned loss of the outputs stands in the place of"):
            dataclasses.replace(learner, **change)


def test_outputs_of_another_number_are_refused() -> None:
    meta = LOSS.meta_parameters(torch.empty(0))
    with pytest.raises(CapabilityError, match=r"reads 3 numbers of each example.*shape \[1, 2, 5, 3\]"):
        LOSS.of_outputs(meta, torch.zeros(1, 2, 5, 3), None)
