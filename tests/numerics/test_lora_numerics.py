"""Task-batched LoRA against models whose weights have the product added."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.errors import CapabilityError
from metaloom.models.gpt import VOCABULARY
from tests.numerics.problems import (
    TOKENS,
    Problem,
    assert_gradients_agree,
    gpt_problem,
    last,
    logits_of,
    perturbed,
    relative_error,
    small_gpt,
)

NUM_TASKS = 3
Targets = tuple[str, ...] | Literal["all-linear"]
all_targets = pytest.mark.parametrize("targets", ["all-linear", ("qkv",), ("fc_in", "proj"), ("head",)])
either_head = pytest.mark.parametrize("tied", [False, True])


def case(targets: Targets, tied: bool) -> tuple[LoraAdapter, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """An adapter, a backbone, fast weights that differ by task, and tokens `[T, N, L]`."""
    generator = torch.Generator().manual_seed(4)
    model = small_gpt(tied_embeddings=tied)
    adapter = LoraAdapter(model, targets=targets, rank=2, alpha=3.0, generator=generator)
    backbone = perturbed(adapter.meta_parameters(init=False, backbone=True), scale=0.1)
    fast = perturbed(adapter.init({}, NUM_TASKS), scale=0.3)
    return adapter, backbone, fast, torch.randint(VOCABULARY, (NUM_TASKS, 2, TOKENS), generator=generator)


def merged(backbone: dict[str, Tensor], fast: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """W + alpha / R * B A of one task, by parameter name."""
    weights = {name.removeprefix("backbone."): value for name, value in backbone.items()}
    for name in fast:
        layer, _, kind = name.rpartition(".")
        if kind == "lora_a":
            product = fast[f"{layer}.lora_b"][task] @ fast[name][task]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 3.0 / 2.0 * product
    return weights


@all_targets
def test_each_tasks_lora_output_is_that_of_its_merged_weights(targets: Targets) -> None:
    adapter, backbone, fast, tokens = case(targets, tied=False)
    logits = logits_of(adapter, backbone, fast, tokens)
    model = small_gpt()
    for task in range(NUM_TASKS):
        expected = functional_call(model, merged(backbone, fast, task), (tokens[task],))
        # (W + s B A) x against W x + s B (A x): rounding.
        torch.testing.assert_close(logits[task], expected, rtol=1e-11, atol=1e-13)


@all_targets
def test_loras_gradients_are_those_of_the_merged_weights(targets: Targets) -> None:
    adapter, backbone, fast, tokens = case(targets, tied=False)
    generator = torch.Generator().manual_seed(8)
    leaves = {name: value.requires_grad_() for name, value in {**backbone, **fast}.items()}
    logits = logits_of(adapter, backbone, fast, tokens)
    cotangent = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    actual = torch.autograd.grad((logits * cotangent).sum(), list(leaves.values()))
    model = small_gpt()
    outputs = torch.stack(
        [functional_call(model, merged(backbone, fast, task), (tokens[task],)) for task in range(NUM_TASKS)]
    )
    expected = torch.autograd.grad((outputs * cotangent).sum(), list(leaves.values()))
    for name, one, other in zip(leaves, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=f"{name} differs")


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses() -> None:
    adapter, backbone, fast, tokens = case(("qkv",), tied=True)
    assert "backbone.head.weight" not in backbone
    embedding = backbone["backbone.token_embedding.weight"].requires_grad_()
    (tied,) = torch.autograd.grad(logits_of(adapter, backbone, fast, tokens).square().sum(), embedding)
    apart, apart_backbone, _, _ = case(("qkv",), tied=False)
    apart_backbone = {
        **backbone,
        "backbone.token_embedding.weight": embedding.detach().requires_grad_(),
        "backbone.head.weight": embedding.detach().clone().requires_grad_(),
    }
    two = [apart_backbone[f"backbone.{name}.weight"] for name in ("token_embedding", "head")]
    grads = torch.autograd.grad(logits_of(apart, apart_backbone, fast, tokens).square().sum(), two)
    torch.testing.assert_close(tied, grads[0] + grads[1], rtol=1e-12, atol=1e-14)


@either_head
def test_lora_starts_as_the_unadapted_model(tied: bool) -> None:
    adapter, _, _, tokens = case("all-linear", tied)
    logits = logits_of(adapter, {}, adapter.init({}, NUM_TASKS), tokens)
    expected = small_gpt(tied_embeddings=tied)(tokens.flatten(0, 1)).view_as(logits)
    assert torch.equal(logits, expected)


def with_dropout(dropout: float) -> Problem:
    problem = gpt_problem(step_weights=last(3), grain="per_tensor", num_layers=2)
    adapter = LoraAdapter(
        problem.model,
        targets=["qkv", "fc_in"],
        rank=2,
        alpha=6.0,
        generator=torch.Generator().manual_seed(3),
        dropout=dropout,
        structure=Structure(("blocks.0", "blocks.1"), "head"),
    )
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter, recompute_blocks=True)
    unroll = dataclasses.replace(problem.unroll, learner=learner)
    rates = unroll.rates.meta_parameters(adapter.init({}, 1))
    meta = perturbed(adapter.meta_parameters(init=True, backbone=False) | rates, scale=0.1)
    return dataclasses.replace(problem, unroll=unroll, meta=meta)


def test_what_an_adapter_drops_is_dropped_again_where_a_step_is_computed_again() -> None:
    problem, without = with_dropout(0.5), with_dropout(0.0)
    found = {
        name: HYPERGRADIENTS[name]().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        for name in ("unrolled", "rematerialized", "mixed_mode")
    }
    assert_gradients_agree(found["rematerialized"], found["unrolled"], rtol=1e-9)
    assert_gradients_agree(found["mixed_mode"], found["unrolled"], rtol=1e-9)
    plain = HYPERGRADIENTS["unrolled"]().meta_gradient(without.unroll, without.meta, without.batch).gradient
    assert all(relative_error(found["unrolled"][name], value) > 0.01 for name, value in plain.items())
    # Adaptation steps alone drop: at the same fast weights the query loss is the same.
    fast = problem.unroll.learner.init(problem.meta, 2)
    losses, _ = problem.unroll.learner.losses("query", problem.meta, fast, problem.batch, 0)
    expected, _ = without.unroll.learner.losses("query", without.meta, fast, without.batch, 0)
    assert torch.equal(losses, expected)


def test_targets_may_be_patterns_of_whole_names() -> None:
    def layers(*targets: str) -> set[str]:
        adapter = LoraAdapter(
            small_gpt(num_layers=2),
            targets=targets,
            rank=2,
            alpha=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        return {name.rpartition(".")[0] for name in adapter.init({}, 1)}

    assert layers("blocks.1.*.qkv") == {"blocks.1.attention.qkv"}
    assert layers("*.fc_*", "qkv") == {
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("mlp.fc_in", "mlp.fc_out", "attention.qkv")
    }
    with pytest.raises(
        CapabilityError, match=r"adaptation\.fast\.targets: 'blocks\.2\.\*' matches no linear"
    ):
        layers("blocks.2.*")


def test_whole_modules_are_no_targets_and_have_to_be_there() -> None:
    def adapter(*modules: str) -> LoraAdapter:
        return LoraAdapter(
            small_gpt(),
            targets=["qkv"],
            rank=2,
            alpha=1.0,
            generator=torch.Generator().manual_seed(0),
            whole_modules=modules,
        )

    assert {"head.weight", "norm.weight", "norm.bias"} <= adapter("head", "norm").init({}, 1).keys()
    assert not any(
        name.startswith("backbone.head")
        for name in adapter("head").meta_parameters(init=False, backbone=True)
    )
    with pytest.raises(CapabilityError, match=r"modules_to_save: 'qkv' has blocks\.0\.attention\.qkv in it"):
        adapter("qkv")
    with pytest.raises(CapabilityError, match="modules_to_save: 'score' matches no module with parameters"):
        adapter("score")
