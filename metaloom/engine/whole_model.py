"""A model without fast weights, its head included: what it says of the examples of T tasks.

Shape letters: T tasks, N examples, C outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Structure, nothing_attached, run_model
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A model whose weights all tasks share; each task's examples go through it together.

    Attributes:
        model: any module.
        structure: where it can be taken apart.
        head: which of its outputs is read; None where it has one.
        precision: number format.
        recompute_blocks: keep the inputs of blocks alone, and compute each again when it is differentiated.
        prefix: what the names of its meta-parameters begin with.
    """

    model: nn.Module
    structure: Structure
    head: str | None
    precision: Precision
    recompute_blocks: bool = False
    prefix: str = BACKBONE

    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of all weights, `<prefix><name>`; of an output that is not read none."""
        unread = self._heads_that_are_not_read()
        return {
            self.prefix + name: value.detach().clone()
            for name, value in self.model.named_parameters()
            if not name.startswith(unread)
        }

    def outputs(
        self,
        meta: Mapping[str, Tensor],
        inputs: Tensor,
        weights: Tensor | None = None,
        heads: Sequence[str] | None = None,
    ) -> Tensor:
        """What the model says, `[T, N, ..., C]`, of examples `[T, N, ...]`. Batch statistics are those of
        a task's examples.

        Args:
            meta: `<prefix><name>`; what it lacks stays at the model's own values.
            weights: `[T, N]`, 0 for examples that have no part in batch statistics; None where all have.
            heads: which of the model's outputs is read of each task, T of them; None for `head` of all.
        """
        names = [name for name, _ in self.model.named_parameters()]
        substituted = {name: meta[self.prefix + name] for name in names if self.prefix + name in meta}
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            recompute_blocks=self.recompute_blocks,
            head=self.head,
            weights=weights,
        )
        passes = [forward_pass.of_task(task) for task in range(inputs.shape[0])]
        if heads is not None:
            passes = [dataclasses.replace(own, head=head) for own, head in zip(passes, heads, strict=True)]
        outputs = [
            run_model(
                self.model,
                self.structure,
                substituted,
                inputs[task],
                own,
                attachments={},
                attach=nothing_attached,
            )[0]
            for task, own in enumerate(passes)
        ]
        return torch.stack(outputs)

    def _heads_that_are_not_read(self) -> tuple[str, ...]:
        heads = self.structure.head
        if heads is None or isinstance(heads, str):
            return ()
        return tuple(f"{module}." for output, module in heads.items() if output != self.head)
