"""float16 and its scales, and what half precision costs each estimator on a transformer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.norms import PerStepNorms
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import ComputeFormat, LossScaler, Precision, Scales
from tests.numerics.problems import FOR_EVERYTHING, Problem, conv4_problem, last
from tests.numerics.token_problems import Fast, distance, hypergradient, recomputing, transformer_problem

SCALES = Scales(loss=2.0**8, tangent=2.0**6)
every_estimator = pytest.mark.parametrize("estimator", FOR_EVERYTHING)
both_kinds = pytest.mark.parametrize("fast", ["lora", "full"])


def problem_of(fast: Fast, compute: ComputeFormat, *, num_tasks: int = 2) -> Problem:
    return transformer_problem(
        fast, compute=compute, backbone=fast == "lora", grain="shared", numbers=tuple(range(num_tasks))
    )


def scaled(problem: Problem, scales: Scales) -> Problem:
    return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, scales=scales))


def in_float64(problem: Problem, fast: Fast) -> Problem:
    """The same problem, its float32 meta-parameters converted."""
    double = problem_of(fast, "float64")
    return dataclasses.replace(double, meta={name: value.double() for name, value in problem.meta.items()})


@both_kinds
@every_estimator
def test_a_float16_hypergradient_is_within_4_percent_of_float64(fast: Fast, estimator: str) -> None:
    problem = scaled(problem_of(fast, "float16"), SCALES)
    exact = hypergradient(in_float64(problem, fast), HYPERGRADIENTS[estimator]())
    error = distance(hypergradient(problem, HYPERGRADIENTS[estimator]()), exact)
    # float16 keeps 11 bits: a product rounds at up to 0.05 %, and through three inner steps, forward and
    # backward twice, some dozens of these add up; weights that start at a deviation of 0.02 make attention
    # all but uniform, whose gradient is a small difference. Measured: 1.9 % (LoRA), 0.13 % (all weights).
    assert error < 0.04
    # And it does compute in float16: float32 would be a thousand times nearer.
    assert error > 1e-5


@both_kinds
@every_estimator
def test_a_bfloat16_hypergradient_is_within_13_percent_of_float64(fast: Fast, estimator: str) -> None:
    problem = problem_of(fast, "bfloat16")
    exact = hypergradient(in_float64(problem, fast), HYPERGRADIENTS[estimator]())
    error = distance(hypergradient(problem, HYPERGRADIENTS[estimator]()), exact)
    # bfloat16 keeps 8 bits, eight times coarser than float16. Measured: 6.3 % (LoRA), 1.3 % (all weights).
    assert 1e-4 < error < 0.13


@both_kinds
@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_float16_with_recomputation_is_as_close(fast: Fast, estimator: str) -> None:
    problem = recomputing(scaled(problem_of(fast, "float16"), SCALES), blocks=True, head_chunk=5)
    exact = hypergradient(in_float64(problem, fast))
    assert 1e-5 < distance(hypergradient(problem, HYPERGRADIENTS[estimator]()), exact) < 0.04


@both_kinds
@every_estimator
@pytest.mark.parametrize("scales", [Scales(2.0**12, 2.0**10), Scales(2.0**12, 1.0), Scales(1.0, 2.0**10)])
def test_scales_leave_a_float32_hypergradient_as_it_is(fast: Fast, estimator: str, scales: Scales) -> None:
    problem = problem_of(fast, "float32")
    plain = hypergradient(problem, HYPERGRADIENTS[estimator]())
    # Powers of two: exact but where a sum mixes what is scaled with what is not yet divided, at 6e-8 each.
    assert distance(hypergradient(scaled(problem, scales), HYPERGRADIENTS[estimator]()), plain) < 1e-6


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_without_scales_small_float16_gradients_vanish_and_with_them_they_do_not(estimator: str) -> None:
    # A meta-loss so small that its adjoints fall below 6e-8, the smallest number of float16.
    weights = (0.0, 0.0, 3e-6)

    def of(compute: ComputeFormat, scales: Scales) -> dict[str, Tensor]:
        problem = transformer_problem(
            "lora", compute=compute, step_weights=weights, grain="shared", backbone=True
        )
        return hypergradient(scaled(problem, scales), HYPERGRADIENTS[estimator]())

    exact = of("float32", Scales())
    assert distance(of("float16", Scales(2.0**8, 2.0**18)), exact) < 0.02
    assert distance(of("float16", Scales(2.0**8, 1.0)), exact) > 0.5


def with_huge_weights(problem: Problem, task: int) -> Problem:
    """One task starts where its activations overflow float16: only its own fast weights are changed."""
    adapter = problem.unroll.learner.adapter
    original = adapter.init

    def init(meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        fast = original(meta, num_tasks)
        factors = torch.ones(num_tasks)
        factors[task] = 1e5
        return {
            name: value * factors.view(-1, *(1,) * (value.ndim - 1)).to(value.dtype)
            for name, value in fast.items()
        }

    adapter.init = init  # type: ignore[method-assign]
    return problem


@both_kinds
@every_estimator
def test_an_overflow_marks_its_task_and_no_other(fast: Fast, estimator: str) -> None:
    problem = transformer_problem(fast, compute="float16", grain="none", numbers=(0, 1, 2))
    problem = with_huge_weights(scaled(problem, Scales(2.0**4, 2.0**4)), task=1)
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert result.metrics["not_finite"].tolist() == [0.0, 1.0, 0.0]
    assert result.metrics["not_finite"].dtype == torch.float64


@both_kinds
@every_estimator
def test_a_loss_scale_that_overflows_marks_the_tasks(fast: Fast, estimator: str) -> None:
    problem = scaled(transformer_problem(fast, compute="float16", grain="none"), Scales(2.0**30, 1.0))
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert result.metrics["not_finite"].tolist() == [1.0, 1.0]


@every_estimator
def test_nothing_is_marked_where_everything_is_finite(estimator: str) -> None:
    problem = scaled(problem_of("lora", "float16", num_tasks=3), SCALES)
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert result.metrics["not_finite"].tolist() == [0.0, 0.0, 0.0]
    assert all(bool(value.isfinite().all()) for value in result.gradient.values())


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_scaled_half_precision_gives_storage_in_float32(estimator: str) -> None:
    problem = scaled(problem_of("lora", "float16"), SCALES)
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert {value.dtype for value in result.gradient.values()} == {torch.float32}
    assert result.losses.dtype == torch.float64
    batch: TaskBatch = problem.batch
    assert batch.num_tasks == len(result.losses)


# --- the scaler --------------------------------------------------------------------------------------------


def float16_scaler() -> LossScaler:
    return LossScaler(Precision("float16"))


def test_a_scaler_halves_after_an_overflow_and_doubles_after_two_hundred_good_steps() -> None:
    scaler = float16_scaler()
    start = scaler.scales
    scaler.update(is_finite=False)
    assert scaler.scales == Scales(start.loss / 2, start.tangent / 2)
    for _ in range(LossScaler.GROWTH_INTERVAL - 1):
        scaler.update(is_finite=True)
    assert scaler.scales == Scales(start.loss / 2, start.tangent / 2)
    scaler.update(is_finite=True)
    assert scaler.scales == start
    scaler.update(is_finite=True)
    assert scaler.scales == start


def test_an_overflow_starts_the_count_of_good_steps_anew() -> None:
    scaler = float16_scaler()
    for _ in range(LossScaler.GROWTH_INTERVAL - 1):
        scaler.update(is_finite=True)
    scaler.update(is_finite=False)
    halved = scaler.scales
    scaler.update(is_finite=True)
    assert scaler.scales == halved


def test_scales_stay_within_bounds_and_are_powers_of_two() -> None:
    scaler = float16_scaler()
    assert float16_scaler().can_shrink
    for _ in range(40):
        scaler.update(is_finite=False)
    smallest, can_shrink = scaler.scales, scaler.can_shrink
    assert (smallest, can_shrink) == (Scales(1.0, 1.0), False)
    for _ in range(40 * LossScaler.GROWTH_INTERVAL):
        scaler.update(is_finite=True)
    assert scaler.scales == Scales(LossScaler.LARGEST, LossScaler.LARGEST)
    assert all(math.log2(s).is_integer() for s in dataclasses.astuple(float16_scaler().scales))


def test_a_saved_scaler_goes_on_where_it_was() -> None:
    one, other = float16_scaler(), float16_scaler()
    for step in range(150):
        one.update(is_finite=step not in (3, 60))
    other.load(one.scalars())
    assert other.scalars() == one.scalars()
    for _ in range(LossScaler.GROWTH_INTERVAL):
        one.update(is_finite=True)
        other.update(is_finite=True)
        assert other.scales == one.scales
    assert one.scalars()["num_good_steps"] == 150 - 61 + LossScaler.GROWTH_INTERVAL - 200


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float64"])
def test_outside_float16_scales_are_one_and_stay_so(compute: ComputeFormat) -> None:
    scaler = LossScaler(Precision(compute))
    for is_finite in (False, True, False):
        scaler.update(is_finite=is_finite)
    scaler.load({})
    assert (scaler.scales, scaler.scalars(), scaler.can_shrink) == (Scales(), {}, False)


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_small_adjoints_keep_their_digits_whatever_the_loss_scale(estimator: str) -> None:
    """An adjoint divided by the loss scale on its way into the half-precision graph would vanish there."""
    problem = problem_of("full", "float16")
    weights = (*(0.0,) * problem.unroll.num_steps, 1e-6)
    unroll = dataclasses.replace(
        problem.unroll, step_weights=weights, scales=Scales(loss=2.0**12, tangent=2.0**10)
    )
    small = dataclasses.replace(problem, unroll=unroll)
    double = in_float64(small, "full")
    double = dataclasses.replace(double, unroll=dataclasses.replace(double.unroll, step_weights=weights))
    exact = hypergradient(double, HYPERGRADIENTS["unrolled"]())
    # With the adjoint of 1e-6 * 2^10 divided by 2^12, three quarters of the second order were lost.
    assert distance(hypergradient(small, HYPERGRADIENTS[estimator]()), exact) < 0.04


def images_of(compute: ComputeFormat, kind: str) -> Problem:
    """Images through batch norm, of which the affine alone, the input alone, or both are dual numbers."""
    norms = PerStepNorms(2, weights=True, statistics=False) if kind == "per step" else None
    problem = conv4_problem(step_weights=last(2), compute=compute, norms=norms)
    if kind == "per step":
        return problem
    names = [name for name, _ in problem.model.named_parameters() if ".norm." in name or "head" in name]
    adapter = PartAdapter(
        problem.model,
        names=names,
        tasks="together" if kind == "together" else "loop",
        structure=Structure(tuple(f"blocks.{block}" for block in range(3)), "head"),
    )
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    unroll = dataclasses.replace(problem.unroll, learner=learner)
    return dataclasses.replace(problem, unroll=unroll, meta=unroll.meta_parameters(init=True, backbone=True))


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["together", "loop", "per step"])
def test_dual_numbers_go_through_batch_norm_in_half_precision(kind: str, compute: ComputeFormat) -> None:
    problem, whole = images_of(compute, kind), images_of("float32", kind)
    expected = HYPERGRADIENTS["unrolled"]().meta_gradient(whole.unroll, problem.meta, whole.batch)
    found = HYPERGRADIENTS["mixed_mode"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    other = HYPERGRADIENTS["unrolled"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    # As far from float32 as the whole graph in the same format is, to a factor of rounding in another order.
    error, own = (distance(each.gradient, expected.gradient) for each in (found, other))
    assert 1e-5 < error < 3.0 * own


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("what", ["input", "affine"])
@pytest.mark.parametrize("kind", ["running", "instance"])
def test_norms_of_other_kinds_have_half_tangents_beside_half_primals(
    kind: str, what: str, compute: ComputeFormat
) -> None:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[compute]
    inputs, weight = torch.randn(4, 3, 5, 5).to(dtype), torch.ones(3)
    forward_pass = ForwardPass(Precision(compute), torch.device("cpu"), derivative="forward")
    with forward_ad.dual_level(), Interception(forward_pass):
        if what == "input":
            inputs = forward_ad.make_dual(inputs, torch.ones_like(inputs))  # type: ignore[no-untyped-call]
        else:
            weight = forward_ad.make_dual(weight, torch.ones_like(weight))  # type: ignore[no-untyped-call]
        if kind == "running":
            normed = F.batch_norm(inputs, torch.zeros(3), torch.ones(3), weight, None, False)
        else:
            normed = F.instance_norm(inputs, weight=weight)
        primal, tangent = forward_ad.unpack_dual(normed)  # type: ignore[no-untyped-call]
    assert (primal.dtype, tangent.dtype) == (dtype, dtype)
    assert bool(tangent.isfinite().all())
