"""What the inner rules share: the gradient that they follow, from that of the inner loss.

Shape letters: T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import Tensors

ANCHOR = "anchor/"


def anchors(fast: Tensors, *, proximal: float) -> dict[str, Tensor]:
    """What a rule's state holds for its proximal term: phi_0 itself, or nothing where there is no term."""
    return {ANCHOR + name: value for name, value in fast.items()} if proximal != 0.0 else {}


def kept_anchors(state: Tensors) -> dict[str, Tensor]:
    """The same anchors for the next step: the very tensors, so that snapshots of a state share them."""
    return {name: value for name, value in state.items() if name.startswith(ANCHOR)}


def followed_gradient(
    fast: Tensors,
    state: Tensors,
    grads: Tensors,
    *,
    proximal: float,
    clip_norm: float | None,
    weight_decay: float,
) -> dict[str, Tensor]:
    """`clip(g + proximal * (phi - phi_0)) + weight_decay * phi`, name -> `[T, ...]`.

    The proximal term is part of the inner objective, `L + proximal / 2 * |phi - phi_0|^2` (iMAML:
    Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", equation 3), so it is clipped with
    the rest. Weight decay is part of the rule, as in torch.optim, and comes after clipping.

    Args:
        proximal: at least 0.
        clip_norm: the largest norm of one task's gradient over all its fast weights; None for no limit.
        weight_decay: at least 0.
    """
    followed = dict(grads)
    if proximal != 0.0:
        followed = {
            name: grad + proximal * (fast[name] - state[ANCHOR + name]) for name, grad in followed.items()
        }
    if clip_norm is not None:
        followed = clip_per_task(followed, clip_norm)
    if weight_decay != 0.0:
        followed = {name: grad + weight_decay * fast[name] for name, grad in followed.items()}
    return followed


def clip_per_task(grads: Tensors, clip_norm: float) -> dict[str, Tensor]:
    """Each task's gradient, scaled so that its norm over all tensors `[T, ...]` is at most `clip_norm`."""
    squared_norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)  # [T]
    # Clamped before the root, whose derivative at an exactly zero gradient is infinite.
    scale = clip_norm * squared_norms.clamp(min=clip_norm**2).rsqrt()
    return {name: grad * scale.view(-1, *(1,) * (grad.ndim - 1)) for name, grad in grads.items()}
