"""One layer and nothing else: the networks of the regressions that have a symmetry to be found.

Shape letters: N examples, C channels of the input, L its places, F of a filter, P = L - F + 1 places of an
output channel, C' output channels, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LocallyConnected1d(nn.Module):
    """A convolution whose places have filters of their own: no padding.

    `y_op = sum_cf weight[o, c, p, f] x_c(p + f) + bias_op`, with weight `[C', C, P, F]` and bias `[C', P]`,
    both of which start uniform in +-1 / sqrt(C F), as those of torch's layers do.

    Args:
        in_channels: C.
        out_channels: C'.
        length: L.
        kernel_size: F, at most L.
        bias: whether there is one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, length: int, kernel_size: int, bias: bool
    ) -> None:
        super().__init__()
        num_places = length - kernel_size + 1
        bound = 1.0 / math.sqrt(in_channels * kernel_size)
        weight = torch.empty(out_channels, in_channels, num_places, kernel_size)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, num_places).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """`[N, C', P]` of inputs `[N, C, L]`."""
        windows = inputs.unfold(2, self.weight.shape[-1], 1)  # [N, C, P, F]
        outputs = torch.einsum("ncpf,ocpf->nop", windows, self.weight)
        return outputs if self.bias is None else outputs + self.bias


class SingleLayer(nn.Module):
    """One layer without an activation, its outputs `[N, O]` laid flat: channel by channel, place by place.

    Those of Zhou et al. 2021, "Meta-Learning Symmetries by Reparameterization", section 5 (MAML-FC, MAML-LC,
    MAML-Conv): no bias, no padding, filters of 3 places.

    Args:
        layer: an `nn.Linear` of the flat input, or what takes inputs `[N, C, ...]`.
        is_linear: whether it is the former.

    Attributes:
        heads: the module that gives each output, by the output's name.
    """

    def __init__(self, layer: nn.Module, *, is_linear: bool) -> None:
        super().__init__()
        self.layer = layer
        self._is_linear = is_linear
        self.heads = {"tasks": "layer"}

    def forward(self, inputs: Tensor, head: str = "tasks") -> Tensor:
        """Outputs `[N, O]` of inputs `[N, L]`, `[N, C, L]` or, of a convolution, `[N, C, L, L']`.

        Args:
            head: `tasks`.
        """
        if self._is_linear:
            inputs = inputs.flatten(1)
        elif inputs.ndim == 2:
            inputs = inputs[:, None]
        outputs: Tensor = self.get_submodule(self.heads[head])(inputs)
        return outputs.flatten(1)


def linear(input_shape: Sequence[int], num_outputs: int, *, bias: bool) -> SingleLayer:
    """Every output from every number of the input."""
    return SingleLayer(nn.Linear(math.prod(input_shape), num_outputs, bias=bias), is_linear=True)


def locally_connected(
    input_shape: Sequence[int], num_outputs: int, *, kernel_size: int, bias: bool
) -> SingleLayer:
    """Every output from the places around its own, by a filter of its own.

    Args:
        input_shape: `[L]` or `[C, L]`.
        num_outputs: a multiple of P.
    """
    channels, (length,) = channels_and_sides(input_shape)
    out_channels = num_outputs // (length - kernel_size + 1)
    layer = LocallyConnected1d(channels, out_channels, length=length, kernel_size=kernel_size, bias=bias)
    return SingleLayer(layer, is_linear=False)


def convolution(input_shape: Sequence[int], num_outputs: int, *, kernel_size: int, bias: bool) -> SingleLayer:
    """Every output from the places around its own, by its channel's filter.

    Args:
        input_shape: `[L]`, `[C, L]` or `[C, L, L']`.
        num_outputs: a multiple of the number of places.
    """
    channels, sides = channels_and_sides(input_shape)
    kind = nn.Conv1d if len(sides) == 1 else nn.Conv2d
    out_channels = num_outputs // math.prod(side - kernel_size + 1 for side in sides)
    return SingleLayer(kind(channels, out_channels, kernel_size, bias=bias), is_linear=False)


def channels_and_sides(input_shape: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Of a shape `[L]`, which has one channel, `[C, L]` or `[C, L, L']`."""
    return (1, input_shape) if len(input_shape) == 1 else (input_shape[0], input_shape[1:])
