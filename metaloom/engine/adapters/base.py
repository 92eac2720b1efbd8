"""What an adapter is: the choice of what the inner loop adapts."""

from __future__ import annotations

import abc
import fnmatch
from collections.abc import Mapping

from torch import Tensor

from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.names import in_short
from metaloom.errors import CapabilityError

INIT = "init."
BACKBONE = "backbone."

# All of some parameters or none, or those whose names match a pattern of `fnmatch`.
Learned = bool | tuple[str, ...]


class Adapter(abc.ABC):
    """A model together with what is fast in it, for T tasks at a time.

    Meta-parameters are named `init.<fast weight>` (where adaptation starts) and
    `backbone.<parameter>` (weights that all tasks share); which of them are learned is up to
    the caller: what `meta` lacks stays at the adapter's own value.
    """

    @abc.abstractmethod
    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        """Fresh copies of the initial values of what shall be learned, by name.

        Raises:
            CapabilityError: no parameter that tasks share matches a pattern of `backbone`.
        """

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


def learned_backbone(shared: Mapping[str, Tensor], learned: Learned) -> dict[str, Tensor]:
    """Fresh copies, `backbone.<name>`, of those parameters that shall be learned.

    Args:
        shared: what tasks share, by name.

    Raises:
        CapabilityError: a pattern matches none; names those that there are.
    """
    if isinstance(learned, bool):
        return {BACKBONE + name: value.clone() for name, value in shared.items() if learned}
    for pattern in learned:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in shared):
            raise CapabilityError(
                f"algorithm.meta_parameters.backbone: {pattern!r} matches no parameter that tasks share; "
                f"there are {in_short(shared) or 'none'}."
            )
    return {
        BACKBONE + name: value.clone()
        for name, value in shared.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in learned)
    }


def broadcast_init(
    initial: Mapping[str, Tensor], meta: Mapping[str, Tensor], num_tasks: int
) -> dict[str, Tensor]:
    """One copy of every initial value per task, from `meta` where it is learned.

    The copies are views, so a gradient with respect to `meta` sums over tasks.
    """
    learned = {name: meta.get(INIT + name, value) for name, value in initial.items()}
    return {name: value.expand(num_tasks, *value.shape) for name, value in learned.items()}
