"""What `check_hypergradient` says of sound models, and of models broken in every way that it looks for.

Shape letters: T tasks, N examples, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.checking.comparison import check_hypergradient, grouped
from metaloom.engine.checking.differences import DISTANCES, slope_by_differences
from metaloom.engine.checking.report import ORACLE_TOLERANCE, CheckReport
from metaloom.engine.checking.vectors import away_from_symmetry
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import Hypergradient, MetaGradient, OnGradient
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import SupportLoss
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, conv4_problem, gpt_problem, last

EXACT = ("unrolled", "rematerialized", "mixed_mode")
UNIFORM = (0.0, 0.5, 0.5)
WIDTH, CLASSES = 4, 3


# ---------------------------------------------------------------- operations, sound and broken


class _TanhLosingTerms(torch.autograd.Function):
    """tanh whose backward pass is right, and computed from constants: its own derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1.0 - torch.tanh(x).detach().square()
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        product: Tensor = gradient * ctx.slope
        return product


class _TanhOnce(torch.autograd.Function):
    """tanh whose backward pass is marked as not differentiable, which torch.autograd.grad does not report."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = torch.tanh(x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        product: Tensor = gradient * (1.0 - output.square())
        return product


class _TanhWithoutJvp(torch.autograd.Function):
    """tanh that can be differentiated twice in reverse mode, and not in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        product: Tensor = gradient * (1.0 - torch.tanh(x).square())
        return product


class _TanhWithWrongJvp(torch.autograd.Function):
    """tanh with a right backward pass, and half of its forward-mode derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        product: Tensor = gradient * (1.0 - torch.tanh(x).square())
        return product

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        product: Tensor = 0.5 * tangent * (1.0 - torch.tanh(x).square())
        return product


def _flash_attention(x: Tensor) -> Tensor:
    """A fused kernel, called past what replaces it: it has a gradient and no second derivative."""
    sequence = x.view(1, 1, *x.shape)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(sequence, sequence, sequence)[
        0
    ]
    return output.view_as(x)


def _resampled(x: Tensor) -> Tensor:
    """An operation of torch that can be differentiated twice in reverse mode, and not in forward mode."""
    turned = torch.tensor([[[0.6, -0.3, 0.1], [0.3, 0.6, 0.0]]], dtype=x.dtype)
    grid = F.affine_grid(turned, [1, 1, *x.shape], align_corners=False)
    return F.grid_sample(x[None, None], grid, align_corners=False)[0, 0]


def _half_detached(x: Tensor) -> Tensor:
    return torch.tanh(x) * (1.0 + x.detach())


def _through_float32(x: Tensor) -> Tensor:
    return torch.tanh(x.float()).double()


class _Noisy:
    """tanh with noise that no seed of torch's rules."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1.0 + 1e-4 * self._random.random())


class _NormOfAll(nn.Module):
    """Batch norm written out, by statistics of all examples at hand."""

    def forward(self, inputs: Tensor) -> Tensor:
        centred = inputs - inputs.mean(0)
        return centred / (centred.square().mean(0) + 1e-5).sqrt()


class _Net(nn.Module):
    """Two linear layers with an operation between them; logits `[N, C]` of inputs `[N, D]`."""

    def __init__(self, operation: Callable[[Tensor], Tensor], *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = norm or nn.Identity()
        self.operation = operation
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.operation(self.norm(self.first(inputs))))
        return logits


class _CentersInputs(_Net):
    """The same, with inputs from which the mean over all examples at hand is taken."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - inputs.mean(0))


def net_problem(
    operation: Callable[[Tensor], Tensor] = torch.tanh,
    *,
    rule: InnerRule | None = None,
    grain: Grain = "none",
    lora: bool = False,
    norm: nn.Module | None = None,
    centers: bool = False,
    num_tasks: int = 3,
) -> Problem:
    """Two inner steps of a small dense net, all weights fast or LoRA."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = (_CentersInputs if centers else _Net)(operation, norm=norm).double()
    generator = torch.Generator().manual_seed(4)

    def part(num_examples: int) -> dict[str, Tensor]:
        inputs = torch.randn(num_tasks, num_examples, WIDTH, generator=generator, dtype=torch.float64)
        return {
            "inputs": inputs,
            "targets": torch.randint(CLASSES, (num_tasks, num_examples), generator=generator),
        }

    adapter = (
        LoraAdapter(model, targets="all-linear", rank=2, alpha=4.0, generator=generator)
        if lora
        else FullAdapter(model)
    )
    rates = Rates(0.5, grain, 2)
    unroll = Unroll(Learner(adapter, Precision("float64")), rule or Sgd(), rates, last(2))
    meta = adapter.meta_parameters(init=True, backbone=False)
    meta |= rates.meta_parameters(adapter.init({}, 1))
    batch = TaskBatch(tuple(range(num_tasks)), part(5), part(4))
    return Problem(unroll, away_from_symmetry(meta, seed=1), batch, model)


def checked(problem: Problem, estimator: str, *, meta: Mapping[str, Tensor] | None = None) -> CheckReport:
    """The report on an estimator by name, which claims what its name does."""
    return check_hypergradient(
        problem.unroll,
        HYPERGRADIENTS[estimator](),
        problem.meta if meta is None else meta,
        problem.batch,
        estimator=estimator,
        is_exact=estimator in EXACT,
    )


# ---------------------------------------------------------------- sound models


def _with_loss_parameters(problem: Problem) -> Problem:
    loss = SupportLoss(1.3, 0.1, ("temperature", "label_smoothing"))
    learner = dataclasses.replace(problem.unroll.learner, support_loss=loss)
    meta = dict(problem.meta) | loss.meta_parameters(next(iter(problem.meta.values())))
    return dataclasses.replace(
        problem, unroll=dataclasses.replace(problem.unroll, learner=learner), meta=meta
    )


def _saving_memory(problem: Problem) -> Problem:
    learner = dataclasses.replace(problem.unroll.learner, recompute_blocks=True, head_chunk=3)
    return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, learner=learner))


SOUND: dict[str, Callable[[], Problem]] = {
    "a conv net with batch norm per task and learned rates": lambda: conv4_problem(
        step_weights=UNIFORM, grain="per_tensor"
    ),
    "a GPT with LoRA, a backbone and rates per step": lambda: gpt_problem(
        step_weights=last(2), grain="per_tensor_per_step", backbone=True
    ),
    "Adam inside": lambda: gpt_problem(step_weights=last(2), grain="shared", rule=Adam()),
    "loss parameters": lambda: _with_loss_parameters(net_problem()),
    "recomputed blocks and a chunked head": lambda: _saving_memory(gpt_problem(step_weights=last(2))),
}


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("case", SOUND)
def test_exact_estimators_of_sound_models_pass_in_every_group(case: str, estimator: str) -> None:
    problem = SOUND[case]()
    report = checked(problem, estimator)
    assert report.findings() == []
    assert report.passed
    assert report.oracle_failure is None
    assert report.couplings == ()
    assert {group.verdict for group in report.groups} == {"exact"}
    assert sum(group.num_numbers for group in report.groups) == sum(
        value.numel() for value in problem.meta.values()
    )
    # Groups that tested nothing would be no evidence; the exception is what a norm makes irrelevant.
    assert all(group.norm > 1e-9 for group in report.groups)


def test_first_order_is_reported_with_its_error_and_not_refused() -> None:
    problem = net_problem(grain="per_tensor")
    report = checked(problem, "first_order")
    assert report.passed
    assert {group.verdict for group in report.groups} == {"approximate"}
    approximate = FirstOrder().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
    exact = Unrolled().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
    by_group = {group.name: group for group in report.groups}
    for name, value in approximate.items():  # here each name is a group of its own
        group, expected = by_group[name], exact[name]
        error = (value - expected).norm() / expected.norm()
        assert group.norm == pytest.approx(float(value.norm()), rel=1e-12)
        assert group.oracle_error == pytest.approx(float(error), rel=1e-9)
        cosine = F.cosine_similarity(value.flatten(), expected.flatten(), dim=0)
        assert group.cosine == pytest.approx(float(cosine), rel=1e-12)
    # Else the case would not tell the two apart.
    assert max(group.oracle_error or 0.0 for group in report.groups) > 0.05


# ---------------------------------------------------------------- broken models


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "first_order"])
@pytest.mark.parametrize("operation", [_TanhLosingTerms.apply, _TanhOnce.apply, _half_detached])
def test_a_model_that_silently_loses_terms_is_refused(
    operation: Callable[[Tensor], Tensor], estimator: str
) -> None:
    report = checked(net_problem(operation), estimator)
    assert not report.passed
    (finding,) = report.findings()
    assert "differs from differences of the meta-loss" in finding
    assert "differentiating the model loses terms" in finding
    own = {_TanhLosingTerms.apply: "_TanhLosingTerms", _TanhOnce.apply: "_TanhOnce"}.get(operation)
    assert ("Look first at the model's own autograd functions:" in finding) == (own is not None)
    assert own is None or own in finding
    wrong = {group.name for group in report.groups if group.verdict == "wrong"}
    assert "init.first.weight" in wrong


def test_the_error_found_is_that_of_the_lost_terms() -> None:
    # Oracle: the same function, written so that torch can differentiate it twice.
    broken, sound = net_problem(_TanhLosingTerms.apply, grain="shared"), net_problem(grain="shared")
    wrong = Unrolled().meta_gradient(broken.unroll, broken.meta, broken.batch).gradient["rates.shared"]
    right = Unrolled().meta_gradient(sound.unroll, sound.meta, sound.batch).gradient["rates.shared"]
    (group,) = (group for group in checked(broken, "unrolled").groups if group.name == "rates.shared")
    expected = abs(wrong - right) / max(abs(wrong), abs(right))
    assert expected > 1e-4
    # The difference's own error, up to 1e-5, is in units of the slope.
    assert group.difference_error == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized"])
def test_an_operation_without_a_second_derivative_is_refused_by_name(estimator: str) -> None:
    with pytest.raises(CapabilityError, match=f"`{estimator}` cannot be computed") as raised:
        checked(net_problem(_flash_attention), estimator)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward lacks a deriv" in str(raised.value)
    assert "eager attention" in str(raised.value)
    assert "algorithm.hypergradient to first_order" in str(raised.value)


def test_first_order_needs_no_second_derivative() -> None:
    report = checked(net_problem(_flash_attention), "first_order")
    assert report.passed
    assert report.oracle_failure is not None
    assert "is not implemented" in report.oracle_failure
    assert {group.oracle_error for group in report.groups} == {None}
    # What differences still say of it.
    assert max(group.difference_error for group in report.groups) > 1e-2


def test_an_operation_without_a_forward_rule_is_refused_under_mixed_mode_alone() -> None:
    problem = net_problem(_TanhWithoutJvp.apply)
    with pytest.raises(CapabilityError, match="`mixed_mode` cannot be computed") as raised:
        checked(problem, "mixed_mode")
    assert "_TanhWithoutJvp" in str(raised.value)
    assert "Set algorithm.hypergradient to rematerialized or unrolled" in str(raised.value)
    assert checked(problem, "rematerialized").passed


def test_an_operation_of_torch_without_a_forward_rule_is_named() -> None:
    with pytest.raises(CapabilityError, match="`mixed_mode` cannot be computed: grid_sampler_2d lacks"):
        checked(net_problem(_resampled), "mixed_mode")


def test_derivatives_that_contradict_each_other_are_found() -> None:
    problem = net_problem(_TanhWithWrongJvp.apply)
    report = checked(problem, "mixed_mode")
    (finding,) = report.findings()
    assert (
        "`mixed_mode` as the recipe has it differs from plain `unrolled`, which agrees with differences"
        in finding
    )
    assert checked(problem, "unrolled").passed


def test_an_estimator_that_is_wrong_by_little_is_found() -> None:
    class Scaled(Hypergradient):
        name = "unrolled"

        def estimate(
            self,
            unroll: Unroll,
            meta: Mapping[str, Tensor],
            batch: TaskBatch,
            on_final: OnGradient | None,
        ) -> MetaGradient:
            exact = Unrolled().meta_gradient(unroll, meta, batch)
            scaled = {name: (1.0 + factor) * value for name, value in exact.gradient.items()}
            return dataclasses.replace(exact, gradient=scaled)

    problem = net_problem()
    for factor, passes in ((0.5 * ORACLE_TOLERANCE, True), (2.0 * ORACLE_TOLERANCE, False)):
        report = check_hypergradient(
            problem.unroll, Scaled(), problem.meta, problem.batch, estimator="scaled", is_exact=True
        )
        assert report.passed == passes
        assert report.groups[0].oracle_error == pytest.approx(factor, rel=1e-6)


def test_recomputation_is_checked_against_an_oracle_that_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(
        compute: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], *, derivative: str
    ) -> tuple[Tensor, ...]:
        return tuple(1.01 * output for output in compute(*tensors))

    monkeypatch.setattr("metaloom.engine.adapters.model.recomputed", wrong)
    problem = gpt_problem(step_weights=last(1))
    assert checked(problem, "unrolled").passed
    learner = dataclasses.replace(problem.unroll.learner, recompute_blocks=True)
    recomputing = dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, learner=learner))
    (finding,) = checked(recomputing, "unrolled").findings()
    assert (
        "`unrolled` as the recipe has it differs from plain `unrolled`, which agrees with differences"
        in finding
    )


def test_a_part_in_float32_is_not_taken_for_exact() -> None:
    assert not checked(net_problem(_through_float32), "unrolled").passed


def test_a_random_model_is_said_to_show_nothing() -> None:
    report = checked(net_problem(_Noisy()), "rematerialized")
    assert any("nothing can be said about" in finding for finding in report.findings())


def test_a_hypergradient_that_is_not_finite_is_refused() -> None:
    # B is zero, so that A's gradient is, and Adam's root without an epsilon has an infinite derivative.
    problem = net_problem(rule=Adam(eps_root=0.0), lora=True)
    at_zero = {
        name: torch.zeros_like(value) if name.endswith("lora_b") else value
        for name, value in problem.meta.items()
    }
    report = checked(problem, "unrolled", meta=at_zero)
    assert any("is not finite" in finding and "eps_root" in finding for finding in report.findings())


def test_less_than_float64_is_refused() -> None:
    problem = net_problem()
    meta = {name: value.float() for name, value in problem.meta.items()}
    with pytest.raises(CapabilityError, match=r"init\.first\.weight is torch\.float32.*build the model"):
        checked(problem, "unrolled", meta=meta)


# ---------------------------------------------------------------- coupling


class _ClipsTogether(Sgd):
    """Gradient descent that scales by the norm over all tasks: a mistake."""

    def update(
        self,
        fast: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        return super().update(fast, state, {name: grad / norm for name, grad in grads.items()}, rates)


def test_a_norm_over_all_tasks_is_found_as_coupling() -> None:
    report = checked(net_problem(lora=True, norm=_NormOfAll()), "unrolled")
    assert {coupling.changed for coupling in report.couplings} == {0, 1, 2}
    assert all(coupling.moved != coupling.changed for coupling in report.couplings)
    assert {coupling.quantity for coupling in report.couplings} == {"inner loss"}
    (finding,) = report.findings()  # the hypergradient itself is right: of another inner loop
    assert "tasks are coupled: changing task 0 moves the inner loss of task" in finding
    assert not report.passed


@pytest.mark.parametrize("lora", [False, True])
def test_batch_norm_is_of_each_task_and_no_coupling(lora: bool) -> None:
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    assert checked(net_problem(lora=lora, norm=norm), "unrolled").couplings == ()


def test_a_rule_that_clips_tasks_together_is_found_as_coupling() -> None:
    report = checked(net_problem(rule=_ClipsTogether()), "unrolled")
    assert {coupling.quantity for coupling in report.couplings} == {"inner step"}


def test_coupling_of_tasks_with_equal_data_is_found_by_their_fast_weights() -> None:
    problem = net_problem(lora=True, norm=_NormOfAll(), num_tasks=2)

    def equal(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[:1].expand_as(value).clone() for name, value in part.items()}

    batch = dataclasses.replace(
        problem.batch, support=equal(problem.batch.support), query=equal(problem.batch.query)
    )
    assert len(checked(dataclasses.replace(problem, batch=batch), "unrolled").couplings) == 2


def test_coupling_by_data_alone_is_found() -> None:
    report = checked(net_problem(lora=True, centers=True), "unrolled")
    assert {coupling.quantity for coupling in report.couplings} == {"inner loss"}
    assert checked(net_problem(centers=True), "unrolled").couplings == ()


def test_one_task_alone_has_no_coupling_to_show() -> None:
    report = checked(net_problem(lora=True, norm=_NormOfAll(), num_tasks=1), "unrolled")
    assert (report.couplings, report.num_tasks) == ((), 1)


# ---------------------------------------------------------------- parts


def test_differences_are_right_on_a_smooth_function() -> None:
    slope = slope_by_differences(
        lambda x: math.sin(0.3 + x), math.sin(0.3), enough=0.0, distances=DISTANCES[:1]
    )
    # Rounding: one unit in the last place over a distance of 1e-5.
    assert slope.value == pytest.approx(math.cos(0.3), rel=1e-10)
    assert slope.spread == pytest.approx(math.cos(0.3) / 6.0 * 1e-8, rel=0.1)


def test_differences_go_on_to_shorter_distances_past_a_kink_and_a_jump() -> None:
    def kinked(x: float) -> float:
        return 2.0 + 0.5 * x + max(0.0, x - 3e-6) + (1e-3 if x > 2e-5 else 0.0)

    slope = slope_by_differences(kinked, 2.0, enough=1e-6, distances=DISTANCES)
    # A unit in the last place of 2 is 4e-16, the distance 1e-7.
    assert slope.value == pytest.approx(0.5, abs=1e-8)


def test_differences_of_a_function_without_a_slope_say_so_by_their_spread() -> None:
    signs = itertools.cycle([1.0, -1.0])
    slope = slope_by_differences(lambda x: 1.0 + 1e-3 * next(signs), 1.0, enough=1e-6, distances=DISTANCES)
    assert slope.spread > 1.0


def test_groups_are_named_by_what_is_alike_in_their_members() -> None:
    names = ("init.blocks.0.conv1.weight", "init.blocks.11.conv1.weight", "rates.0", "loss.temperature")
    assert grouped(dict.fromkeys(names, torch.zeros(()))) == {
        "init.blocks.*.conv1.weight": [names[0], names[1]],
        "rates.*": ["rates.0"],
        "loss.temperature": ["loss.temperature"],
    }


def test_away_from_symmetry_nothing_is_zero_or_equal_and_nothing_far() -> None:
    meta = {name: torch.full((50, 4), value, dtype=torch.float64) for name, value in (("a", 0.0), ("b", 2.0))}
    moved = away_from_symmetry(meta, seed=0)
    assert all(len(set(value.flatten().tolist())) == 200 for value in moved.values())
    assert float(moved["a"].std()) == pytest.approx(0.05, rel=0.2)
    assert float((moved["b"] - 2.0).std()) == pytest.approx(0.2, rel=0.2)
    again = away_from_symmetry(meta, seed=0)
    assert all(torch.equal(value, again[name]) for name, value in moved.items())
