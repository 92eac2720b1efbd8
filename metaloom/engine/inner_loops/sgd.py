"""Gradient descent as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Tensors


@dataclasses.dataclass(frozen=True)
class Sgd(InnerRule):
    """`m' = momentum * m + clip(g) + weight_decay * phi;  phi' = phi - rate * m'`
    (torch.optim.SGD without dampening; plain MAML's inner step where momentum is 0: Finn et al.
    2017, "Model-Agnostic Meta-Learning", equation 1).

    Attributes:
        momentum: at least 0, below 1.
        weight_decay: at least 0.
        clip_norm: the largest norm of one task's gradient over all its fast weights; longer ones are
            scaled down to it, and the scaling is differentiated. None for no limit.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    @property
    def is_affine_in_gradient(self) -> bool:
        return self.clip_norm is None

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        if self.momentum == 0.0:
            return {}
        return {name: torch.zeros_like(value) for name, value in fast.items()}

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        direction = dict(grads) if self.clip_norm is None else clip_per_task(grads, self.clip_norm)
        if self.weight_decay != 0.0:
            direction = {name: grad + self.weight_decay * fast[name] for name, grad in direction.items()}
        new_state = {name: self.momentum * value + direction[name] for name, value in state.items()}
        direction |= new_state
        return {name: value - rates[name] * direction[name] for name, value in fast.items()}, new_state


def clip_per_task(grads: Tensors, clip_norm: float) -> dict[str, Tensor]:
    """Each task's gradient, scaled so that its norm over all tensors `[T, ...]` is at most `clip_norm`."""
    squared_norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)  # [T]
    # Clamped before the root, whose derivative at an exactly zero gradient is infinite.
    scale = clip_norm * squared_norms.clamp(min=clip_norm**2).rsqrt()
    return {name: grad * scale.view(-1, *(1,) * (grad.ndim - 1)) for name, grad in grads.items()}
