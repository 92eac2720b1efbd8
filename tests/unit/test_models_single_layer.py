"""One layer and nothing else.

Shape letters: N examples, C channels, L places of the input, F of a filter, P of an output channel.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from metaloom.models.single_layer import (
    LocallyConnected1d,
    SingleLayer,
    channels_and_sides,
    convolution,
    linear,
    locally_connected,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def parameters(model: SingleLayer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def test_a_locally_connected_layer_has_a_filter_for_each_place() -> None:
    layer = LocallyConnected1d(2, 3, length=6, kernel_size=4, bias=True).double()
    inputs = torch.randn(5, 2, 6, dtype=torch.float64)
    outputs = layer(inputs)
    assert layer.bias is not None
    assert outputs.shape == (5, 3, 3)
    for channel in range(3):
        for place in range(3):
            window = inputs[:, :, place : place + 4]
            expected = (window * layer.weight[channel, :, place]).sum((1, 2)) + layer.bias[channel, place]
            torch.testing.assert_close(outputs[:, channel, place], expected, rtol=1e-13, atol=1e-14)


def test_a_locally_connected_layer_with_one_filter_is_a_convolution() -> None:
    layer = LocallyConnected1d(2, 3, length=7, kernel_size=3, bias=False).double()
    filters = torch.randn(3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(filters[:, :, None].expand_as(layer.weight))
    inputs = torch.randn(4, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(inputs), F.conv1d(inputs, filters), rtol=1e-13, atol=1e-14)


def test_a_locally_connected_layer_starts_as_a_convolution_does() -> None:
    layer = LocallyConnected1d(4, 50, length=70, kernel_size=3, bias=True)
    assert layer.bias is not None
    bound = 1.0 / math.sqrt(12)
    for values in (layer.weight.detach(), layer.bias.detach()):
        # Uniform: the deviation of thousands of numbers is known to a percent or two.
        assert float(values.abs().max()) <= bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3.0), rel=0.03)


def test_the_networks_of_the_papers_one_dimensional_problems() -> None:
    inputs = torch.randn(5, 70)
    models = {
        "linear": linear([70], 68, bias=False),
        "locally connected": locally_connected([70], 68, kernel_size=3, bias=False),
        "convolution": convolution([70], 68, kernel_size=3, bias=False),
    }
    assert {name: parameters(model)["layer.weight"] for name, model in models.items()} == {
        "linear": (68, 70),
        "locally connected": (1, 1, 68, 3),
        "convolution": (1, 1, 3),
    }
    for model in models.values():
        assert model(inputs).shape == (5, 68)
        assert len(parameters(model)) == 1


def test_an_images_outputs_are_laid_flat_channel_by_channel() -> None:
    model = convolution([2, 6, 5], 3 * 4 * 3, kernel_size=3, bias=True).double()
    assert parameters(model) == {"layer.weight": (3, 2, 3, 3), "layer.bias": (3,)}
    images = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    weights = dict(model.named_parameters())
    expected = F.conv2d(images, weights["layer.weight"], weights["layer.bias"]).reshape(4, -1)
    torch.testing.assert_close(model(images, "tasks"), expected, rtol=1e-13, atol=1e-14)


def test_a_linear_layer_reads_inputs_of_any_shape() -> None:
    assert linear([2, 3, 4], 5, bias=True)(torch.randn(7, 2, 3, 4)).shape == (7, 5)


def test_inputs_of_one_dimension_have_one_channel() -> None:
    assert channels_and_sides([9]) == (1, [9])
    assert channels_and_sides([2, 9]) == (2, [9])
    assert channels_and_sides([2, 9, 8]) == (2, [9, 8])


@pytest.mark.parametrize("kind", [locally_connected, convolution])
def test_channels_are_as_many_as_the_outputs_ask_for(kind: type) -> None:
    model = kind([2, 9], 3 * 7, kernel_size=3, bias=True)
    assert model(torch.randn(4, 2, 9)).shape == (4, 21)
