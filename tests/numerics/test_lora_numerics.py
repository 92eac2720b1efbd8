"""Task-batched LoRA against models whose weights have the product added."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.models.gpt import VOCABULARY
from tests.numerics.problems import TOKENS, logits_of, perturbed, small_gpt

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
