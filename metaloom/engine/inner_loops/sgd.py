"""Gradient descent as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Penalties, Tensors
from metaloom.engine.inner_loops.gradient_terms import anchors, followed_gradient, kept_anchors
from metaloom.errors import CapabilityError

MOMENTUM = "momentum/"


@dataclasses.dataclass(frozen=True)
class Sgd(InnerRule):
    """`m' = momentum * m + d;  phi' = phi - rate * m'`, or with Nesterov's momentum
    `phi' = phi - rate * (d + momentum * m')`, where
    `d = clip(g + proximal * (phi - phi_0)) + weight_decay * phi`.

    torch.optim.SGD without dampening; plain MAML's inner step where momentum is 0 (Finn et al. 2017,
    "Model-Agnostic Meta-Learning", equation 1).

    Attributes:
        momentum: at least 0, below 1.
        nesterov: whether the step looks ahead along the momentum; needs one.
        weight_decay: at least 0.
        clip_norm: the largest norm of one task's gradient over all its fast weights; longer ones are
            scaled down to it, and the scaling is differentiated. None for no limit.
        proximal: the pull back to phi_0, at least 0.

    Raises:
        CapabilityError: Nesterov's momentum without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0.0:
            raise CapabilityError(
                "adaptation.rule.nesterov: true; has no effect, since momentum is 0; "
                "set momentum, or nesterov to false."
            )

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.proximal, self.weight_decay)

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        state = anchors(fast, proximal=self.proximal)
        if self.momentum != 0.0:
            state |= {MOMENTUM + name: torch.zeros_like(value) for name, value in fast.items()}
        return state

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        step = followed_gradient(
            fast,
            state,
            grads,
            proximal=self.proximal,
            clip_norm=self.clip_norm,
            weight_decay=self.weight_decay,
        )
        new_state = kept_anchors(state)
        if self.momentum != 0.0:
            for name, gradient in step.items():
                momentum = self.momentum * state[MOMENTUM + name] + gradient
                new_state[MOMENTUM + name] = momentum
                step[name] = gradient + self.momentum * momentum if self.nesterov else momentum
        return {name: value - rates[name] * step[name] for name, value in fast.items()}, new_state

    @property
    def is_affine_in_gradient(self) -> bool:
        return self.clip_norm is None
