"""The built-in models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from metaloom.models.context import ConvContext, MlpContext
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import PAD, VOCABULARY, Gpt
from metaloom.models.mlp import Mlp
from metaloom.recipe.rules.model import GPT_BLOCK_LAYERS


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gpt(*, tied: bool = True, num_layers: int = 2) -> Gpt:
    model = Gpt(num_layers=num_layers, width=12, num_heads=3, context_length=8, tied_embeddings=tied)
    return model.double()


@pytest.mark.parametrize("length", [1, 5, 8])
def test_gpt_gives_logits_of_every_position(length: int) -> None:
    assert gpt()(torch.zeros(2, length, dtype=torch.int64)).shape == (2, length, VOCABULARY)


@pytest.mark.parametrize("position", range(8))
def test_a_later_token_does_not_reach_earlier_logits_and_an_earlier_one_reaches_later(position: int) -> None:
    model = gpt()
    tokens = torch.randint(VOCABULARY, (3, 8))
    changed = tokens.clone()
    changed[1, position] = (changed[1, position] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert torch.equal(before[1, :position], after[1, :position])
    assert all(not torch.equal(before[1, at], after[1, at]) for at in range(position, 8))
    assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_gpts_attention_equals_torchs_causal_attention() -> None:
    attention = gpt().blocks[0].get_submodule("attention")
    hidden = torch.randn(2, 8, 12).double()
    query, key, value = (
        part.view(2, 8, 3, 4).transpose(1, 2) for part in attention.get_submodule("qkv")(hidden).split(12, -1)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = attention.get_submodule("proj")(mixed.transpose(1, 2).reshape(2, 8, 12))
    # The same softmax, in another order of operations.
    torch.testing.assert_close(attention(hidden), expected, rtol=1e-12, atol=1e-14)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, apart = gpt(), gpt(tied=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert apart.head.weight is not apart.token_embedding.weight
    names = {name for name, _ in tied.named_parameters()}
    assert {name for name, _ in apart.named_parameters()} - names == {"head.weight"}


def test_gpt_starts_near_a_uniform_guess() -> None:
    logits = gpt()(torch.randint(VOCABULARY, (16, 8)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(VOCABULARY, (128,)))
    # Initial weights of 0.02 leave logits of order 0.1: their square is what the loss is off by.
    assert float(loss.detach()) == pytest.approx(math.log(VOCABULARY), abs=0.05)


def test_deeper_gpts_start_with_smaller_residual_branches() -> None:
    shallow, deep = (
        float(gpt(num_layers=layers).state_dict()["blocks.0.mlp.fc_out.weight"].std()) for layers in (1, 16)
    )
    # 576 weights: their standard deviation is known to 3 %, and the ratio is to be 4.
    assert shallow / deep == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_conv4_gives_one_logit_per_class_and_halves_the_image_in_every_block(
    norm: str, num_blocks: int
) -> None:
    model = Conv4(num_classes=5, width=6, num_blocks=num_blocks, norm=norm)
    images = torch.randn(3, 1, 28, 28)
    assert model(images).shape == (3, 5)
    sizes = []
    features = images
    for block in model.blocks:
        features = block(features)
        sizes.append(tuple(features.shape))
    assert sizes == [(3, 6, size, size) for size in (14, 7, 4, 2)[:num_blocks]]


def test_conv4_with_batch_norm_uses_the_examples_at_hand_in_training_and_evaluation() -> None:
    model = Conv4(num_classes=2, width=3, num_blocks=2, norm="batch")
    images = torch.randn(4, 1, 28, 28)
    assert not list(model.buffers())
    assert torch.equal(model.train()(images), model.eval()(images))
    # The whole batch scaled is the same after normalisation, up to its epsilon.
    torch.testing.assert_close(model(images), model(100.0 * images), rtol=1e-2, atol=1e-3)


def test_conv4_without_norms_treats_each_example_alone() -> None:
    model = Conv4(num_classes=2, width=3, num_blocks=2, norm="none").double()
    images = torch.randn(4, 1, 28, 28).double()
    # Other batch sizes take other kernels: rounding.
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (33, 20), (1, 1)])
def test_conv4_takes_images_of_any_size_and_channels(num_channels: int, size: tuple[int, int]) -> None:
    model = Conv4(num_classes=5, width=6, num_blocks=4, norm="none", num_channels=num_channels)
    assert model(torch.randn(2, num_channels, *size)).shape == (2, 5)


def test_a_second_head_leaves_all_that_there_is_without_it_as_it_is() -> None:
    models: list[tuple[type[torch.nn.Module], dict[str, object], str]] = [
        (Conv4, {"num_classes": 2, "width": 3, "num_blocks": 2, "norm": "batch"}, "num_rehearsal_classes"),
        (Mlp, {"num_inputs": 2, "width": 3, "num_layers": 2, "num_outputs": 1}, "num_rehearsal_outputs"),
        (
            Gpt,
            {"num_layers": 2, "width": 4, "num_heads": 2, "context_length": 5, "tied_embeddings": True},
            "num_classes",
        ),
    ]
    for model, sizes, second in models:
        torch.manual_seed(3)
        one = model(**sizes).state_dict()
        torch.manual_seed(3)
        both = model(**sizes, **{second: 7}).state_dict()
        assert len(both) == len(one) + 2
        assert all(torch.equal(both[name], value) for name, value in one.items())


def test_each_head_reads_the_same_features() -> None:
    model = Mlp(num_inputs=3, width=4, num_layers=1, num_outputs=2, num_rehearsal_outputs=5).double()
    assert model.heads == {"tasks": "head", "rehearsal": "rehearsal_head"}
    inputs = torch.randn(6, 3).double()
    layer = model.blocks[0].get_submodule("linear")
    features = layer(inputs).clamp(min=0.0)
    torch.testing.assert_close(model(inputs), model.head(features))
    torch.testing.assert_close(model(inputs, "rehearsal"), model.rehearsal_head(features))


def test_mlp_is_its_layers_one_after_the_other() -> None:
    model = Mlp(num_inputs=4, width=5, num_layers=2, num_outputs=3, activation="tanh").double()
    state, hidden = model.state_dict(), torch.randn(7, 2, 2).double()
    inputs = hidden
    hidden = hidden.reshape(7, 4)
    for block in range(2):
        weight, bias = (state[f"blocks.{block}.linear.{name}"] for name in ("weight", "bias"))
        hidden = (hidden @ weight.T + bias).tanh()
    torch.testing.assert_close(model(inputs), hidden @ state["head.weight"].T + state["head.bias"])


def test_padding_on_the_right_changes_no_logits_and_no_class() -> None:
    model = Gpt(
        num_layers=2, width=12, num_heads=3, context_length=8, tied_embeddings=True, num_classes=4
    ).double()
    tokens = torch.randint(VOCABULARY, (5, 8))
    lengths = [8, 5, 1, 3, 0]
    padded = torch.stack(
        [torch.cat([row[:n], torch.full((8 - n,), PAD)]) for row, n in zip(tokens, lengths, strict=True)]
    )
    logits, classes = model(padded), model(padded, "classification")
    assert (logits.shape, classes.shape) == ((5, 8, VOCABULARY), (5, 4))
    for row, length in enumerate(lengths[:-1]):
        alone = tokens[row : row + 1, :length]
        # Attention over other lengths is added in another order.
        torch.testing.assert_close(logits[row, :length], model(alone)[0], rtol=1e-11, atol=1e-13)
        expected = model(alone, "classification")[0]
        torch.testing.assert_close(classes[row], expected, rtol=1e-11, atol=1e-13)
    assert bool(classes.isfinite().all())


def test_the_recipes_rules_know_the_linear_layers_of_gpt() -> None:
    layers = {name for name, layer in gpt().named_modules() if isinstance(layer, torch.nn.Linear)}
    blocks = {f"blocks.{block}.{name}" for block in range(2) for name in GPT_BLOCK_LAYERS}
    assert layers == blocks | {"head"}


def test_with_layer_norm_an_image_is_normed_by_itself() -> None:
    model = Conv4(num_classes=3, width=4, num_blocks=1, norm="layer").double()
    images = torch.randn(5, 1, 8, 8).double()
    assert torch.equal(model(images)[2], model(images[2:3])[0])
    block = model.blocks[0]
    hidden = F.conv2d(images, block.get_submodule("conv").weight, stride=2, padding=1)  # type: ignore[arg-type]
    centered = hidden - hidden.mean(dim=(1, 2, 3), keepdim=True)
    scale = (centered.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(images), (centered / scale).clamp(min=0.0), rtol=1e-12, atol=1e-14)


def test_a_context_has_the_size_of_what_it_describes() -> None:
    for norm in ("batch", "layer", "none"):
        network = ConvContext(num_channels=2, num_context=3, width=4, norm=norm)
        assert network(torch.randn(5, 2, 7, 6)).shape == (5, 3, 7, 6)
    assert MlpContext(num_inputs=6, num_context=3, width=4)(torch.randn(5, 2, 3)).shape == (5, 3)


def test_layers_of_unequal_widths_follow_each_other() -> None:
    model = Mlp(num_inputs=3, width=9, num_layers=2, num_outputs=4, widths=[5, 2]).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    weights = dict(model.named_parameters())
    shapes = [tuple(value.shape) for name, value in weights.items() if name.endswith("weight")]
    assert shapes == [(5, 3), (2, 5), (4, 2)]
    hidden = inputs
    for block in ("blocks.0", "blocks.1"):
        hidden = hidden @ weights[f"{block}.linear.weight"].T + weights[f"{block}.linear.bias"]
        hidden = hidden.relu()
    expected = hidden @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(inputs), expected, rtol=1e-12)
