"""A loss that tasks adapt by, learned: temperature, label smoothing, weights of classes and of groups.

Shape letters: T tasks, N examples, L tokens, C classes.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.adapters.model import Readout
from metaloom.engine.examples import Reading, read
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.rates import Grain
from metaloom.engine.losses import (
    IGNORE,
    PLAIN,
    CrossEntropy,
    LossTensors,
    MeanSquaredError,
    SupportLoss,
    token_losses,
)
from metaloom.engine.unroll import adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, assert_gradients_agree
from tests.numerics.token_problems import (
    VOCABULARY,
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
    "weights of classes": SupportLoss(learned=("class_weights",), num_classes=VOCABULARY),
    "weights of groups": SupportLoss(learned=("group_weights",), groups=("even", "odd", "none of them")),
    "all": SupportLoss(
        1.7,
        0.15,
        ("class_weights", "temperature", "group_weights", "label_smoothing"),
        num_classes=VOCABULARY,
        groups=("odd",),
    ),
}
GROUPS = ("even", "odd")  # of the problem's two tasks


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


def problem_of(name: str, fast: Fast = "lora", grain: Grain = "none") -> Problem:
    """The transformer's problem under a learned loss, its two tasks each of a group."""
    problem = transformer_problem(fast, support_loss=LEARNED[name], grain=grain)
    return dataclasses.replace(problem, batch=dataclasses.replace(problem.batch, groups=GROUPS))


@pytest.mark.parametrize("name", LEARNED)
def test_the_support_loss_is_changed_and_the_query_loss_is_not(name: str) -> None:
    learned, plain = problem_of(name), transformer_problem()
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
    problem = problem_of(name, fast, grain="shared")
    actual = hypergradient(recomputing(problem, blocks=blocks, head_chunk=head_chunk), estimator)
    # Sums in another order. Every loss parameter has a gradient that is not zero.
    assert_gradients_agree(actual, hypergradient(problem), rtol=1e-9)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("head_chunk", [None, 5])
def test_the_hypergradient_of_a_loss_parameter_is_that_of_finite_differences(
    name: str, head_chunk: int | None
) -> None:
    problem = recomputing(problem_of(name), blocks=False, head_chunk=head_chunk)
    gradient = hypergradient(problem, Rematerialized())
    parameters = [key for key in problem.meta if key.startswith("loss.")]
    assert len(parameters) == len(LEARNED[name].learned)
    for seed, key in enumerate(parameters):
        along = random(*problem.meta[key].shape, seed=seed) if problem.meta[key].ndim else torch.tensor(1.0)
        step = 1e-5
        above, below = (
            meta_loss(problem, problem.meta | {key: problem.meta[key] + sign * step * along})
            for sign in (1.0, -1.0)
        )
        expected = float((gradient[key] * along).sum())
        # Truncation and rounding are both near 1e-10 for losses of order 10.
        assert (above - below) / (2.0 * step) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_support_examples_count_by_class_and_tasks_by_group() -> None:
    """Weights written out, on a mean over examples whose targets are one token each, in part ignored."""
    logits, u = random(2, 3, 5), torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25], dtype=torch.float64)
    targets = torch.tensor([[0, 3, IGNORE], [2, 2, 4]])
    loss = SupportLoss(learned=("class_weights", "group_weights"), num_classes=5, groups=("odd", "other"))
    meta = {"loss.class_weights": u.log(), "loss.group_weights": torch.tensor([3.0, 7.0]).double().log()}
    read_by = Reading(CrossEntropy(), None, loss.at(meta))
    found = read(Readout(logits), targets, None, read_by, head_chunk=None, derivative="once").loss()
    log_p = logits.log_softmax(-1)
    for task in range(2):
        costs = [
            -float(u[target] * log_p[task, row, target])
            for row, target in enumerate(targets[task].tolist())
            if target != IGNORE
        ]
        # An example without a target that counts costs nothing, and is an example all the same.
        assert float(found[task]) == pytest.approx(sum(costs) / 3, rel=1e-13)
    weights = loss.of_groups(meta, ("other", None, "odd", "unheard of"))
    assert weights is not None
    assert weights.tolist() == pytest.approx([7.0, 1.0, 3.0, 1.0])


def test_weights_start_at_one_and_change_nothing_there() -> None:
    learned = transformer_problem(support_loss=LEARNED["weights of classes"])
    plain = transformer_problem()
    start = LEARNED["weights of classes"].meta_parameters(torch.empty(0, dtype=torch.float64))
    assert {name: tuple(value.shape) for name, value in start.items()} == {
        "loss.class_weights": (VOCABULARY,)
    }
    whole = Unrolled().meta_gradient(learned.unroll, plain.meta | start, learned.batch).gradient
    expected = hypergradient(plain)
    assert distance({name: whole[name] for name in expected}, expected) < 1e-12


def test_weights_of_groups_are_for_any_loss_and_those_of_classes_for_classes() -> None:
    groups = SupportLoss(learned=("group_weights",), groups=("a",))
    learner = transformer_problem().unroll.learner
    dataclasses.replace(learner, criterion=MeanSquaredError(), support_loss=groups)
    classes = SupportLoss(learned=("class_weights",), num_classes=2)
    with pytest.raises(CapabilityError, match="learned: class_weights; these belong to the cross-entropy"):
        dataclasses.replace(learner, criterion=MeanSquaredError(), support_loss=classes)


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
