"""A stochastic layer's draws and price against the same model written out, with the noise held."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure, nothing_attached, run_model
from metaloom.engine.draws import Draws
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.forward_pass import Bottleneck, ForwardPass
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4
from metaloom.models.mlp import Mlp
from tests.numerics.problems import assert_gradients_agree, last, perturbed

T, S, Q, P, WIDTH, CODE = 2, 4, 3, 2, 6, 3
BETA, RATE, SEED = 0.3, 0.1, 5
Tensors = Mapping[str, Tensor]


def batch() -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> dict[str, Tensor]:
        return {
            "inputs": torch.randn(T, count, P, generator=generator).double(),
            "targets": torch.randn(T, count, 1, generator=generator).double(),
        }

    return TaskBatch((7, 9), part(S), part(Q))


def unroll(*, recompute_blocks: bool = False) -> Unroll:
    """One inner step on the head's low-rank weights; everything else is shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mlp(
            num_inputs=P, width=WIDTH, num_layers=2, num_outputs=1, activation="tanh", bottleneck=(1, CODE)
        ).double()
    adapter = LoraAdapter(
        model,
        targets=["head"],
        rank=1,
        alpha=1.0,
        generator=torch.Generator().manual_seed(2),
        structure=Structure(("blocks.0", "blocks.1"), model.heads),
    )
    learner = Learner(
        adapter,
        Precision("float64"),
        seed=SEED,
        criterion=MeanSquaredError(),
        head="tasks",
        bottleneck=BETA,
        recompute_blocks=recompute_blocks,
    )
    return Unroll(learner, Sgd(), Rates(RATE, "none", 1), last(1))


def written_out(meta: Tensors, data: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-loss, the loss and the divergence of each task, by plain operations, differentiable twice."""
    w = {name.removeprefix("backbone."): value for name, value in meta.items()}
    totals, losses, prices = [], [], []
    for task, number in enumerate(data.numbers):

        def features(inputs: Tensor, part: str) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(inputs @ w["blocks.0.linear.weight"].T + w["blocks.0.linear.bias"])
            code = hidden @ w["bottleneck.linear.weight"].T + w["bottleneck.linear.bias"]
            mean, std = code[:, :CODE], F.softplus(code[:, CODE:])
            draws = Draws(SEED, (number,), 0 if part == "" else 1, part)  # noqa: B023
            eps = draws.normal(torch.zeros_like(mean), torch.ones_like(std), "/1").detach()
            z = mean + std * eps
            price = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), 1.0)).sum(1).mean()
            return torch.tanh(z @ w["blocks.1.linear.weight"].T + w["blocks.1.linear.bias"]), price

        def loss(a: Tensor, b: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            weight = w["head.weight"] + b @ a
            return (hidden @ weight.T + w["head.bias"] - targets).square().mean()

        a, b = w["init.head.lora_a"] * 1.0, w["init.head.lora_b"] * 1.0
        support, _ = features(data.support["inputs"][task], "")
        inner = loss(a, b, support, data.support["targets"][task])
        grad_a, grad_b = torch.autograd.grad(inner, (a, b), create_graph=True)
        query, price = features(data.query["inputs"][task], "query/")
        outer = loss(a - RATE * grad_a, b - RATE * grad_b, query, data.query["targets"][task])
        totals.append(outer + BETA * price)
        losses.append(outer)
        prices.append(price)
    return torch.stack(totals), torch.stack(losses), torch.stack(prices)


@pytest.mark.parametrize("recompute_blocks", [False, True])
@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_the_gradient_is_that_of_the_model_written_out(estimator: str, recompute_blocks: bool) -> None:
    problem, data = unroll(recompute_blocks=recompute_blocks), batch()
    meta = perturbed(problem.meta_parameters(init=True, backbone=True), scale=0.1)
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    totals, losses, prices = written_out(leaves, data)
    expected = dict(zip(leaves, torch.autograd.grad(totals.sum(), list(leaves.values())), strict=True))
    found = HYPERGRADIENTS[estimator]().meta_gradient(problem, meta, data)
    assert found.losses.tolist() == pytest.approx(totals.tolist(), rel=1e-12)
    assert found.metrics["loss_after"].tolist() == pytest.approx(losses.tolist(), rel=1e-12)
    assert found.metrics["kl_after"].tolist() == pytest.approx(prices.tolist(), rel=1e-12)
    assert_gradients_agree(found.gradient, expected, rtol=1e-9)


def test_a_measured_query_is_told_at_the_means() -> None:
    problem, data = unroll(), batch()
    meta = perturbed(problem.meta_parameters(init=True, backbone=True), scale=0.1)
    before = adaptation_curve(problem, meta, data, num_steps=0)["loss"][:, 0]
    w = {name.removeprefix("backbone."): value for name, value in meta.items()}
    hidden = torch.tanh(data.query["inputs"] @ w["blocks.0.linear.weight"].T + w["blocks.0.linear.bias"])
    mean = (hidden @ w["bottleneck.linear.weight"].T + w["bottleneck.linear.bias"])[..., :CODE]
    hidden = torch.tanh(mean @ w["blocks.1.linear.weight"].T + w["blocks.1.linear.bias"])
    weight = w["head.weight"] + w["init.head.lora_b"] @ w["init.head.lora_a"]
    outputs = hidden @ weight.T + w["head.bias"]
    expected = (outputs - data.query["targets"]).square().mean((1, 2))
    assert before.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_padding_changes_neither_draws_nor_price() -> None:
    problem, data = unroll(), batch()
    meta = perturbed(problem.meta_parameters(init=True, backbone=True), scale=0.1)

    def padded(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = part["inputs"].shape[1]
        more = {name: torch.cat([value, 3.0 * value[:, :1]], dim=1) for name, value in part.items()}
        return more | {"weights": (torch.arange(count + 1) < count).double().expand(T, -1)}

    wider = dataclasses.replace(data, support=padded(data.support), query=padded(data.query))
    estimator = HYPERGRADIENTS["rematerialized"]()
    whole, other = (estimator.meta_gradient(problem, meta, each) for each in (data, wider))
    assert other.losses.tolist() == pytest.approx(whole.losses.tolist(), rel=1e-12)
    assert_gradients_agree(other.gradient, whole.gradient, rtol=1e-10)


def test_a_stochastic_layer_that_nobody_pays_for_is_refused() -> None:
    problem = unroll()
    learner = dataclasses.replace(problem.learner, bottleneck=None)
    meta = problem.meta_parameters(init=True, backbone=True)
    with pytest.raises(CapabilityError, match=r"the model calls torch\.normal"):
        learner.losses("support", meta, learner.init(meta, T), batch(), 0)


def test_convolutions_have_it_before_their_head() -> None:
    network = Conv4(num_classes=3, width=4, num_blocks=2, norm="batch", bottleneck=CODE)
    assert network.head.in_features == CODE
    assert network.bottleneck is not None
    images = torch.randn(5, 1, 8, 8)
    forward_pass = ForwardPass(Precision(), torch.device("cpu"), head="tasks", bottleneck=Bottleneck())
    structure = Structure((), network.heads)
    output, _, _ = run_model(
        network, structure, {}, images, forward_pass, attachments={}, attach=nothing_attached
    )
    hidden = images
    for block in network.blocks:
        hidden = block(hidden)
    mean = network.bottleneck.linear(hidden.mean(dim=(2, 3)))[:, :CODE]
    torch.testing.assert_close(output, network.head(mean))
