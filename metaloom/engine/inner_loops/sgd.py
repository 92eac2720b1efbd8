"""Gradient descent as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Tensors


@dataclasses.dataclass(frozen=True)
class Sgd(InnerRule):
    """`m' = momentum * m + g + weight_decay * phi;  phi' = phi - rate * m'`
    (torch.optim.SGD without dampening; plain MAML's inner step where momentum is 0: Finn et al.
    2017, "Model-Agnostic Meta-Learning", equation 1).
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        if self.momentum == 0.0:
            return {}
        return {name: torch.zeros_like(value) for name, value in fast.items()}

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        direction = dict(grads)
        if self.weight_decay != 0.0:
            direction = {name: grad + self.weight_decay * fast[name] for name, grad in direction.items()}
        new_state = {name: self.momentum * value + direction[name] for name, value in state.items()}
        direction |= new_state
        return {name: value - rates[name] * direction[name] for name, value in fast.items()}, new_state
