"""Dropout as a part of adaptation: the same draws whenever, wherever and with whomever a step is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.draws import Draws
from metaloom.engine.forward_pass import Derivative, ForwardPass, Interception
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.snapshots import Binomial
from metaloom.engine.unroll import adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import FOR_EVERYTHING, Problem, assert_gradients_agree
from tests.numerics.token_problems import Fast, distance, hypergradient, recomputing, transformer_problem

P = 0.3
NUMBERS = (3, 8, 21)


def problem_of(fast: Fast = "lora", *, seed: int = 0, dropout: float = P) -> Problem:
    return transformer_problem(
        fast, dropout=dropout, backbone=fast == "lora", numbers=NUMBERS, seed=seed, grain="shared"
    )


WAYS: dict[str, tuple[Hypergradient, bool, int | None]] = {
    "rematerialized": (Rematerialized(), False, None),
    "mixed_mode": (MixedMode(), False, None),
    "unrolled, blocks and head recomputed": (Unrolled(), True, 5),
    "rematerialized, blocks and head recomputed, one snapshot": (Rematerialized(Binomial(1)), True, 5),
    "mixed_mode, blocks recomputed, one snapshot": (MixedMode(Binomial(1)), True, None),
    "rematerialized, one graph kept": (Rematerialized(num_graph_steps=1), False, None),
    "mixed_mode, two graphs kept, blocks recomputed": (MixedMode(num_graph_steps=2), True, None),
}


@pytest.mark.parametrize("fast", ["lora", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_every_exact_way_equals_unrolled_with_dropout(fast: Fast, way: str) -> None:
    estimator, blocks, head_chunk = WAYS[way]
    problem = problem_of(fast)
    actual = hypergradient(recomputing(problem, blocks=blocks, head_chunk=head_chunk), estimator)
    # Sums in another order; other draws would differ by tens of percent.
    assert_gradients_agree(actual, hypergradient(problem), rtol=1e-9)


def test_dropout_changes_the_hypergradient_and_so_does_the_seed() -> None:
    with_dropout = hypergradient(problem_of())
    assert distance(hypergradient(problem_of(dropout=0.0)), with_dropout) > 0.05
    assert distance(hypergradient(problem_of(seed=1)), with_dropout) > 0.05


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode", "first_order"])
@pytest.mark.parametrize("size", [1, 2])
def test_any_micro_batch_split_sums_to_the_same_hypergradient(estimator: str, size: int) -> None:
    problem = problem_of()
    chosen = HYPERGRADIENTS[estimator]()
    parts = [
        hypergradient(dataclasses.replace(problem, batch=batch), chosen)
        for batch in problem.batch.split(size)
    ]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in problem.meta}
    assert_gradients_agree(total, hypergradient(problem, chosen), rtol=1e-9)


def test_a_task_alone_adapts_as_it_does_among_others() -> None:
    problem = problem_of()
    together = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=3))[-1].fast
    for task, batch in enumerate(problem.batch.split(1)):
        alone = list(adapt(problem.unroll, problem.meta, batch, num_steps=3))[-1].fast
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][task], rtol=1e-11, atol=1e-14)


def test_the_hypergradient_is_that_of_finite_differences_of_the_meta_loss() -> None:
    problem = problem_of()
    unroll, batch = problem.unroll, problem.batch

    def meta_loss(meta: dict[str, Tensor]) -> float:
        path = list(adapt(unroll, meta, batch, num_steps=unroll.num_steps))
        losses = [unroll.learner.losses("query", meta, at.fast, batch, 0)[0] for at in path]
        return float(sum(w * loss.sum() for w, loss in zip(unroll.step_weights, losses, strict=True)))

    gradient = hypergradient(problem, Rematerialized())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in problem.meta.items()
        }
        slope = sum(float((gradient[name] * value).sum()) for name, value in direction.items())
        # The draws do not depend on theta, so the loss is smooth: truncation and rounding are near 1e-8.
        step = 1e-6
        above, below = (
            meta_loss({name: value + sign * step * direction[name] for name, value in problem.meta.items()})
            for sign in (1.0, -1.0)
        )
        assert (above - below) / (2.0 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_query_and_retention_losses_have_no_dropout() -> None:
    with_dropout, without = problem_of(), problem_of(dropout=0.0)
    fast = with_dropout.unroll.learner.init(with_dropout.meta, len(NUMBERS))
    batch = dataclasses.replace(with_dropout.batch, retention=with_dropout.batch.query)
    for objective in ("query", "retention", "support"):
        losses = [
            problem.unroll.learner.losses(objective, problem.meta, fast, batch, 0)[0]
            for problem in (with_dropout, without)
        ]
        assert torch.equal(losses[0], losses[1]) == (objective != "support")


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    for estimator in (HYPERGRADIENTS[name] for name in FOR_EVERYTHING):
        hypergradient(recomputing(problem_of(), blocks=True, head_chunk=None), estimator())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_evaluation_mode_has_no_dropout() -> None:
    problem = problem_of()
    problem.model.eval()
    assert distance(hypergradient(problem), hypergradient(problem_of(dropout=0.0))) == 0.0


# --- draws -------------------------------------------------------------------------------------------------


def masks(draws: Draws, site: str = "a", *, probability: float = P) -> Tensor:
    ones = torch.ones(len(draws.numbers) * 4, 50, dtype=torch.float64)
    return draws.dropout(ones, probability, site).view(len(draws.numbers), -1)


def test_draws_differ_between_tasks_steps_sites_and_seeds_and_are_the_same_again() -> None:
    draws = Draws(0, (3, 8), 1)
    drawn = masks(draws)
    assert torch.equal(masks(draws), drawn)
    assert not torch.equal(drawn[0], drawn[1])
    others = [masks(Draws(0, (3, 8), 2)), masks(draws, "b"), masks(Draws(1, (3, 8), 1))]
    others.append(masks(Draws(0, (4, 9), 1)))
    for other in others:
        # Independent masks agree in 0.58 of their entries.
        assert 0.4 < float((other == drawn).double().mean()) < 0.75


def test_a_tasks_draws_are_the_same_alone_in_another_place_and_among_others() -> None:
    drawn = masks(Draws(7, (3, 8, 21), 1))
    assert torch.equal(masks(Draws(7, (8, 21, 3), 1))[2], drawn[0])
    assert torch.equal(masks(Draws(7, (3, 8, 21), 1).of_task(1))[0], drawn[1])


@pytest.mark.parametrize("row", [(3,), (64,), (257, 129)])
def test_examples_that_are_appended_leave_the_draws_of_those_before_them(row: tuple[int, ...]) -> None:
    def drawn(num_examples: int) -> Tensor:
        masks = Draws(7, (3, 8), 1).dropout(torch.ones(2 * num_examples, *row), 0.5, "a")
        return masks.view(2, num_examples, *row)

    few, many = drawn(4), drawn(9)
    assert torch.equal(many[:, :4], few)
    assert not any(torch.equal(many[0, one], many[0, one + 1]) for one in range(8) if row != (3,))


def test_the_passes_of_a_step_draw_each_for_itself() -> None:
    draws = Draws(7, (3, 8), 1)
    other = dataclasses.replace(draws, part="rehearsal/")
    assert 0.4 < float((masks(other) == masks(draws)).double().mean()) < 0.75
    assert torch.equal(masks(other.of_task(1))[0], masks(other)[1])


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(probability: float) -> None:
    ones = torch.ones(2 * 100, 500, dtype=torch.float64)
    drawn = Draws(0, (1, 2), 0).dropout(ones, probability, "a")
    assert torch.unique(drawn).tolist() == pytest.approx([0.0, 1.0 / (1.0 - probability)])
    # 100,000 draws: the mean's deviation is sqrt(p / (1 - p)) / 316, 0.0095 at most; four of them.
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.04)


def test_probability_one_drops_everything_and_zero_nothing() -> None:
    ones = torch.ones(4, 3)
    draws = Draws(0, (1, 2), 0)
    assert torch.equal(draws.dropout(ones, 1.0, "a"), torch.zeros(4, 3))
    assert torch.equal(draws.dropout(ones, 0.0, "a"), ones)


def test_each_dropout_of_a_pass_draws_for_itself() -> None:
    hidden = torch.ones(2, 64, dtype=torch.float64)
    with Interception(forward_pass("once")) as interception:
        first, second = F.dropout(hidden, P), F.dropout(hidden, P)
        with interception.region("0#1"):
            third = F.dropout(hidden, P)
        fourth = F.dropout(hidden, P)
    with Interception(forward_pass("once")) as interception, interception.region("0#1"):
        assert torch.equal(F.dropout(hidden, P), third)
    drawn = [first, second, third, fourth]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


# --- refusals ----------------------------------------------------------------------------------------------


def forward_pass(derivative: Derivative) -> ForwardPass:
    return ForwardPass(
        precision=Precision("float64"),
        device=torch.device("cpu"),
        derivative=derivative,
        draws=Draws(0, (1,), 0),
    )


X = torch.ones(1, 5, 8)
RANDOM: dict[str, Callable[[], object]] = {
    "torch.rand_like": lambda: torch.rand_like(X),
    "torch.randn": lambda: torch.randn(3),
    "torch.bernoulli": lambda: torch.bernoulli(X),
    "torch.normal": lambda: torch.normal(X, 1.0),
    "torch.Tensor.normal_": lambda: X.clone().normal_(),
    "torch.Tensor.uniform_": lambda: X.clone().uniform_(),
    "torch.nn.functional.dropout2d": lambda: F.dropout2d(X[None]),
    "torch.nn.functional.alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "torch.nn.functional.gumbel_softmax": lambda: F.gumbel_softmax(X),
    "torch.nn.functional.rrelu": lambda: F.rrelu(X, training=True),
}
# Their draws are made inside torch, where no call is seen.
HIDDEN: dict[str, Callable[[], Callable[[], object]]] = {
    "recurrent layer": lambda: functools.partial(nn.LSTM(8, 8, 2, dropout=0.5), X),
    "Tensor.cauchy_": lambda: X.clone().cauchy_,
    "torch.native_dropout": lambda: functools.partial(torch.native_dropout, X, 0.5, True),
}


@pytest.mark.parametrize("derivative", ["once", "reverse", "forward"])
@pytest.mark.parametrize("name", RANDOM)
def test_a_function_that_draws_is_refused_by_name(name: str, derivative: Derivative) -> None:
    with (
        pytest.raises(CapabilityError, match=f"the model calls {name}, whose draws cannot be repeated"),
        Interception(forward_pass(derivative)),
    ):
        RANDOM[name]()


@pytest.mark.parametrize("derivative", ["once", "reverse", "forward"])
@pytest.mark.parametrize("name", HIDDEN)
def test_draws_inside_a_function_of_torch_are_refused(name: str, derivative: Derivative) -> None:
    run = HIDDEN[name]()
    with (
        pytest.raises(CapabilityError, match="torch's random generator moved while the model ran"),
        Interception(forward_pass(derivative)),
    ):
        run()


def by_name() -> Tensor:
    return F.scaled_dot_product_attention(X, X, X, dropout_p=0.2)


def by_position() -> Tensor:
    return F.scaled_dot_product_attention(X, X, X, None, 0.2)


@pytest.mark.parametrize("derivative", ["once", "reverse", "forward"])
@pytest.mark.parametrize("attend", [by_name, by_position])
def test_dropout_inside_an_attention_is_refused_in_every_pass(
    derivative: Derivative, attend: Callable[[], Tensor]
) -> None:
    with (
        pytest.raises(CapabilityError, match=r"attention dropout \(0\.2\)"),
        Interception(forward_pass(derivative)),
    ):
        attend()


def test_layers_of_torch_without_dropout_are_not_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    with Interception(forward_pass("once")):
        assert layer(X).shape == X.shape


def test_an_error_of_the_model_is_not_covered_by_one_about_its_draws() -> None:
    def draw_and_fail() -> float:
        return float(X.clone().cauchy_()[0, 0, 0]) / 0.0

    with pytest.raises(ZeroDivisionError), Interception(forward_pass("once")):
        draw_and_fail()


@pytest.mark.parametrize("estimator", FOR_EVERYTHING)
def test_dropout_under_vmap_is_refused(estimator: str) -> None:
    problem = problem_of("full under vmap")
    assert isinstance(problem.unroll.learner.adapter, FullAdapter)
    with pytest.raises(CapabilityError, match="dropout is not drawn inside vmap: set"):
        hypergradient(problem, HYPERGRADIENTS[estimator]())


def test_a_batch_keeps_its_numbers_when_it_is_split() -> None:
    batch: TaskBatch = problem_of().batch
    assert [part.numbers for part in batch.split(2)] == [(3, 8), (21,)]
