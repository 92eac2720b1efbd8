"""A loss that tasks adapt by, learned: temperature and label smoothing.

Shape letters: T tasks, N examples, L tokens, C classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.losses import PLAIN, LossTensors, SupportLoss, token_losses
from metaloom.engine.unroll import adapt
from tests.numerics.problems import Problem, assert_gradients_agree
from tests.numerics.token_problems import (
    Fast,
    distance,
    hypergradient,
    recomputing,
    transformer_problem,
)

BOTH = SupportLoss(1.7, 0.15, ("temperature", "label_smoothing"))
LEARNED = {
    "both": BOTH,
    "temperature alone": SupportLoss(0.6, 0.0, ("temperature",)),
    "smoothing alone, at a fixed temperature": SupportLoss(1.7, 0.2, ("label_smoothing",)),
}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4)])
def test_token_losses_equal_torchs_cross_entropy(
    temperature: float | None, smoothing: float | None, shape: tuple[int, ...]
) -> None:
    logits = 3.0 * random(*shape, 7)
    targets = torch.randint(7, shape, generator=torch.Generator().manual_seed(2))
    actual = token_losses(logits, targets, LossTensors(temperature, smoothing))
    expected = F.cross_entropy(
        (logits / (temperature or 1.0)).flatten(0, -2),
        targets.flatten(),
        reduction="none",
        label_smoothing=smoothing or 0.0,
    )
    torch.testing.assert_close(actual, expected.view(shape), rtol=1e-13, atol=1e-14)


def test_learned_values_start_where_they_are_set_and_are_read_back() -> None:
    meta = BOTH.meta_parameters(torch.empty(0, dtype=torch.float64))
    assert float(meta["loss.temperature"]) == pytest.approx(math.log(1.7))
    assert meta["loss.label_smoothing"].item() == pytest.approx(math.log(0.15 / 0.85))
    at = BOTH.at(meta)
    assert isinstance(at.temperature, Tensor)
    assert isinstance(at.label_smoothing, Tensor)
    assert (float(at.temperature), float(at.label_smoothing)) == pytest.approx((1.7, 0.15))


def test_nothing_is_learned_of_a_loss_that_does_not_ask_for_it() -> None:
    assert SupportLoss(1.7, 0.15).meta_parameters(torch.empty(0)) == {}
    assert SupportLoss(1.7, 0.15).at({}) == LossTensors(1.7, 0.15)
    assert SupportLoss().at({}) == PLAIN


@pytest.mark.parametrize("name", LEARNED)
def test_the_support_loss_is_changed_and_the_query_loss_is_not(name: str) -> None:
    learned, plain = transformer_problem(support_loss=LEARNED[name]), transformer_problem()
    fast = learned.unroll.learner.init(learned.meta, 2)
    for objective, is_same in (("query", True), ("support", False)):
        losses = [
            p.unroll.learner.losses(objective, learned.meta, fast, learned.batch, 0)[0]  # type: ignore[arg-type]
            for p in (learned, plain)
        ]
        assert torch.equal(losses[0], losses[1]) == is_same


WAYS: dict[str, tuple[Hypergradient, bool, int | None]] = {
    "rematerialized": (Rematerialized(), False, None),
    "mixed_mode": (MixedMode(), False, None),
    "unrolled, in chunks": (Unrolled(), False, 5),
    "rematerialized, in chunks, blocks recomputed": (Rematerialized(), True, 5),
    "mixed_mode, in chunks, blocks recomputed": (MixedMode(), True, 5),
    "mixed_mode, graphs kept, in chunks": (MixedMode(num_graph_steps=2), False, 4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("fast", ["lora and head", "full"])
def test_every_exact_way_equals_unrolled(way: str, name: str, fast: Fast) -> None:
    estimator, blocks, head_chunk = WAYS[way]
    problem = transformer_problem(fast, support_loss=LEARNED[name], grain="shared")
    actual = hypergradient(recomputing(problem, blocks=blocks, head_chunk=head_chunk), estimator)
    # Sums in another order. Every loss parameter has a gradient that is not zero.
    assert_gradients_agree(actual, hypergradient(problem), rtol=1e-9)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("head_chunk", [None, 5])
def test_the_hypergradient_of_a_loss_parameter_is_that_of_finite_differences(
    name: str, head_chunk: int | None
) -> None:
    problem = recomputing(
        transformer_problem(support_loss=LEARNED[name]), blocks=False, head_chunk=head_chunk
    )
    gradient = hypergradient(problem, Rematerialized())
    parameters = [key for key in problem.meta if key.startswith("loss.")]
    assert len(parameters) == len(LEARNED[name].learned)
    for key in parameters:
        step = 1e-5
        above, below = (
            meta_loss(problem, problem.meta | {key: problem.meta[key] + sign * step}) for sign in (1.0, -1.0)
        )
        # Truncation and rounding are both near 1e-10 for losses of order 10.
        assert (above - below) / (2.0 * step) == pytest.approx(float(gradient[key]), rel=1e-5, abs=1e-9)


def test_a_fixed_temperature_is_the_one_that_a_learned_one_starts_at() -> None:
    fixed = transformer_problem(support_loss=SupportLoss(1.7, 0.15))
    learned = transformer_problem(support_loss=BOTH)
    # Not perturbed, as the problem's meta-parameters are.
    meta = fixed.meta | BOTH.meta_parameters(torch.empty(0, dtype=torch.float64))
    whole = Unrolled().meta_gradient(learned.unroll, meta, learned.batch).gradient
    expected = hypergradient(fixed)
    assert distance({name: whole[name] for name in expected}, expected) < 1e-12


def meta_loss(problem: Problem, meta: dict[str, Tensor]) -> float:
    """The sum of the tasks' meta-losses, from forward passes alone."""
    unroll, batch = problem.unroll, problem.batch
    path = list(adapt(unroll, meta, batch, num_steps=unroll.num_steps))
    losses = [unroll.learner.losses("query", meta, at.fast, batch, 0)[0] for at in path]
    return float(sum(w * loss.detach().sum() for w, loss in zip(unroll.step_weights, losses, strict=True)))
