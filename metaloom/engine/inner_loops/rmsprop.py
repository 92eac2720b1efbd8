"""RMSProp as an inner rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Penalties, Tensors
from metaloom.engine.inner_loops.gradient_terms import GradientTerms

SQUARE = "square_average/"
MEAN = "average/"
MOMENTUM = "momentum/"


@dataclasses.dataclass(frozen=True)
class RmsProp(InnerRule):
    """`m' = momentum * m + d / (sqrt(v' + eps_root) + eps);  phi' = phi - rate * m'`, with d the gradient
    with its `terms`, and

        v' = alpha * v + (1 - alpha) * d^2

    Hinton 2012, "Neural Networks for Machine Learning", lecture 6e; torch.optim.RMSprop where
    `eps_root` is 0. `centered` divides by the deviation from the running mean u (Graves 2013,
    "Generating Sequences With Recurrent Neural Networks", equations 38 to 41):

        u' = alpha * u + (1 - alpha) * d
        v' = alpha * (v + (1 - alpha) * (d - u)^2)

    which is the running mean of d^2 less u'^2, written so that rounding never makes it negative.
    Why there is an epsilon under the root: see `Adam`.

    Attributes:
        terms: what is added to the gradient, and its limit.
        alpha: decay of the running means, at least 0, below 1.
        eps: at least 0.
        eps_root: at least 0; 0 only where no gradient is ever exactly zero.
        momentum: at least 0, below 1.
        centered: whether the mean is taken off.
    """

    terms: GradientTerms = dataclasses.field(default_factory=GradientTerms)
    alpha: float = 0.99
    eps: float = 1e-8
    eps_root: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.terms.proximal, self.terms.weight_decay)

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        kinds = [SQUARE, *([MEAN] if self.centered else []), *([MOMENTUM] if self.momentum != 0.0 else [])]
        zeros = {kind + name: torch.zeros_like(value) for kind in kinds for name, value in fast.items()}
        return self.terms.anchors(fast) | zeros

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gradients = self.terms.followed(fast, state, grads)
        alpha, new_fast, new_state = self.alpha, {}, self.terms.kept_anchors(state)
        for name, value in fast.items():
            gradient = gradients[name]
            if self.centered:
                mean = state[MEAN + name]
                square = alpha * (state[SQUARE + name] + (1.0 - alpha) * (gradient - mean).square())
                new_state[MEAN + name] = alpha * mean + (1.0 - alpha) * gradient
            else:
                square = alpha * state[SQUARE + name] + (1.0 - alpha) * gradient.square()
            new_state[SQUARE + name] = square
            step = gradient / ((square + self.eps_root).sqrt() + self.eps)
            if self.momentum != 0.0:
                step = self.momentum * state[MOMENTUM + name] + step
                new_state[MOMENTUM + name] = step
            new_fast[name] = value - rates[name] * step
        return new_fast, new_state

    @property
    def is_affine_in_gradient(self) -> bool:
        return False
