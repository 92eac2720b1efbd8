"""Norms in forms that can be differentiated in forward mode over reverse, or leave examples out.

Shape letters: T tasks, N examples, C channels, G groups of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def written_out_group_norm(
    inputs: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm` of `[N, C, ...]` from elementary functions: its backward pass has no
    forward-mode rule. Statistics are taken in at least float32."""
    if inputs.shape[1] % num_groups != 0:
        return F.group_norm(inputs, num_groups, weight, bias, eps)  # which says what is wrong with it
    wide = torch.promote_types(inputs.dtype, torch.float32)
    groups = inputs.reshape(inputs.shape[0], num_groups, -1).to(wide)
    centered = groups - groups.mean(dim=-1, keepdim=True)
    scale = (centered.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normed = (centered * scale).reshape(inputs.shape).to(inputs.dtype)
    of_channels = (1, -1, *(1,) * (inputs.ndim - 2))
    if weight is not None:
        normed = normed * weight.view(of_channels)
    return normed if bias is None else normed + bias.view(of_channels)


def weighted_batch_norm(
    inputs: Tensor,
    example_weights: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of `[T * N, C, ...]` by the statistics of each task's examples,
    weighted, from elementary functions: one of weight 0 has no part in them. They are taken in at least
    float32.

    Args:
        example_weights: `[T, N]`.
        weight: `[C]`, or one per task `[T, C]`; so is the bias.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    num_behind = inputs.ndim - 2
    values, shares = (
        inputs.reshape(*example_weights.shape, *inputs.shape[1:]).to(wide),
        example_weights.to(wide),
    )
    total = shares.sum(1, keepdim=True)
    shares = shares / torch.where(total == 0.0, 1.0, total)
    shares = shares.view(*shares.shape, *(1,) * (num_behind + 1)) / inputs[0, 0].numel()
    dims = [dim for dim in range(1, values.ndim) if dim != 2]
    centered = values - (values * shares).sum(dims, keepdim=True)
    scale = ((centered.square() * shares).sum(dims, keepdim=True) + eps).rsqrt()
    normed = (centered * scale).to(inputs.dtype)  # [T, N, C, ...]

    def of_channels(value: Tensor) -> Tensor:
        return value.view(-1, 1, inputs.shape[1], *(1,) * num_behind)

    if weight is not None:
        normed = normed * of_channels(weight)
    if bias is not None:
        normed = normed + of_channels(bias)
    return normed.view(inputs.shape)
