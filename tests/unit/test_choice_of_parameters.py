"""Which parameters are fast, and which cannot be."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import (
    head_parameters,
    matching_parameters,
    norm_and_bias_parameters,
)
from metaloom.engine.adapters.soft_prompt import SoftPromptAdapter
from metaloom.engine.adapters.zero_head import ZeroHeadAdapter
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import Gpt
from metaloom.models.mlp import Mlp
from tests.numerics.problems import logits_of

HEAD = Structure((), "head")


def gpt(*, tied: bool = False, context_length: int = 6) -> Gpt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gpt(num_layers=1, width=8, num_heads=2, context_length=context_length, tied_embeddings=tied)


def mlp() -> Mlp:
    return Mlp(num_inputs=3, width=4, num_layers=2, num_outputs=2)


def prompts(
    model: nn.Module, structure: Structure, *, start: Literal["tokens", "normal"] = "tokens"
) -> SoftPromptAdapter:
    return SoftPromptAdapter(
        model,
        num_tokens=3,
        start=start,
        generator=torch.Generator().manual_seed(0),
        structure=structure,
    )


def test_norms_and_biases_are_chosen_apart_from_each_other() -> None:
    model = Conv4(num_classes=2, width=2, num_blocks=1, norm="batch")
    norms = ["blocks.0.norm.weight", "blocks.0.norm.bias"]
    assert norm_and_bias_parameters(model, norms=True, biases=False) == norms
    assert norm_and_bias_parameters(model, norms=False, biases=True) == ["head.bias"]
    assert norm_and_bias_parameters(model, norms=True, biases=True) == [*norms, "head.bias"]
    plain = Conv4(num_classes=2, width=2, num_blocks=1, norm="none")
    assert norm_and_bias_parameters(plain, norms=True, biases=True) == ["blocks.0.conv.bias", "head.bias"]


def test_patterns_are_of_whole_names_in_the_models_order() -> None:
    assert matching_parameters(mlp(), ["head.*", "*.bias"]) == [
        "blocks.0.linear.bias",
        "blocks.1.linear.bias",
        "head.weight",
        "head.bias",
    ]
    assert matching_parameters(mlp(), ["blocks.[1].linear.weight"]) == ["blocks.1.linear.weight"]


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        CapabilityError,
        match=r"'bias' matches no parameter; this model has blocks\.0\.linear\.weight, .*head\.bias",
    ):
        matching_parameters(mlp(), ["head.*", "bias"])


def test_no_parameter_at_all_is_refused() -> None:
    with pytest.raises(CapabilityError, match="chooses no parameter of this model"):
        PartAdapter(mlp(), names=[])


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        (nn.Bilinear(2, 2, 2), "weight", "Bilinear"),
        (nn.MultiheadAttention(4, 2), "out_proj.weight", "NonDynamicallyQuantizableLinear"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "MultiheadAttention"),
    ],
)
def test_what_one_pass_cannot_hold_a_copy_per_task_of_is_refused_and_not_looped_over(
    model: nn.Module, name: str, kind: str
) -> None:
    with pytest.raises(CapabilityError, match=rf"{name} belongs to a {kind}.*set .* part with tasks: loop"):
        PartAdapter(model, names=[name])
    PartAdapter(model, names=[name], tasks="loop")


def test_a_weight_of_two_layers_is_for_a_loop_alone() -> None:
    with pytest.raises(
        CapabilityError, match=r"one weight of several layers \(token_embedding\.weight, head"
    ):
        PartAdapter(gpt(tied=True), names=["token_embedding.weight"])
    adapter = PartAdapter(gpt(tied=True), names=["token_embedding.weight"], tasks="loop")
    tokens = torch.arange(12).view(2, 1, 6)
    logits = logits_of(adapter, {}, adapter.init({}, 2), tokens)
    torch.testing.assert_close(logits, gpt(tied=True)(tokens.flatten(0, 1)).unsqueeze(1))


def test_a_head_that_is_the_embedding_too_is_refused() -> None:
    with pytest.raises(
        CapabilityError, match=r"head\.weight is also token_embedding\.weight.*tied_embeddings"
    ):
        head_parameters(gpt(tied=True), HEAD, None)


def test_a_model_without_a_head_of_its_own_is_refused() -> None:
    with pytest.raises(CapabilityError, match="no head that can be told from the rest"):
        head_parameters(nn.Linear(2, 2), Structure(), None)


def test_rows_that_are_not_as_many_for_each_task_are_refused() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            folded: Tensor = self.head(inputs.flatten().view(-1, 4))
            return folded

    adapter = PartAdapter(Folded(), names=["head.weight"])
    forward_pass = ForwardPass(Precision("float32"), torch.device("cpu"))
    with pytest.raises(
        CapabilityError, match=r"given 3 rows in its first dim for 2 tasks: keep examples in th"
    ):
        adapter.forward({}, adapter.init({}, 2), torch.randn(2, 3, 2), forward_pass)


def test_a_soft_prompt_needs_an_embedding_of_tokens() -> None:
    with pytest.raises(
        CapabilityError, match=r"this model has no embedding of tokens: set it to another kind"
    ):
        prompts(mlp(), HEAD)


def test_a_soft_prompt_may_start_at_small_numbers_and_leaves_no_hook() -> None:
    model = gpt(context_length=9)
    adapter = prompts(model, Structure((), "head", "token_embedding"), start="normal")
    (start,) = adapter.init({}, 2).values()
    assert start.shape == (2, 3, 8)
    assert 0.0 < float(start.abs().max()) < 0.1
    assert logits_of(adapter, {}, adapter.init({}, 2), torch.zeros(2, 4, 6, dtype=torch.int64)).shape[:3] == (
        2,
        4,
        6,
    )
    assert not any(module._forward_hooks for module in model.modules())
    assert adapter.meta_parameters(init=True, backbone=False).keys() == {"init.token_embedding.soft_prompt"}


def test_a_head_starts_at_zero_only_where_it_is_fast() -> None:
    lora = LoraAdapter(
        mlp(), targets="all-linear", rank=1, alpha=1.0, generator=torch.Generator(), structure=HEAD
    )
    with pytest.raises(
        CapabilityError, match=r"adaptation\.head is about the head's own weights, which are n"
    ):
        ZeroHeadAdapter(lora, None)
    beside = LoraAdapter(
        mlp(),
        targets="all-linear",
        rank=1,
        alpha=1.0,
        generator=torch.Generator(),
        whole_modules=["head"],
        structure=HEAD,
    )
    started = ZeroHeadAdapter(beside, None).init({}, 2)
    assert not started["head.weight"].any()
    assert not started["head.bias"].any()
    biases = PartAdapter(mlp(), names=["head.bias"], structure=HEAD)
    with pytest.raises(CapabilityError, match=r"own weights, and head\.weight is not fast: choose it in"):
        ZeroHeadAdapter(biases, None)
    zero = ZeroHeadAdapter(FullAdapter(mlp(), structure=HEAD), None)
    fast = zero.init({}, 2)
    assert not fast["head.weight"].any()
    assert fast["blocks.0.linear.weight"].any()
    assert zero.head_weights(None) == ("head.weight", "head.bias")
