"""A model without fast weights: what it makes of examples before its head.

Shape letters: T tasks, N examples, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Structure, nothing_attached, run_model
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The part of a model before its head, shared by all tasks; each task's examples go through it together.

    Attributes:
        model: any module with a head: see `Structure.head`.
        structure: where it can be taken apart.
        head: which of its outputs is left out; None where it has one.
        precision: number format.
        recompute_blocks: keep the inputs of blocks alone, and compute each again when it is differentiated.

    Raises:
        CapabilityError: the model has no head that can be told from the rest.
    """

    model: nn.Module
    structure: Structure
    head: str | None
    precision: Precision
    recompute_blocks: bool = False

    def __post_init__(self) -> None:
        if self.structure.head_of(self.head) is None:
            raise CapabilityError(
                "features are what a model's head is given, and this model has no head that can be told from "
                "the rest: name it in Structure.head."
            )

    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of the weights before the head, `backbone.<name>`."""
        heads = self.structure.head
        names = [heads] if isinstance(heads, str) else list((heads or {}).values())
        weights = dict(self.model.named_parameters())
        tied = {id(value) for name, value in weights.items() if not _is_of(name, names)}
        return {
            BACKBONE + name: value.detach().clone()
            for name, value in weights.items()
            if not _is_of(name, names) or id(value) in tied
        }

    def features(self, meta: Mapping[str, Tensor], inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """What the head is given, `[T, N, ..., D]`, of examples `[T, N, ...]`. Batch statistics are those of
        a task's examples.

        Args:
            meta: `backbone.<name>`; what it lacks stays at the model's own values.
            weights: `[T, N]`, 0 for padding; None where there is none.
        """
        substituted = {
            name.removeprefix(BACKBONE): value for name, value in meta.items() if name.startswith(BACKBONE)
        }
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            recompute_blocks=self.recompute_blocks,
            holds_back_head=True,
            head=self.head,
            weights=weights,
        )
        outputs = [
            run_model(
                self.model,
                self.structure,
                substituted,
                inputs[task],
                forward_pass.of_task(task),
                attachments={},
                attach=nothing_attached,
            )[0]
            for task in range(inputs.shape[0])
        ]
        return torch.stack(outputs)


def _is_of(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
