"""Every kind of task and of rehearsal, against losses and hypergradients written anew, example by example."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaloom.engine.learner
from metaloom.engine.adapters.base import INIT
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.checking.comparison import check_hypergradient
from metaloom.engine.checking.report import CheckReport
from metaloom.engine.combiners.mean import Mean
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
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Rehearsal, TaskBatch
from metaloom.engine.losses import IGNORE
from metaloom.engine.ordinary import ordinary_gradient
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import ComputeFormat, LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from metaloom.errors import CapabilityError
from metaloom.models.gpt import PAD
from metaloom.models.mlp import Mlp
from tests.numerics.kinds_of_tasks import (
    ALIKE,
    CLASSIFYING,
    LEARNED_LOSS,
    MODELLING,
    NUM_INPUTS,
    RULE,
    STEP_WEIGHTS,
    WAYS,
    Kind,
    Setting,
    model_of,
    problem_of,
)
from tests.numerics.problems import Problem, assert_gradients_agree
from tests.numerics.token_problems import distance

EXACT: dict[str, Hypergradient] = {
    "unrolled": Unrolled(),
    "rematerialized": Rematerialized(),
    "mixed_mode": MixedMode(),
}
PLAIN = Sgd()
SETTINGS = {
    "regression, rehearsing classes": Setting("regression", "loop", CLASSIFYING, rule=PLAIN),
    "regression under vmap, rehearsing alike": Setting("regression", "vmap", ALIKE, rule=PLAIN),
    "sequences, rehearsing language": Setting("sequences", "loop", MODELLING, has_ways=True, rule=PLAIN),
    "classes by a learned loss, rehearsing others": Setting(
        "numbers",
        "loop",
        CLASSIFYING,
        has_ways=True,
        rule=PLAIN,
        support_loss=LEARNED_LOSS,
        recompute_blocks=True,
        head_chunk=2,
    ),
    "numbers with ways, rehearsing in the meta-loss alone": Setting(
        "numbers", "loop", dataclasses.replace(CLASSIFYING, ratio=0.0), has_ways=True, rule=PLAIN
    ),
    "tokens, rehearsing alike in the inner loss alone": Setting(
        "tokens", "loop", dataclasses.replace(ALIKE, outer_ratio=0.0), rule=PLAIN
    ),
}


def example_loss(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    target: Tensor,
    head: str,
    ways: int,
    learned: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What one example costs, run alone; of a sequence its tokens alone.

    Args:
        learned: temperature and label smoothing of a classification.
    """
    if not inputs.is_floating_point():
        length = int((inputs != PAD).sum())
        inputs, target = inputs[:length], target[:length] if target.ndim else target
    output: Tensor = functional_call(model, dict(weights), (inputs[None], head))[0]
    if target.is_floating_point():
        return (output - target).square().mean()
    if target.ndim:
        assert bool((target != IGNORE).all())
        return F.cross_entropy(output, target)
    if learned is None:
        return F.cross_entropy(output[None, :ways], target[None])
    temperature, smoothing = learned
    log_p = (output[:ways] / temperature).log_softmax(0)
    return -(1.0 - smoothing) * log_p[target] - smoothing * log_p.mean()


def oracle(setting: Setting, problem: Problem) -> tuple[dict[str, Tensor], Tensor]:
    """The hypergradient and the meta-losses: plain gradient descent, task by task, example by example."""
    theta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    learner, batch, model = problem.unroll.learner, problem.batch, problem.model
    rehearsal = learner.rehearsal or Rehearsal(0.0, 0)
    assert learner.head is not None
    old_head = rehearsal.head or learner.head

    def rows(data: Mapping[str, Tensor] | None, task: int) -> list[tuple[Tensor, Tensor]]:
        assert data is not None
        count = int(data["weights"][task].sum())
        return [(data["inputs"][task, row], data["targets"][task, row]) for row in range(count)]

    def mean(
        examples: list[tuple[Tensor, Tensor]],
        weights: Mapping[str, Tensor],
        head: str,
        ways: int,
        learned: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        each = [example_loss(model, weights, *example, head, ways, learned) for example in examples]
        return torch.stack(each).mean()

    learned = None
    if setting.support_loss.learned:
        learned = theta["loss.temperature"].exp(), theta["loss.label_smoothing"].sigmoid()

    losses = []
    with sdpa_kernel(SDPBackend.MATH):
        for task, number in enumerate(batch.numbers):
            ways = WAYS[number] if setting.has_ways else 1000
            phi = {name.removeprefix(INIT): theta[name] for name in theta if name.startswith(INIT)}
            total = torch.zeros((), dtype=torch.float64)
            for step, weight in enumerate(STEP_WEIGHTS):
                if weight != 0.0:
                    ratio = rehearsal.outer_ratio
                    total = total + weight * (1.0 - ratio) * mean(
                        rows(batch.query, task), phi, learner.head, ways
                    )
                    if ratio:
                        old = rows(batch.outer_rehearsal, task)
                        total = total + weight * ratio * mean(old, phi, old_head, 1000)
                if step == len(STEP_WEIGHTS) - 1:
                    break
                own = rows(batch.support, task)
                inner = (1.0 - rehearsal.ratio) * mean(own, phi, learner.head, ways, learned)
                if rehearsal.ratio:
                    old = rows(batch.rehearsal, task)
                    read = [
                        old[(step * rehearsal.num_samples + row) % len(old)]
                        for row in range(rehearsal.num_samples)
                    ]
                    inner = inner + rehearsal.ratio * mean(read, phi, old_head, 1000)
                grads = torch.autograd.grad(
                    inner, list(phi.values()), create_graph=True, materialize_grads=True
                )
                phi = {
                    name: value - theta[f"rates.{name}"].exp() * grad
                    for (name, value), grad in zip(phi.items(), grads, strict=True)
                }
            losses.append(total)
        gradient = torch.autograd.grad(
            torch.stack(losses).sum(), list(theta.values()), materialize_grads=True
        )
    return dict(zip(theta, gradient, strict=True)), torch.stack(losses).detach()


@pytest.mark.parametrize("name", SETTINGS)
def test_exact_estimators_equal_an_oracle_written_example_by_example(name: str) -> None:
    setting = SETTINGS[name]
    problem = problem_of(setting, (3, 8), is_padded=True)
    expected, losses = oracle(setting, problem)
    # A head that nothing is read from, and its rates, have no part.
    acting = {key: value for key, value in expected.items() if bool(value.any())}
    assert any(key.startswith("rates.head") for key in acting)
    assert len(acting) >= len(expected) - 6
    for estimator in EXACT.values():
        result = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
        torch.testing.assert_close(result.losses, losses, rtol=1e-11, atol=0)
        # Sums in another order, through two steps.
        assert_gradients_agree({key: result.gradient[key] for key in acting}, acting, rtol=1e-8)
        assert not any(bool(result.gradient[key].any()) for key in expected.keys() - acting.keys())


def test_metaloom_check_finds_ragged_tasks_that_rehearse_another_kind_exact_and_uncoupled() -> None:
    setting = Setting("images", "loop", CLASSIFYING, has_ways=True, support_loss=LEARNED_LOSS)
    problem = problem_of(setting, (3, 8), is_padded=True)
    report = check_hypergradient(
        problem.unroll,
        MixedMode(),
        problem.meta,
        problem.batch,
        estimator="mixed_mode",
        is_exact=True,
        num_directions=1,
    )
    assert {group.verdict for group in report.groups} == {"exact"}
    assert (report.couplings, report.leak, report.findings()) == ((), None, [])


class Centered(nn.Module):
    """Each example less the mean of all, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(NUM_INPUTS, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(inputs - inputs.mean(0, keepdim=True))
        return outputs


def test_metaloom_check_finds_a_model_that_padding_reaches() -> None:
    problem = problem_of(Setting("regression", "loop"), (3, 8), is_padded=True)
    adapter = FullAdapter(Centered().double())
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter, head=None)
    unroll = dataclasses.replace(problem.unroll, learner=learner, rates=Rates(0.1, "none", 2))
    meta = adapter.meta_parameters(init=True, backbone=False)

    def leak_of(batch: TaskBatch) -> CheckReport:
        return check_hypergradient(
            unroll, Unrolled(), meta, batch, estimator="unrolled", is_exact=True, num_directions=1
        )

    (finding,) = leak_of(problem.batch).findings()
    assert re.search(
        r"padding is not without effect.* move the inner loss of task [01] by .*batch_norm", finding
    )
    whole = dataclasses.replace(
        problem.batch,
        support={name: problem.batch.support[name] for name in ("inputs", "targets")},
        query={name: problem.batch.query[name] for name in ("inputs", "targets")},
    )
    assert leak_of(whole).leak is None


APPROXIMATE: dict[str, Hypergradient] = {
    "first_order": FirstOrder(),
    "truncated": Truncated(num_steps=1, exact=Rematerialized()),
    "implicit": Implicit(Neumann(5, 0.2)),
    "finite_difference": FiniteDifference(1e-3),
}


@pytest.mark.parametrize("estimator", [*EXACT, *APPROXIMATE])
def test_a_meta_loss_that_rehearses_has_the_gradient_of_its_two_parts(estimator: str) -> None:
    # A hypergradient is linear in the meta-loss, whatever it leaves out.
    rule = Sgd(GradientTerms(proximal=0.4))
    setting = Setting("tokens", "lora", ALIKE, rule=rule, step_weights=(0.0, 0.0, 1.0), grain="none")
    problem = problem_of(setting, (3, 8), is_padded=True)
    way = (EXACT | APPROXIMATE)[estimator]

    def gradient(batch: TaskBatch, rehearsal: Rehearsal) -> dict[str, Tensor]:
        learner = dataclasses.replace(problem.unroll.learner, rehearsal=rehearsal)
        unroll = dataclasses.replace(problem.unroll, learner=learner)
        return way.meta_gradient(unroll, problem.meta, batch).gradient

    mixed = gradient(problem.batch, ALIKE)
    inside = dataclasses.replace(ALIKE, outer_ratio=0.0)
    assert problem.batch.outer_rehearsal is not None
    of_query = gradient(problem.batch, inside)
    of_old = gradient(dataclasses.replace(problem.batch, query=problem.batch.outer_rehearsal), inside)
    read = [name for name in mixed if "classifier" not in name]
    expected = {name: 0.8 * of_query[name] + 0.2 * of_old[name] for name in read}
    # Differences are off by the square of their distance, and by rounding divided by it.
    rtol = 1e-4 if estimator == "finite_difference" else 1e-9
    assert_gradients_agree({name: mixed[name] for name in read}, expected, rtol=rtol)


def test_reptile_refuses_rehearsal_in_a_meta_loss_that_it_does_not_look_at() -> None:
    setting = Setting("tokens", "loop", ALIKE, step_weights=(0.0, 1.0), grain="none")
    problem = problem_of(setting, (3,), is_padded=False)
    with pytest.raises(
        CapabilityError, match=r"reptile does not look at the meta-loss.*outer_ratio to 0, or"
    ):
        Reptile().meta_gradient(problem.unroll, problem.meta, problem.batch)


def test_rehearsal_alike_in_one_pass_costs_what_two_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("tokens", "lora", ALIKE, support_loss=LEARNED_LOSS)
    problem = problem_of(setting, (3, 8), is_padded=True)
    learner = problem.unroll.learner
    fast = learner.init(problem.meta, 2)
    num_passes: list[int] = []
    forward = type(learner.adapter).forward

    def counted(*args: Any) -> Any:
        num_passes[-1] += 1
        return forward(*args)

    monkeypatch.setattr(type(learner.adapter), "forward", counted)
    results = []
    for is_apart in (False, True):
        if is_apart:
            monkeypatch.setattr(metaloom.engine.learner, "_are_shaped_alike", lambda one, other: False)
        num_passes.append(0)
        results.append([learner.losses("support", problem.meta, fast, problem.batch, k)[0] for k in range(3)])
    assert num_passes == [3, 6]
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)


def test_rehearsal_in_a_pass_of_its_own_draws_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaloom.engine.learner, "_are_shaped_alike", lambda one, other: False)
    for dropout in (0.0, 0.5):
        all_of_it = Rehearsal(1.0, 5)
        problem = problem_of(Setting("tokens", "lora", all_of_it, dropout=dropout), (3,), is_padded=False)
        batch = dataclasses.replace(problem.batch, rehearsal=problem.batch.support)
        fast = problem.unroll.learner.init(problem.meta, 1)
        plain = dataclasses.replace(problem.unroll.learner, rehearsal=None)
        own, _ = plain.losses("support", problem.meta, fast, batch, 0)
        rehearsed, _ = problem.unroll.learner.losses("support", problem.meta, fast, batch, 0)
        # The same sequences, and other masks where there are any.
        assert torch.allclose(own, rehearsed, rtol=1e-12) == (dropout == 0.0)


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("estimator", EXACT)
def test_classes_that_a_task_does_not_have_are_as_if_the_head_ended_before_them(
    estimator: str, tasks: Literal["loop", "vmap"]
) -> None:
    setting = Setting("numbers", tasks, has_ways=True, support_loss=LEARNED_LOSS, rule=RULE)
    problem = problem_of(setting, (9,), is_padded=False)
    num_ways = WAYS[9]
    small = Mlp(
        num_inputs=NUM_INPUTS, width=6, num_layers=2, num_outputs=num_ways, activation="tanh"
    ).double()
    adapter = FullAdapter(small, structure=Structure((), "head"), tasks=tasks)
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter, head=None)
    meta = {
        name: value[:num_ways].clone() if name.startswith("init.head") else value
        for name, value in problem.meta.items()
        if "rehearsal" not in name
    }
    way = EXACT[estimator]
    masked = way.meta_gradient(problem.unroll, problem.meta, problem.batch)
    batch = dataclasses.replace(problem.batch, num_ways=None)
    expected = way.meta_gradient(dataclasses.replace(problem.unroll, learner=learner), meta, batch)
    torch.testing.assert_close(masked.losses, expected.losses, rtol=1e-13, atol=0)
    cut = {
        name: masked.gradient[name][:num_ways] if name.startswith("init.head") else masked.gradient[name]
        for name in meta
    }
    assert_gradients_agree(cut, expected.gradient, rtol=1e-11)
    for name in ("init.head.weight", "init.head.bias"):
        # The weight decay alone moves what is not there, and nothing sees that.
        assert not masked.gradient[name][num_ways:].any()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_absent_classes_leave_everything_finite_in_lower_precision(compute: ComputeFormat) -> None:
    setting = Setting("sequences", "lora", MODELLING, has_ways=True, support_loss=LEARNED_LOSS)
    problem = problem_of(setting, (3, 8), is_padded=True)
    problem.model.float()
    precision = Precision(compute)
    learner = dataclasses.replace(problem.unroll.learner, precision=precision)
    unroll = dataclasses.replace(problem.unroll, learner=learner)
    batch = problem.batch.mapped(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    meta = {name: value.float() for name, value in problem.meta.items()}
    exact = Unrolled().meta_gradient(unroll, meta, batch)
    for estimator in (Rematerialized(), MixedMode()):
        result = estimator.meta_gradient(unroll, meta, batch)
        assert all(value.isfinite().all() for value in result.gradient.values())
        # Rounding of 2^-24 and 2^-9, through two steps and second derivatives.
        bound = 1e-3 if compute == "float32" else 0.2
        assert distance(result.gradient, exact.gradient) < bound


@pytest.mark.parametrize("rehearsal", [None, CLASSIFYING])
def test_an_outer_step_on_regressions_logs_no_accuracy(rehearsal: Rehearsal | None) -> None:
    setting = Setting("regression", "loop", rehearsal)
    problem = problem_of(setting, (3, 8), is_padded=True)
    algorithm = Maml(problem.unroll, MixedMode())
    sharding = Replicated()
    settings = OuterSettings(
        optimizer="sgd",
        lr=0.1,
        lr_rates=0.1,
        lr_loss=0.1,
        betas=(0.0, 0.0),
        eps=0.0,
        weight_decay=0.0,
        num_steps=1,
        warmup_steps=0,
        decay="constant",
        final_ratio=1.0,
        clip_norm=None,
        ema=None,
    )
    outer = OuterOptimizer(problem.meta, settings, sharding)
    combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    tasks, scaler = StepTasks(problem.batch, 2, 1), LossScaler(Precision("float64"))
    metrics = outer_step(tasks, algorithm, combiner, outer, scaler)
    after = {name for name in metrics if name.endswith("_after")}
    assert after == {"loss_after"} | ({"rehearsal_loss_after"} if rehearsal is not None else set())
    if rehearsal is not None:
        mixed = 0.8 * metrics["loss_after"] + 0.2 * metrics["rehearsal_loss_after"]
        only_last = dataclasses.replace(problem.unroll, step_weights=(0.0, 0.0, 1.0))
        losses = MixedMode().meta_gradient(only_last, problem.meta, problem.batch).losses
        assert mixed == pytest.approx(float(losses.mean()), rel=1e-12)


@pytest.mark.parametrize("kind", ["regression", "sequences", "tokens"])
def test_ordinary_training_takes_every_kind_by_its_head(kind: Kind) -> None:
    setting = Setting(kind, "loop")
    model, structure = model_of(setting)
    learner = problem_of(setting, (3,), is_padded=False).unroll.learner
    data = problem_of(setting, (3,), is_padded=False).batch.support
    batch = {name: value[0] for name, value in data.items()}
    weights = dict(model.named_parameters())
    gradient, totals = ordinary_gradient(
        model,
        structure,
        weights,
        batch,
        Precision("float64"),
        draws=None,
        scale=2.0,
        num_dummies=2,
        recompute_blocks=False,
        shards=None,
        criterion=learner.criterion,
        head=learner.head,
    )
    assert learner.head is not None
    with sdpa_kernel(SDPBackend.MATH):
        losses = [
            example_loss(model, weights, *example, learner.head, 1000)
            for example in list(zip(batch["inputs"], batch["targets"], strict=True))[:-2]
        ]
        loss = torch.stack(losses).sum()
        expected = torch.autograd.grad(2.0 * loss, list(weights.values()), materialize_grads=True)
    assert totals.keys() == {"loss"} | ({"accuracy"} if kind != "regression" else set())
    assert float(totals["loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-12)
