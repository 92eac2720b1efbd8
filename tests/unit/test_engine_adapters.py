"""What is fast: whole models and LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import broadcast_init
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import Gpt
from tests.numerics.problems import logits_of


def gpt(*, tied: bool = True) -> Gpt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gpt(num_layers=2, width=8, num_heads=2, context_length=6, tied_embeddings=tied)


def lora(model: nn.Module, targets: tuple[str, ...] | None = None, *, rank: int = 2) -> LoraAdapter:
    return LoraAdapter(
        model,
        targets="all-linear" if targets is None else targets,
        rank=rank,
        alpha=4.0,
        generator=torch.Generator().manual_seed(0),
    )


def adapted(adapter: LoraAdapter) -> set[str]:
    return {name.rpartition(".")[0] for name in adapter.init({}, 1)}


def test_all_linear_means_every_linear_layer_but_the_head() -> None:
    assert adapted(lora(gpt())) == {
        f"blocks.{index}.{name}"
        for index in (0, 1)
        for name in ("attention.qkv", "attention.proj", "mlp.fc_in", "mlp.fc_out")
    }


def test_targets_are_ends_of_module_names() -> None:
    model = gpt()
    assert adapted(lora(model, ("qkv",))) == {"blocks.0.attention.qkv", "blocks.1.attention.qkv"}
    assert adapted(lora(model, ("attention.proj", "head"))) == {
        "blocks.0.attention.proj",
        "blocks.1.attention.proj",
        "head",
    }
    assert adapted(lora(model, ("blocks.1.mlp.fc_in",))) == {"blocks.1.mlp.fc_in"}


@pytest.mark.parametrize("target", ["q_projj", "kv", "blocks", "norm"])
def test_a_target_that_matches_no_linear_layer_is_refused_with_those_there_are(target: str) -> None:
    with pytest.raises(
        CapabilityError, match=rf"'{target}' matches no linear layer; this model has .*fc_in.*head.*proj.*qkv"
    ):
        lora(gpt(), ("qkv", target))


def test_lora_starts_with_b_at_zero_and_a_within_the_kaiming_bound() -> None:
    fast = lora(gpt()).init({}, 3)
    for name, value in fast.items():
        assert value.shape[0] == 3
        if name.endswith("lora_b"):
            assert not value.any()
        else:
            assert 0.5 < float(value.abs().max()) * value.shape[-1] ** 0.5 <= 1.0


def test_loras_initial_values_follow_from_its_generator_alone() -> None:
    one = lora(gpt()).init({}, 1)
    torch.rand(3)
    other = lora(gpt()).init({}, 1)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lora_meta_parameters_are_what_was_asked_for() -> None:
    adapter = lora(gpt(), ("qkv",))
    init, backbone = (
        {f"init.blocks.{i}.attention.qkv.lora_{kind}" for i in (0, 1) for kind in "ab"},
        {f"backbone.{name}" for name, _ in gpt().named_parameters()},
    )
    assert adapter.meta_parameters(init=True, backbone=False).keys() == init
    assert adapter.meta_parameters(init=False, backbone=True).keys() == backbone
    assert adapter.meta_parameters(init=True, backbone=True).keys() == init | backbone
    assert adapter.meta_parameters(init=False, backbone=False) == {}


def test_meta_parameters_are_copies() -> None:
    model = gpt()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapter = lora(model)
    for value in adapter.meta_parameters(init=True, backbone=True).values():
        assert not value.requires_grad
        value.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not any(value.any() for name, value in adapter.init({}, 1).items() if name.endswith("lora_b"))


def test_a_learned_start_replaces_the_adapters_own_and_collects_every_tasks_gradient() -> None:
    learned = torch.tensor([2.0, 3.0], requires_grad=True)
    fast = broadcast_init({"a": torch.zeros(2), "b": torch.ones(1)}, {"init.a": learned}, 3)
    assert fast["a"].tolist() == [[2.0, 3.0]] * 3
    assert fast["b"].tolist() == [[1.0]] * 3
    (gradient,) = torch.autograd.grad((fast["a"] * torch.tensor([[1.0], [2.0], [4.0]])).sum(), learned)
    assert gradient.tolist() == [7.0, 7.0]


def test_lora_removes_its_hooks_also_when_the_model_fails() -> None:
    model = gpt()
    adapter = lora(model)
    too_long = torch.zeros(1, 1, 7, dtype=torch.int64)
    with pytest.raises(IndexError):
        logits_of(adapter, {}, adapter.init({}, 1), too_long)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_whole_model_adapter_runs_each_task_at_its_own_weights() -> None:
    model = nn.Linear(3, 2)
    adapter = FullAdapter(model)
    fast: dict[str, Tensor] = {"weight": torch.randn(4, 2, 3), "bias": torch.randn(4, 2)}
    inputs = torch.randn(4, 5, 3)
    expected = torch.einsum("tnd,tcd->tnc", inputs, fast["weight"]) + fast["bias"][:, None]
    torch.testing.assert_close(logits_of(adapter, {}, fast, inputs), expected)


def test_the_whole_model_adapter_has_no_backbone_to_learn() -> None:
    with pytest.raises(CapabilityError, match="no backbone for tasks to share"):
        FullAdapter(nn.Linear(2, 2)).meta_parameters(init=True, backbone=True)


def test_the_whole_model_adapter_adapts_tied_embeddings_as_one_weight() -> None:
    adapter = FullAdapter(gpt())
    fast = adapter.init({}, 2)
    assert "head.weight" not in fast
    tokens = torch.arange(12).view(2, 1, 6)
    torch.testing.assert_close(logits_of(adapter, {}, fast, tokens), gpt()(tokens.flatten(0, 1)).unsqueeze(1))


def test_the_whole_model_adapter_starts_at_the_models_own_weights() -> None:
    model = Conv4(num_classes=2, width=2, num_blocks=1, norm="batch")
    fast = FullAdapter(model).init({}, 3)
    for name, value in model.named_parameters():
        assert torch.equal(fast[name], value.detach().expand(3, *value.shape))
