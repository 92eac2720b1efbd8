"""Norms in forms that can be differentiated in forward mode over reverse.

Shape letters: N examples, C channels, G groups of them.
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
