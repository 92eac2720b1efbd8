"""Gradient descent as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Penalties, Tensors


@dataclasses.dataclass(frozen=True)
class Sgd(InnerRule):
    """`m' = momentum * m + clip(g + proximal * (phi - phi_0)) + weight_decay * phi;  phi' = phi - rate * m'`
    (torch.optim.SGD without dampening; plain MAML's inner step where momentum is 0: Finn et al.
    2017, "Model-Agnostic Meta-Learning", equation 1).

    Attributes:
        momentum: at least 0, below 1.
        weight_decay: at least 0.
        clip_norm: the largest norm of one task's gradient over all its fast weights; longer ones are
            scaled down to it, and the scaling is differentiated. None for no limit.
        proximal: at least 0; pulls towards phi_0 (Rajeswaran et al. 2019, equation 3).
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.proximal, self.weight_decay)

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        if self.momentum != 0.0:
            state |= {name: torch.zeros_like(value) for name, value in fast.items()}
        if self.proximal != 0.0:
            state |= {"anchor/" + name: value for name, value in fast.items()}
        return state

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        anchor = {name: value for name, value in state.items() if name.startswith("anchor/")}
        direction = dict(grads)
        if self.proximal != 0.0:
            direction = {
                name: grad + self.proximal * (fast[name] - anchor["anchor/" + name])
                for name, grad in grads.items()
            }
        if self.clip_norm is not None:
            direction = clip_per_task(direction, self.clip_norm)
        if self.weight_decay != 0.0:
            direction = {name: grad + self.weight_decay * fast[name] for name, grad in direction.items()}
        if self.momentum != 0.0:
            direction = {name: self.momentum * state[name] + value for name, value in direction.items()}
        after = {name: value - rates[name] * direction[name] for name, value in fast.items()}
        return after, (direction if self.momentum != 0.0 else {}) | anchor


def clip_per_task(grads: Tensors, clip_norm: float) -> dict[str, Tensor]:
    """Each task's gradient, scaled so that its norm over all tensors `[T, ...]` is at most `clip_norm`."""
    squared_norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)  # [T]
    # Clamped before the root, whose derivative at an exactly zero gradient is infinite.
    scale = clip_norm * squared_norms.clamp(min=clip_norm**2).rsqrt()
    return {name: grad * scale.view(-1, *(1,) * (grad.ndim - 1)) for name, grad in grads.items()}
