"""What the inner rules share: the gradient that they follow, from that of the inner loss.

Shape letters: T tasks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import Tensors

ANCHOR = "anchor/"


@dataclasses.dataclass(frozen=True)
class GradientTerms:
    """`d = clip(g + proximal * (phi - phi_0)) + weight_decay * phi`, which a rule follows in place of g.

    The proximal term is part of the inner objective, `L + proximal / 2 * |phi - phi_0|^2` (iMAML:
    Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", equation 3), so it is clipped with
    the rest. Weight decay is part of the rule, as in torch.optim, and comes after clipping.

    Attributes:
        weight_decay: at least 0.
        clip_norm: the largest norm of one task's gradient over all its fast weights; longer ones are
            scaled down to it, and the scaling is differentiated. None for no limit.
        proximal: the pull back to phi_0, at least 0.
    """

    weight_decay: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0

    def anchors(self, fast: Tensors) -> dict[str, Tensor]:
        """What a rule's state holds for the proximal term: phi_0 itself, or nothing where there is none."""
        return {ANCHOR + name: value for name, value in fast.items()} if self.proximal != 0.0 else {}

    def kept_anchors(self, state: Tensors) -> dict[str, Tensor]:
        """The same anchors for the next step: the very tensors, so that snapshots of a state share them."""
        return {name: value for name, value in state.items() if name.startswith(ANCHOR)}

    def followed(self, fast: Tensors, state: Tensors, grads: Tensors) -> dict[str, Tensor]:
        """d, name -> `[T, ...]`, from phi, a state with the anchors, and g."""
        followed = dict(grads)
        if self.proximal != 0.0:
            followed = {
                name: grad + self.proximal * (fast[name] - state[ANCHOR + name])
                for name, grad in followed.items()
            }
        if self.clip_norm is not None:
            followed = clip_per_task(followed, self.clip_norm)
        if self.weight_decay != 0.0:
            followed = {name: grad + self.weight_decay * fast[name] for name, grad in followed.items()}
        return followed


def clip_per_task(grads: Tensors, clip_norm: float) -> dict[str, Tensor]:
    """Each task's gradient, scaled so that its norm over all tensors `[T, ...]` is at most `clip_norm`."""
    squared_norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)  # [T]
    # Clamped before the root, whose derivative at an exactly zero gradient is infinite.
    scale = clip_norm * squared_norms.clamp(min=clip_norm**2).rsqrt()
    return {name: grad * scale.view(-1, *(1,) * (grad.ndim - 1)) for name, grad in grads.items()}
