"""What is fast, what is shared and where both start, where weights are made of symmetries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metaloom.engine.adapters.msr import Dense, Kronecker, MsrAdapter, Symmetry
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import Gpt
from tests.numerics.problems import logits_of


def msr(
    model: nn.Module,
    symmetry: Symmetry | None = None,
    layers: tuple[str, ...] | None = None,
    *,
    seed: int = 0,
) -> MsrAdapter:
    return MsrAdapter(
        model,
        symmetry=symmetry or Kronecker(),
        layers="all" if layers is None else layers,
        generator=torch.Generator().manual_seed(seed),
    )


def conv4() -> Conv4:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Conv4(num_classes=3, width=4, num_blocks=2, norm="none")


def made(adapter: MsrAdapter) -> set[str]:
    return {name.removesuffix(".v") for name in adapter.init({}, 1) if name.endswith(".v")}


def test_layers_are_ends_of_module_names_and_all_is_every_linear_and_convolutional_one() -> None:
    everything = {"blocks.0.conv.weight", "blocks.1.conv.weight", "head.weight"}
    assert made(msr(conv4())) == everything
    assert made(msr(conv4(), layers=("conv", "head"))) == everything
    assert made(msr(conv4(), layers=("blocks.1.conv",))) == {"blocks.1.conv.weight"}


@pytest.mark.parametrize("layer", ["onv", "blocks", "norm", "convv"])
def test_an_end_that_matches_no_layer_is_refused_with_those_there_are(layer: str) -> None:
    with pytest.raises(
        CapabilityError,
        match=rf"layers: '{layer}' matches no linear or convolutional layer; this model has blocks\.0\.conv, "
        r"blocks\.1\.conv, head\.",
    ):
        msr(conv4(), layers=("head", layer))


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(CapabilityError, match="layers: all; this model has no linear or convolutional layer"):
        msr(nn.LayerNorm(3))


def test_what_is_no_layers_weight_is_fast_itself_and_the_rest_is_shared() -> None:
    meta = msr(conv4(), Dense(5), ("blocks.1.conv",)).meta_parameters(init=True, backbone=True)
    shapes = {name: tuple(value.shape) for name, value in meta.items()}
    assert shapes == {
        "init.blocks.0.conv.weight": (4, 1, 3, 3),
        "init.blocks.0.conv.bias": (4,),
        "init.blocks.1.conv.weight.v": (5,),
        "init.blocks.1.conv.bias": (4,),
        "init.head.weight": (3, 4),
        "init.head.bias": (3,),
        "backbone.blocks.1.conv.weight.u": (4 * 4 * 9, 5),
    }


def test_the_parts_of_a_product_are_over_outputs_inputs_and_places() -> None:
    meta = msr(conv4()).meta_parameters(init=False, backbone=True)
    shapes = {name.removeprefix("backbone."): tuple(value.shape) for name, value in meta.items()}
    assert shapes == {
        "blocks.0.conv.weight.u_out": (4, 4),
        "blocks.0.conv.weight.u_in": (1, 1),
        "blocks.0.conv.weight.u_filter": (9, 9),
        "blocks.1.conv.weight.u_out": (4, 4),
        "blocks.1.conv.weight.u_in": (4, 4),
        "blocks.1.conv.weight.u_filter": (9, 9),
        "head.weight.u_out": (3, 3),
        "head.weight.u_in": (4, 4),
    }


def test_a_product_starts_at_the_models_own_weights() -> None:
    model = conv4()
    adapter = msr(model)
    weights = adapter.weights({}, adapter.init({}, 2))
    for name, value in model.named_parameters():
        assert torch.equal(weights[name], value.detach().expand(2, *value.shape)), name


def test_a_dense_symmetry_starts_at_random_as_the_authors_code_has_it() -> None:
    meta = msr(nn.Linear(70, 68, bias=False), Dense(30), seed=1).meta_parameters(init=True, backbone=True)
    u, v = meta["backbone.weight.u"], meta["init.weight.v"]
    # 142,800 numbers: their deviation is known to 0.2 %. 30 numbers: to 13 %.
    assert float(u.std()) == pytest.approx(0.01, rel=0.01)
    assert float(v.std()) == pytest.approx(1 / 68, rel=0.5)
    other = msr(nn.Linear(70, 68, bias=False), Dense(30), seed=2).meta_parameters(init=True, backbone=True)
    assert not torch.allclose(other["backbone.weight.u"], u)
    again = msr(nn.Linear(70, 68, bias=False), Dense(30), seed=1).meta_parameters(init=True, backbone=True)
    assert torch.equal(again["backbone.weight.u"], u)


def test_tied_weights_are_made_once() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gpt(num_layers=1, width=8, num_heads=2, context_length=6, tied_embeddings=True)
    adapter = msr(model, layers=("head",))
    assert made(adapter) == {"token_embedding.weight"}
    tokens = torch.arange(12).view(2, 1, 6)
    outputs = logits_of(adapter, {}, adapter.init({}, 2), tokens)
    torch.testing.assert_close(outputs, model(tokens.flatten(0, 1)).unsqueeze(1))
