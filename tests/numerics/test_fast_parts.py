"""Some of a model's parameters fast, in one pass for all tasks: as each task alone, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import head_parameters, norm_and_bias_parameters
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll, adapt
from metaloom.models.conv4 import Conv4
from tests.numerics.kinds_of_tasks import MODELLING, NUMBERS, Fast, Kind, Setting, problem_of
from tests.numerics.problems import (
    FOR_EVERYTHING,
    Problem,
    assert_gradients_agree,
    perturbed,
    relative_error,
)
from tests.numerics.test_tasks_side_by_side import with_other_data

EXACT = ("unrolled", "rematerialized", "mixed_mode")
RATE = 0.3


class SquaredNorm(nn.Module):
    """A norm that is none of torch's, and does not multiply by its weight alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, inputs: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        normed: Tensor = (1.0 + self.weight.square()) * inputs / length
        return normed


class EveryLayer(nn.Module):
    """All layers that one pass of all tasks can hold a copy per task of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.group_norm = nn.GroupNorm(2, 4)
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.batch_norm1d = nn.BatchNorm1d(4, track_running_stats=False)
        self.layer_norm = nn.LayerNorm((4, 7))
        self.rms_norm = nn.RMSNorm(7)
        self.own_norm = SquaredNorm(7)
        self.head = nn.Linear(28, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.group_norm(self.batch_norm(self.conv(images))))  # [N, 4, 3, 3]
        features = torch.tanh(self.batch_norm1d(self.conv1d(features.flatten(2))))  # [N, 4, 7]
        logits: Tensor = self.head(self.own_norm(self.rms_norm(self.layer_norm(features))).flatten(1))
        return logits


def images_problem(
    make: Callable[[], nn.Module],
    choose: Callable[[nn.Module], list[str]],
    *,
    tasks: Literal["together", "loop"] = "together",
    num_tasks: int = 3,
    step_weights: tuple[float, ...] = (0.0, 0.4, 0.0, 1.1),
) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().double()
    generator = torch.Generator().manual_seed(2)

    def part(count: int) -> dict[str, Tensor]:
        inputs = torch.randn(num_tasks, count, 1, 5, 5, generator=generator, dtype=torch.float64)
        return {"inputs": inputs, "targets": torch.randint(3, (num_tasks, count), generator=generator)}

    adapter = PartAdapter(model, names=choose(model), tasks=tasks, structure=Structure((), "head"))
    rates = Rates(RATE, "per_tensor", len(step_weights) - 1)
    unroll = Unroll(Learner(adapter, Precision("float64")), Sgd(), rates, step_weights)
    meta = adapter.meta_parameters(init=True, backbone=True) | rates.meta_parameters(adapter.init({}, 1))
    batch = TaskBatch(tuple(range(num_tasks)), part(4), part(5))
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)


def small_conv4() -> Conv4:
    return Conv4(num_classes=3, width=4, num_blocks=2, norm="batch")


def of_head(model: nn.Module) -> list[str]:
    return head_parameters(model, Structure((), "head"), None)


def of_norms_biases_and_head(model: nn.Module) -> list[str]:
    weights = [name for name in ("conv.weight", "conv1d.weight") if hasattr(model, "conv1d")]
    return [*norm_and_bias_parameters(model, norms=True, biases=True), *weights, "head.weight"]


@pytest.mark.parametrize("estimator", EXACT)
def test_anil_equals_a_naive_loop_over_tasks(estimator: str) -> None:
    problem = images_problem(small_conv4, of_head, step_weights=(0.0, 0.0, 1.0))
    theta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    body = {
        name.removeprefix("backbone."): value for name, value in theta.items() if name.startswith("backbone.")
    }

    def loss(head: dict[str, Tensor], part: dict[str, Tensor], task: int) -> Tensor:
        logits = functional_call(problem.model, body | head, (part["inputs"][task],))
        return F.cross_entropy(logits, part["targets"][task])

    losses = []
    for task in range(3):
        head = {name: theta[f"init.{name}"] for name in ("head.weight", "head.bias")}
        for _ in range(2):
            grads = torch.autograd.grad(
                loss(head, dict(problem.batch.support), task), list(head.values()), create_graph=True
            )
            head = {
                name: value - theta[f"rates.{name}"].exp() * grad
                for (name, value), grad in zip(head.items(), grads, strict=True)
            }
        losses.append(loss(head, dict(problem.batch.query), task))
    total = torch.stack(losses)
    expected = dict(zip(theta, torch.autograd.grad(total.sum(), list(theta.values())), strict=True))
    actual = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    torch.testing.assert_close(actual.losses, total.detach(), rtol=1e-12, atol=0)
    # Another implementation of the same sums: rounding only.
    assert_gradients_agree(actual.gradient, expected, rtol=1e-10)


@pytest.mark.parametrize("estimator", FOR_EVERYTHING)
def test_every_layer_that_has_a_copy_per_task_equals_the_loop_over_tasks(estimator: str) -> None:
    results = [
        HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
        for problem in (
            images_problem(EveryLayer, of_norms_biases_and_head, tasks=tasks)
            for tasks in ("together", "loop")
        )
    ]
    together, loop = (
        torch.cat([value.flatten() for value in result.gradient.values()]) for result in results
    )
    # Batch statistics that were of all tasks would be off by the first digit.
    assert relative_error(together, loop) < 1e-10
    torch.testing.assert_close(results[0].losses, results[1].losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_one_pass_equals_a_loop_over_padded_tasks_with_draws(
    kind: Kind, is_recomputed: bool, estimator: str
) -> None:
    def gradient(fast: Fast) -> Tensor:
        setting = Setting(
            kind,
            fast,
            MODELLING if kind == "sequences" else None,
            has_ways=True,
            dropout=0.3,
            recompute_blocks=is_recomputed,
            head_chunk=3 if is_recomputed else None,
        )
        problem = problem_of(setting, NUMBERS, is_padded=True)
        found = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
        return torch.cat([value.flatten() for value in found.gradient.values()])

    assert relative_error(gradient("norm_bias"), gradient("norm_bias, loop")) < 1e-10


@pytest.mark.parametrize("choose", [of_head, of_norms_biases_and_head])
@pytest.mark.parametrize("make", [small_conv4, EveryLayer])
def test_changing_one_tasks_data_leaves_the_other_tasks_bit_for_bit(
    make: Callable[[], nn.Module], choose: Callable[[nn.Module], list[str]]
) -> None:
    problem = images_problem(make, choose)
    before, after = (
        list(adapt(problem.unroll, problem.meta, batch, num_steps=3))
        for batch in (problem.batch, with_other_data(problem.batch, 1))
    )
    for name, value in before[-1].fast.items():
        assert torch.equal(after[-1].fast[name][[0, 2]], value[[0, 2]]), name
        assert not torch.equal(after[-1].fast[name][1], value[1]), name


def test_a_head_alone_leaves_the_rest_as_the_backbone_that_is_learned() -> None:
    problem = images_problem(small_conv4, of_head)
    fast = problem.unroll.learner.init(problem.meta, 3)
    assert fast.keys() == {"head.weight", "head.bias"}
    assert "backbone.head.weight" not in problem.meta
    assert "backbone.blocks.0.conv.weight" in problem.meta


def test_lora_on_a_network_with_batch_norm_keeps_tasks_apart() -> None:
    problem = images_problem(small_conv4, of_head)
    adapter = LoraAdapter(
        problem.model, targets=["head"], rank=2, alpha=4.0, generator=torch.Generator().manual_seed(0)
    )
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    fast = learner.init({}, 3)
    together, _ = learner.losses("query", {}, fast, problem.batch, 0)
    alone = [learner.losses("query", {}, learner.init({}, 1), one, 0)[0] for one in problem.batch.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=0)
