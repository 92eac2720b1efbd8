"""What an inner rule is: one step of adaptation as a pure, differentiable function."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]


class InnerRule(abc.ABC):
    """`(phi', s') = update(phi, s, g, rates)`, differentiable in all four, for T tasks at a time."""

    @property
    @abc.abstractmethod
    def is_affine_in_gradient(self) -> bool:
        """Whether update is affine in g, at given phi, s and rates: its vjp by g then is the same at any
        g."""

    @abc.abstractmethod
    def init_state(self, fast: Tensors) -> dict[str, Tensor]:
        """s_0 for fast weights `[T, ...]`; empty for a rule without memory."""

    @abc.abstractmethod
    def update(
        self, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step.

        Args:
            fast: phi, name -> `[T, ...]`.
            state: s, as `init_state` or the last step returned it.
            grads: g, the gradient of the inner loss, same names and shapes as `fast`.
            rates: the learning rate of each fast weight, scalars by name.
        """
