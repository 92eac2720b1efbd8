"""What an inner rule is: one step of adaptation as a pure, differentiable function."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Penalties:
    """What a rule adds to the inner loss L, so that where it comes to rest is a minimum of
    `F(phi) = L(phi) + proximal / 2 |phi - phi_0|^2 + weight_decay / 2 |phi|^2`.

    Attributes:
        proximal: at least 0.
        weight_decay: at least 0.
        decoupled_decay: at least 0; a decay beside the gradient (AdamW's) is no term of F.
    """

    proximal: float = 0.0
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0


class InnerRule(abc.ABC):
    """`(phi', s') = update(phi, s, g, rates)`, differentiable in all four, for T tasks at a time."""

    @property
    @abc.abstractmethod
    def penalties(self) -> Penalties:
        """The terms that the rule adds to the inner loss."""

    @abc.abstractmethod
    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        """s_0 for fast weights phi_0 `[T, ...]`, differentiable in them; empty for a rule without memory.

        Names are `<what>/<fast weight>`, shapes those of the fast weight. A rule with a proximal term
        holds phi_0 itself, so s_0 then depends on phi_0.
        """

    @abc.abstractmethod
    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step.

        Args:
            fast: phi, name -> `[T, ...]`.
            state: s, as `init_state` or the last step returned it.
            grads: g, the gradient of the inner loss, same names and shapes as `fast`.
            rates: the learning rate of each fast weight, by name: a scalar, or the shape of one task's
                weight.
        """

    @property
    @abc.abstractmethod
    def is_affine_in_gradient(self) -> bool:
        """Whether `update` at fixed rates is affine in phi, s and g together: its vjp by these is then the
        same at every g, and so can be taken without knowing g."""
