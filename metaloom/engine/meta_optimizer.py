"""Where the meta-parameters and the states of their optimizer are kept, and how they are moved."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

States = dict[str, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """How each meta-parameter follows its gradient.

    Attributes:
        optimizer: `adam` is AdamW (decoupled weight decay); `sgd` has momentum `betas[0]`.
        lr: the full learning rate of each meta-parameter, by name.
        weight_decay: likewise.
    """

    optimizer: Literal["adam", "sgd"]
    betas: tuple[float, float]
    eps: float
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]

    def group(self, name: str, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """A group of torch's for parameters that all follow the rates of one meta-parameter."""
        lr, decay = self.lr[name], self.weight_decay[name]
        return {"params": list(parameters), "lr": lr, "full_lr": lr, "weight_decay": decay}

    def build(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Torch's optimizer over `groups`.

        Args:
            fused: whether a group's whole update is one pass over its memory; it rounds otherwise.
        """
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.betas[0], foreach=False, fused=fused)
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, foreach=False, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times its full one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["full_lr"]


class MetaOptimizer(abc.ABC):
    """Holds the meta-parameters and the states of their optimizer.

    Attributes:
        meta: what this rank holds of the meta-parameters, by name: the same tensors throughout.
    """

    meta: dict[str, Tensor]

    @abc.abstractmethod
    def apply(self, gradient: Mapping[str, Tensor], *, scale: float, lr_factor: float) -> None:
        """Moves the meta-parameters along `scale` times a gradient. Every rank must call.

        Args:
            gradient: what the sharding's `sum_gradients` returned, or a multiple of it.
            lr_factor: what the full learning rates are multiplied by.
        """

    @abc.abstractmethod
    def discard(self) -> None:
        """Leaves everything as it is, though a gradient was summed. Every rank must call."""

    @abc.abstractmethod
    def states(self) -> States:
        """The optimizer's tensors, by name of the meta-parameter and of the state; whole, or laid out as the
        meta-parameter is. Every rank must call."""

    @abc.abstractmethod
    def load(self, meta: Mapping[str, Tensor], states: States) -> None:
        """Takes over copies of meta-parameters and of what `states` returned. Every rank must call."""


class TorchMetaOptimizer(MetaOptimizer):
    """Torch's optimizer on what this rank holds: no communication.

    Args:
        meta: is copied.
    """

    def __init__(self, meta: Mapping[str, Tensor], rule: UpdateRule) -> None:
        self.meta = {name: value.detach().clone() for name, value in meta.items()}
        # One group per parameter keeps the optimizer's order that of `meta`, whatever the kinds.
        groups = [rule.group(name, [value]) for name, value in self.meta.items()]
        self._optimizer = rule.build(groups, fused=False)

    def apply(self, gradient: Mapping[str, Tensor], *, scale: float, lr_factor: float) -> None:
        set_rates(self._optimizer, lr_factor)
        for name, value in self.meta.items():
            value.grad = gradient[name] if scale == 1.0 else gradient[name] * scale
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        pass

    def states(self) -> States:
        return {
            name: {
                key: entry for key, entry in self._optimizer.state.get(value, {}).items() if entry is not None
            }
            for name, value in self.meta.items()
        }

    def load(self, meta: Mapping[str, Tensor], states: States) -> None:
        with torch.no_grad():
            for name, value in self.meta.items():
                value.copy_(meta[name])
                self._optimizer.state[value] = {
                    # torch keeps Adam's step count on the CPU, whatever the parameter's device.
                    key: entry.clone() if key == "step" else entry.to(value.device, copy=True)
                    for key, entry in states[name].items()
                }
