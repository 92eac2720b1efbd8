"""The outer optimizer: what it does with a gradient, and that its state is all there is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from metaloom.engine.outer import MAX_SKIPPED_IN_A_ROW, OuterOptimizer, OuterSettings
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError, MetaloomError

PLAIN = OuterSettings(
    optimizer="adam",
    lr=0.02,
    lr_rates=0.1,
    lr_loss=0.1,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.3,
    num_steps=12,
    warmup_steps=0,
    decay="constant",
    final_ratio=0.1,
    clip_norm=None,
    ema=None,
)
SHAPES = {"init.weight": (3, 2), "init.bias": (3,), "backbone.w": (2, 2), "rates.table": (2, 2)}
NAN = {name: torch.full(shape, math.nan) for name, shape in SHAPES.items()}


def noise(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def settings(**changes: object) -> OuterSettings:
    return dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # float32 with operations in another order.
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7)


def test_adam_equals_torchs_adamw_with_the_schedule_written_out() -> None:
    outer = OuterOptimizer(noise(0), settings(warmup_steps=3, decay="cosine"), Replicated())
    parameters = {name: value.clone().requires_grad_() for name, value in noise(0).items()}
    # Vectors and the logarithms of rates do not decay.
    decays = {"init.weight": 0.3, "init.bias": 0.0, "backbone.w": 0.3, "rates.table": 0.0}
    peaks = {"init.weight": 0.02, "init.bias": 0.02, "backbone.w": 0.02, "rates.table": 0.1}
    optimizers = {
        name: torch.optim.AdamW(
            [value], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=decays[name], foreach=False
        )
        for name, value in parameters.items()
    }
    # A quarter, a half, three quarters; then from 1 to 0.1 along half a period over 9 steps.
    factors = [0.25, 0.5, 0.75, *(0.1 + 0.45 * (1 + math.cos(math.pi * k / 9)) for k in range(9)), 0.1, 0.1]
    for step, factor in enumerate(factors):
        gradient = noise(step + 1)
        metrics = outer.update(gradient)
        assert metrics["outer_lr"] == pytest.approx(0.02 * factor)
        assert metrics["skipped"] == 0.0
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = factor * peaks[name]
            parameters[name].grad = gradient[name]
            optimizer.step()
    assert_close(outer.meta, {name: value.detach() for name, value in parameters.items()})


def test_sgd_equals_torchs_sgd_with_momentum() -> None:
    outer = OuterOptimizer(noise(0), settings(optimizer="sgd", weight_decay=0.0), Replicated())
    parameters = {name: value.clone().requires_grad_() for name, value in noise(0).items()}
    optimizer = torch.optim.SGD(
        [{"params": [value], "lr": 0.1 if "rates" in name else 0.02} for name, value in parameters.items()],
        lr=1.0,
        momentum=0.9,
    )
    for step in range(4):
        outer.update(noise(step + 1))
        for name, value in noise(step + 1).items():
            parameters[name].grad = value
        optimizer.step()
    assert_close(outer.meta, {name: value.detach() for name, value in parameters.items()})


def test_parts_have_learning_rates_of_their_own() -> None:
    changed = settings(optimizer="sgd", betas=(0.0, 0.0), lr_parts={"init.w*": 0.5, "backbone": 0.25})
    outer = OuterOptimizer(noise(0), changed, Replicated())
    gradient = noise(1)
    outer.update(gradient)
    rates = {"init.weight": 0.5, "init.bias": 0.02, "backbone.w": 0.25, "rates.table": 0.1}
    decays = {"init.weight": 0.3, "init.bias": 0.0, "backbone.w": 0.3, "rates.table": 0.0}
    moved = {
        name: value - rates[name] * (gradient[name] + decays[name] * value)
        for name, value in noise(0).items()
    }
    assert_close(outer.meta, moved)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"init.v": 0.1},
            r"'init\.v' matches no meta-parameter .* learns backbone\.w, init\.bias, init\.weight\.",
        ),
        ({"rates": 0.1}, "'rates' matches no meta-parameter that outer.optimizer.lr is for"),
        ({"init": 0.1, "*.bias": 0.2}, r"'init' and '\*\.bias' both match init\.bias"),
    ],
)
def test_parts_that_are_none_or_two_are_refused(parts: dict[str, float], said: str) -> None:
    with pytest.raises(CapabilityError, match=said):
        OuterOptimizer(noise(0), settings(lr_parts=parts), Replicated())


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_warm_up_rises_linearly_and_never_starts_at_zero(warmup: int) -> None:
    outer = OuterOptimizer(noise(0), settings(warmup_steps=warmup), Replicated())
    factors = [outer.lr_factor(step) for step in range(warmup + 3)]
    assert factors == pytest.approx([*((k + 1) / (warmup + 1) for k in range(warmup)), 1.0, 1.0, 1.0])


def test_the_cosine_ends_at_the_final_ratio_and_stays_there() -> None:
    outer = OuterOptimizer(noise(0), settings(decay="cosine", warmup_steps=2, num_steps=10), Replicated())
    assert outer.lr_factor(2) == 1.0
    assert outer.lr_factor(6) == pytest.approx(0.55)
    assert outer.lr_factor(10) == pytest.approx(0.1)
    assert outer.lr_factor(1000) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_training_leaves_a_finite_rate() -> None:
    outer = OuterOptimizer(noise(0), settings(decay="cosine", warmup_steps=12), Replicated())
    assert all(0.0 < outer.lr_factor(step) <= 1.0 for step in range(14))


@pytest.mark.parametrize("scale", [100.0, 0.001])
def test_clipping_scales_a_gradient_down_to_the_norm_and_never_up(scale: float) -> None:
    plain = settings(optimizer="sgd", betas=(0.0, 0.0), weight_decay=0.0, lr_rates=0.02)
    outer = OuterOptimizer(noise(0), dataclasses.replace(plain, clip_norm=0.5), Replicated())
    gradient = noise(1, scale)
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
    metrics = outer.update(gradient)
    assert metrics["gradient_norm"] == pytest.approx(norm)
    factor = min(1.0, 0.5 / norm)
    assert_close(
        outer.meta, {name: value - 0.02 * factor * gradient[name] for name, value in noise(0).items()}
    )


def test_the_moving_average_follows_its_formula() -> None:
    outer = OuterOptimizer(noise(0), settings(ema=0.4), Replicated())
    average = noise(0)
    for step in range(1, 9):
        outer.update(noise(step))
        decay = min(0.4, step / (step + 9))
        average = {name: decay * value + (1 - decay) * outer.meta[name] for name, value in average.items()}
    # 0.4 is reached at step 6: both sides of the minimum were met.
    assert_close(outer.evaluation_parameters(), average)
    assert not torch.equal(outer.evaluation_parameters()["init.weight"], outer.meta["init.weight"])


def test_without_an_average_the_meta_parameters_themselves_are_evaluated() -> None:
    outer = OuterOptimizer(noise(0), PLAIN, Replicated())
    outer.update(noise(1))
    assert_equal(outer.evaluation_parameters(), outer.meta)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_but_the_schedule(bad: float) -> None:
    outer = OuterOptimizer(noise(0), settings(ema=0.9, warmup_steps=5), Replicated())
    outer.update(noise(1))
    before = {name: value.clone() for name, value in outer.tensors().items()}
    gradient = noise(2)
    gradient["init.bias"][1] = bad
    metrics = outer.update(gradient)
    assert metrics["skipped"] == 1.0
    assert not math.isfinite(metrics["gradient_norm"])
    assert_equal(outer.tensors(), before)
    assert outer.step == 2
    assert outer.update(noise(3))["outer_lr"] == pytest.approx(0.02 * 3 / 6)


def test_ten_gradients_in_a_row_that_are_not_finite_end_the_run() -> None:
    outer = OuterOptimizer(noise(0), PLAIN, Replicated())
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        outer.update(NAN)
    with pytest.raises(MetaloomError, match=r"outer step 10: the meta-gradient was not finite 10 times"):
        outer.update(NAN)


def test_a_finite_gradient_starts_the_count_of_skipped_steps_anew() -> None:
    outer = OuterOptimizer(noise(0), PLAIN, Replicated())
    for _ in range(2):
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            outer.update(NAN)
        outer.update(noise(1))
    assert outer.scalars() == {"step": 20, "skipped_in_a_row": 0}


VARIANTS = {
    "adam": settings(decay="cosine", warmup_steps=3, clip_norm=1.0),
    "adam with an average": settings(ema=0.9),
    "sgd": settings(optimizer="sgd"),
    "sgd without momentum": settings(optimizer="sgd", betas=(0.0, 0.0), ema=0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_before", [0, 1, 5])
def test_an_optimizer_loaded_from_anothers_state_continues_bit_for_bit(variant: str, num_before: int) -> None:
    whole = OuterOptimizer(noise(0), VARIANTS[variant], Replicated())
    for step in range(num_before):
        whole.update(noise(step + 1))
    resumed = OuterOptimizer(noise(99), VARIANTS[variant], Replicated())
    resumed.load(whole.tensors(), whole.scalars())
    for step in range(num_before, num_before + 4):
        assert whole.update(noise(step + 1)) == resumed.update(noise(step + 1))
        assert_equal(resumed.tensors(), whole.tensors())
        assert resumed.scalars() == whole.scalars()
    assert_equal(resumed.evaluation_parameters(), whole.evaluation_parameters())


def test_an_optimizer_shares_no_memory_with_what_it_was_given() -> None:
    meta = noise(0)
    outer = OuterOptimizer(meta, settings(ema=0.9), Replicated())
    outer.update(noise(1))
    assert_equal(meta, noise(0))
    saved = {name: value.clone() for name, value in outer.tensors().items()}
    given = {name: value.clone() for name, value in saved.items()}
    outer.load(given, outer.scalars())
    outer.update(noise(2))
    assert_equal(given, saved)


def test_the_count_of_skipped_steps_is_part_of_the_state() -> None:
    outer = OuterOptimizer(noise(0), PLAIN, Replicated())
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        outer.update(NAN)
    resumed = OuterOptimizer(noise(0), PLAIN, Replicated())
    resumed.load(outer.tensors(), outer.scalars())
    with pytest.raises(MetaloomError, match="10 times in a row"):
        resumed.update(NAN)
