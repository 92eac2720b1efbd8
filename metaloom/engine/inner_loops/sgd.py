"""Gradient descent as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Penalties, Tensors
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.errors import CapabilityError

MOMENTUM = "momentum/"


@dataclasses.dataclass(frozen=True)
class Sgd(InnerRule):
    """`m' = momentum * m + d;  phi' = phi - rate * m'`, or with Nesterov's momentum
    `phi' = phi - rate * (d + momentum * m')`, d being the gradient with its `terms`.

    torch.optim.SGD without dampening; plain MAML's inner step where momentum is 0 (Finn et al. 2017,
    "Model-Agnostic Meta-Learning", equation 1).

    Attributes:
        terms: what is added to the gradient, and its limit.
        momentum: at least 0, below 1.
        nesterov: whether the step looks ahead along the momentum; needs one.

    Raises:
        CapabilityError: Nesterov's momentum without momentum.
    """

    terms: GradientTerms = dataclasses.field(default_factory=GradientTerms)
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0.0:
            raise CapabilityError(
                "adaptation.rule.nesterov: true; has no effect, since momentum is 0; "
                "set momentum, or nesterov to false."
            )

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.terms.proximal, self.terms.weight_decay)

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        state = self.terms.anchors(fast)
        if self.momentum != 0.0:
            state |= {MOMENTUM + name: torch.zeros_like(value) for name, value in fast.items()}
        return state

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        step = self.terms.followed(fast, state, grads)
        new_state = self.terms.kept_anchors(state)
        if self.momentum != 0.0:
            for name, gradient in step.items():
                momentum = self.momentum * state[MOMENTUM + name] + gradient
                new_state[MOMENTUM + name] = momentum
                step[name] = gradient + self.momentum * momentum if self.nesterov else momentum
        return {name: value - rates[name] * step[name] for name, value in fast.items()}, new_state

    @property
    def is_affine_in_gradient(self) -> bool:
        return self.terms.clip_norm is None
