"""What an adapter is: the choice of what the inner loop adapts."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from torch import Tensor

from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError

INIT = "init."
BACKBONE = "backbone."


class Adapter(abc.ABC):
    """A model together with what is fast in it, for T tasks at a time.

    Meta-parameters are named `init.<fast weight>` (where adaptation starts) and
    `backbone.<parameter>` (weights that all tasks share); which of them are learned is up to
    the caller: what `meta` lacks stays at the adapter's own value.
    """

    @abc.abstractmethod
    def meta_parameters(self, *, init: bool, backbone: bool) -> dict[str, Tensor]:
        """Fresh copies of the initial values of what shall be learned, by name."""

    def tracked(self) -> dict[str, Tensor]:
        """Initial values of what is counted in training beside what is learned, by name; where they are among
        the meta-parameters that `forward` is given, it computes by them."""
        return {}

    @abc.abstractmethod
    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        """phi_0: fast weights `[T, ...]` by name, differentiable in `meta`."""

    @abc.abstractmethod
    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        """The features of T tasks, each at its own fast weights, from which logits `[T, N, ..., V]` are read.

        Args:
            meta: meta-parameters by name.
            fast: fast weights by name, each `[T, ...]`.
            inputs: `[T, N, ...]`.
            forward_pass: how to run it.
        """

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        """The names of the fast weights that are the head's: those of the module that gives an output.

        Args:
            output: which of the model's; None for the one that there is.

        Raises:
            CapabilityError: the head's own weights are not all fast, or not the head's alone.
        """
        raise CapabilityError(
            "adaptation.head is about the head's own weights, which are not fast here: leave it out, or set "
            "adaptation.fast to head, part or full."
        )


def broadcast_init(
    initial: Mapping[str, Tensor], meta: Mapping[str, Tensor], num_tasks: int
) -> dict[str, Tensor]:
    """One copy of every initial value per task, from `meta` where it is learned.

    The copies are views, so a gradient with respect to `meta` sums over tasks.
    """
    learned = {name: meta.get(INIT + name, value) for name, value in initial.items()}
    return {name: value.expand(num_tasks, *value.shape) for name, value in learned.items()}
