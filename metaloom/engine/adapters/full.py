"""Whole-model adaptation: every weight is fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call, vmap

from metaloom.engine.adapters.base import INIT, Adapter, broadcast_init
from metaloom.engine.adapters.model import Readout, Structure, nothing_attached, run_model, stacked
from metaloom.engine.adapters.selection import fast_head
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.errors import CapabilityError


class FullAdapter(Adapter):
    """All parameters of a model are fast weights: each task holds a full copy of them.

    Args:
        model: any module; batch statistics are then per task.
        structure: where it can be taken apart.
        tasks: `loop`, one task after the other: the way for large tasks, and the one that recomputes blocks
            and applies the head in chunks; `vmap`, all tasks in one vectorised pass: the way for many small
            ones, on a GPU above all (on a CPU per-task convolutions, grouped under vmap, are slower and take
            several times the memory).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        structure: Structure | None = None,
        tasks: Literal["loop", "vmap"] = "loop",
    ) -> None:
        self._model = model
        self._structure = structure or Structure()
        self._tasks = tasks
        self._initial = {name: value.detach() for name, value in model.named_parameters()}

    def meta_parameters(self, *, init: bool, backbone: bool) -> dict[str, Tensor]:
        if backbone:
            raise CapabilityError("every weight is fast, so there is no backbone for tasks to share.")
        return {INIT + name: value.clone() for name, value in self._initial.items()} if init else {}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        if self._tasks == "vmap":
            return Readout(self._vectorized(fast, inputs, forward_pass))
        # Unbound once: each task's slice taken by index would have a gradient of the size of all tasks.
        weights = {name: value.unbind() for name, value in fast.items()}
        return stacked(
            [
                run_model(
                    self._model,
                    self._structure,
                    {name: value[task] for name, value in weights.items()},
                    inputs[task],
                    forward_pass.of_task(task),
                    attachments={},
                    attach=nothing_attached,
                )
                for task in range(inputs.shape[0])
            ]
        )

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        return fast_head(self._model, self._structure, output, self._initial)

    def _vectorized(self, fast: Mapping[str, Tensor], inputs: Tensor, forward_pass: ForwardPass) -> Tensor:
        if forward_pass.recompute_blocks or forward_pass.holds_back_head:
            raise CapabilityError(
                "inside vmap nothing can be recomputed: set adaptation.fast.tasks to loop, or "
                "memory.recompute_blocks to false and memory.head_chunk to null."
            )

        self._structure.head_of(forward_pass.head)  # refuses one that there is not
        buffers = dict(self._model.named_buffers())
        interception = Interception(forward_pass, is_vectorized=True)

        def one_task(weights: dict[str, Tensor], examples: Tensor, example_weights: Tensor | None) -> Tensor:
            interception.weights = None if example_weights is None else example_weights[None]
            arguments = forward_pass.arguments(examples)
            logits: Tensor = functional_call(self._model, weights | buffers, arguments, strict=True)
            return logits

        in_dims = (0, 0, None if forward_pass.weights is None else 0)
        with interception, forward_pass.precision.autocast(forward_pass.device):
            return vmap(one_task, in_dims)(dict(fast), inputs, forward_pass.weights)
