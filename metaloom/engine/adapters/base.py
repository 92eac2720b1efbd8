"""What an adapter is: the choice of what the inner loop adapts."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from torch import Tensor

INIT = "init."
BACKBONE = "backbone."


class Adapter(abc.ABC):
    """A model together with what is fast in it, for T tasks at a time.

    Meta-parameters are named `init.<fast weight>` (where adaptation starts) and
    `backbone.<parameter>` (weights that all tasks share, when they are meta-learned).
    """

    @abc.abstractmethod
    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of the meta-parameters' initial values, by name."""

    @abc.abstractmethod
    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        """phi_0: fast weights `[T, ...]` by name, differentiable in `meta`."""

    @abc.abstractmethod
    def forward(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Logits `[T, N, ..., C]` of T tasks, each at its own fast weights.

        Args:
            meta: meta-parameters by name.
            fast: fast weights by name, each `[T, ...]`.
            inputs: `[T, N, ...]`.
        """


def broadcast_init(meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
    """One copy of every `init.` meta-parameter per task (a view; its gradient sums over tasks)."""
    return {
        name.removeprefix(INIT): value.expand(num_tasks, *value.shape)
        for name, value in meta.items()
        if name.startswith(INIT)
    }
