"""Tasks of different sizes, padded and side by side, are computed as if each were alone and unpadded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.solvers import Neumann
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.losses import IGNORE, SupportLoss
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError
from tests.numerics.kinds_of_tasks import (
    ALIKE,
    CLASSIFYING,
    LEARNED_LOSS,
    MODELLING,
    NUMBERS,
    Setting,
    problem_of,
)
from tests.numerics.problems import relative_error

EXACT: dict[str, Hypergradient] = {
    "unrolled": Unrolled(),
    "rematerialized": Rematerialized(),
    "mixed_mode, graph of a step kept": MixedMode(num_graph_steps=1),
}
SETTINGS = {
    "images, loop": Setting("images", "loop", has_ways=True),
    "images, loop, recomputed": Setting(
        "images", "loop", CLASSIFYING, has_ways=True, recompute_blocks=True, head_chunk=2
    ),
    "images, vmap": Setting("images", "vmap", CLASSIFYING, has_ways=True, support_loss=LEARNED_LOSS),
    "numbers, loop": Setting(
        "numbers", "loop", ALIKE, has_ways=True, support_loss=LEARNED_LOSS, head_chunk=3
    ),
    "regression, vmap": Setting("regression", "vmap", ALIKE),
    "regression, lora": Setting("regression", "lora", CLASSIFYING, recompute_blocks=True, head_chunk=2),
    "tokens, lora, recomputed": Setting(
        "tokens", "lora", ALIKE, dropout=0.3, recompute_blocks=True, head_chunk=4, support_loss=LEARNED_LOSS
    ),
    "tokens, loop": Setting("tokens", "loop", dropout=0.3),
    "sequences, lora": Setting("sequences", "lora", MODELLING, has_ways=True, dropout=0.3),
    "images, head": Setting("images", "head", CLASSIFYING, has_ways=True),
    "images, norm_bias, recomputed": Setting(
        "images", "norm_bias", CLASSIFYING, has_ways=True, recompute_blocks=True
    ),
    "regression, head": Setting("regression", "head", ALIKE),
    "tokens, head, recomputed": Setting("tokens", "head", ALIKE, recompute_blocks=True, head_chunk=4),
    "sequences, norm_bias": Setting("sequences", "norm_bias", MODELLING, has_ways=True, dropout=0.3),
    "tokens, soft_prompt, recomputed": Setting(
        "tokens", "soft_prompt", ALIKE, dropout=0.3, recompute_blocks=True, head_chunk=4
    ),
    "sequences, soft_prompt": Setting("sequences", "soft_prompt", MODELLING, has_ways=True, dropout=0.3),
    "sequences, vmap": Setting("sequences", "vmap", MODELLING, has_ways=True),
}


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("name", SETTINGS)
def test_padded_tasks_side_by_side_equal_each_alone_without_padding(name: str, estimator: str) -> None:
    _assert_padding_changes_nothing(SETTINGS[name], EXACT[estimator], rtol=1e-10)


APPROXIMATE: dict[str, Hypergradient] = {
    "first_order": FirstOrder(),
    "truncated": Truncated(num_steps=1, exact=MixedMode()),
    "implicit": Implicit(Neumann(4, 0.2)),
    "finite_difference": FiniteDifference(),
    "reptile": Reptile(),
}


@pytest.mark.parametrize("estimator", APPROXIMATE)
def test_padding_changes_nothing_for_approximate_estimators_either(estimator: str) -> None:
    rule = Sgd(GradientTerms(proximal=0.4))
    setting = Setting("images", "loop", CLASSIFYING, has_ways=True, rule=rule, step_weights=(0.0, 0.0, 1.0))
    setting = dataclasses.replace(setting, grain="none")
    if estimator == "reptile":
        setting = dataclasses.replace(setting, rehearsal=dataclasses.replace(CLASSIFYING, outer_ratio=0.0))
    # A difference over 0.02 divides rounding by that.
    _assert_padding_changes_nothing(setting, APPROXIMATE[estimator], rtol=1e-8)


def _assert_padding_changes_nothing(setting: Setting, estimator: Hypergradient, *, rtol: float) -> None:
    padded = problem_of(setting, NUMBERS, is_padded=True)
    meta = padded.meta
    together = estimator.meta_gradient(padded.unroll, meta, padded.batch)
    alone = [problem_of(setting, (number,), is_padded=False) for number in NUMBERS]
    parts = [estimator.meta_gradient(one.unroll, meta, one.batch) for one in alone]
    total: dict[str, Tensor] = {
        name: torch.stack([part.gradient[name] for part in parts]).sum(0) for name in meta
    }
    whole = torch.cat([value.flatten() for value in total.values()])
    assert float(torch.linalg.vector_norm(whole)) > 1e-3, "the case tests nothing"
    # Sums of other lengths are added in another order.
    error = relative_error(torch.cat([together.gradient[name].flatten() for name in total]), whole)
    assert error <= rtol
    losses = torch.cat([part.losses for part in parts])
    torch.testing.assert_close(together.losses, losses, rtol=1e-12, atol=0)
    for name, value in together.metrics.items():
        expected = torch.cat([part.metrics[name] for part in parts])
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", SETTINGS)
def test_curves_of_padded_tasks_equal_those_of_each_alone(name: str) -> None:
    padded = problem_of(SETTINGS[name], NUMBERS, is_padded=True)
    together = adaptation_curve(padded.unroll, padded.meta, padded.batch, num_steps=2)
    alone = [problem_of(SETTINGS[name], (number,), is_padded=False) for number in NUMBERS]
    curves = [adaptation_curve(one.unroll, padded.meta, one.batch, num_steps=2) for one in alone]
    assert together.keys() == {"loss"} | set(padded.unroll.learner.scores)
    for measure, value in together.items():
        assert value.dtype == torch.float64
        expected = torch.cat([curve[measure] for curve in curves])
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("support_loss", [SupportLoss(), LEARNED_LOSS])
def test_sequences_without_a_counted_token_cost_nothing_and_leave_every_derivative_finite(
    estimator: str, support_loss: SupportLoss
) -> None:
    setting = Setting("tokens", "lora", ALIKE, support_loss=support_loss)
    problem = problem_of(setting, (3, 3), is_padded=False)
    targets = problem.batch.support["targets"].clone()
    targets[0, 1:3] = IGNORE
    targets[1] = IGNORE
    batch = dataclasses.replace(problem.batch, support={**problem.batch.support, "targets": targets})
    result = EXACT[estimator].meta_gradient(problem.unroll, problem.meta, batch)
    assert all(value.isfinite().all() for value in (*result.gradient.values(), result.losses))
    fast = problem.unroll.learner.init(problem.meta, 2)
    plain = dataclasses.replace(problem.unroll.learner, rehearsal=None)
    losses, measures = plain.losses("support", problem.meta, fast, batch, 0)
    counted, measures_of_counted = plain.losses(
        "support",
        problem.meta,
        fast,
        dataclasses.replace(
            batch, support={name: value[:, [0, 3, 4]] for name, value in batch.support.items()}
        ),
        0,
    )
    # Five examples, two of which cost nothing.
    torch.testing.assert_close(losses, counted * 3 / 5, rtol=1e-12, atol=0)
    assert losses[1] == 0.0
    # What asks for nothing is answered neither rightly nor wrongly.
    assert measures_of_counted["accuracy"][0] > 0.0
    torch.testing.assert_close(measures["accuracy"][0], measures_of_counted["accuracy"][0])
    assert measures["accuracy"][1] == 0.0


def test_a_norm_over_other_rows_than_examples_is_refused_where_there_is_padding() -> None:
    class Folded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, inputs: Tensor) -> Tensor:
            folded: Tensor = self.norm(inputs.view(-1, 2))
            return folded.view(inputs.shape)

    adapter = FullAdapter(Folded().double())
    forward_pass = ForwardPass(Precision("float64"), torch.device("cpu"), weights=torch.ones(1, 3))
    inputs = torch.randn(1, 3, 4, dtype=torch.float64)
    with pytest.raises(
        CapabilityError, match=r"a batch of 6 where it was called with 3 examples.*group or l"
    ):
        adapter.forward({}, adapter.init({}, 1), inputs, forward_pass)


def test_lora_adapts_the_classifier_and_not_the_head_over_the_vocabulary() -> None:
    problem = problem_of(SETTINGS["sequences, lora"], (3,), is_padded=False)
    assert isinstance(problem.unroll.learner.adapter, LoraAdapter)
    layers = {name.rpartition(".")[0] for name in problem.unroll.learner.init(problem.meta, 1)}
    assert "classifier" in layers
    assert "head" not in layers
