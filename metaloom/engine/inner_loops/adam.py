"""Adam and AdamW as inner rules."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Penalties, Tensors
from metaloom.engine.inner_loops.gradient_terms import GradientTerms

FIRST = "first_moment/"
SECOND = "second_moment/"
COUNT = "step_count"


@dataclasses.dataclass(frozen=True)
class Adam(InnerRule):
    """`phi' = phi - rate * m_hat / (sqrt(v_hat + eps_root) + eps)`, with d the gradient with its `terms`
    and, in step t = 1, 2 ...,

        m' = b1 * m + (1 - b1) * d,     m_hat = m' / (1 - b1^t)
        v' = b2 * v + (1 - b2) * d^2,   v_hat = v' / (1 - b2^t)

    Kingma and Ba 2015, "Adam", algorithm 1; torch.optim.Adam where `eps_root` is 0. With
    `decoupled_weight_decay` it is AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay
    Regularization", algorithm 2; torch.optim.AdamW): phi is first multiplied by
    `1 - rate * decoupled_weight_decay`.

    Why there is an epsilon under the root: at a gradient that is exactly zero, such as that of LoRA's A
    while B is 0, the root's derivative is infinite, and every exact hypergradient NaN. With `eps_root`
    the step's derivative by g is there `rate / (sqrt(eps_root) + eps)`, 1e4 times the rate at 1e-8.

    The state's step count t (a float64 scalar, so that every entry of the state has an adjoint) is no
    variable: nothing is differentiated by it.

    Attributes:
        terms: what is added to the gradient, and its limit.
        betas: (b1, b2), each at least 0 and below 1.
        eps: at least 0.
        eps_root: at least 0; 0 only where no gradient is ever exactly zero.
        decoupled_weight_decay: a decay of phi itself and not through the gradient, at least 0.
    """

    terms: GradientTerms = dataclasses.field(default_factory=GradientTerms)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-8
    decoupled_weight_decay: float = 0.0

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.terms.proximal, self.terms.weight_decay, self.decoupled_weight_decay)

    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        device = next(iter(fast.values())).device
        moments = {
            what + name: torch.zeros_like(value) for what in (FIRST, SECOND) for name, value in fast.items()
        }
        count = torch.zeros((), dtype=torch.float64, device=device)
        return self.terms.anchors(fast) | moments | {COUNT: count}

    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gradients = self.terms.followed(fast, state, grads)
        count = state[COUNT].detach() + 1.0
        (beta_1, beta_2), decay = self.betas, self.decoupled_weight_decay
        correction_1, correction_2 = 1.0 - beta_1**count, 1.0 - beta_2**count
        new_fast, new_state = {}, self.terms.kept_anchors(state) | {COUNT: count}
        for name, value in fast.items():
            first = beta_1 * state[FIRST + name] + (1.0 - beta_1) * gradients[name]
            second = beta_2 * state[SECOND + name] + (1.0 - beta_2) * gradients[name].square()
            root = (second / correction_2 + self.eps_root).sqrt() + self.eps
            rate = rates[name]
            kept = value * (1.0 - rate * decay) if decay != 0.0 else value
            new_fast[name] = kept - rate * (first / correction_1) / root
            new_state |= {FIRST + name: first, SECOND + name: second}
        return new_fast, new_state

    @property
    def is_affine_in_gradient(self) -> bool:
        return False
