"""Whole-model adaptation: every weight is fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaloom.engine.adapters.base import INIT, Adapter, broadcast_init
from metaloom.errors import CapabilityError


class FullAdapter(Adapter):
    """All parameters of a model are fast weights; tasks run one after the other.

    For small networks: each task holds a full copy of the weights. A loop, because on a CPU
    per-task convolutions (grouped, under vmap) are slower and take several times the memory.

    Args:
        model: any module; batch statistics are then per task, as each task is one call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._initial = {name: value.detach() for name, value in model.named_parameters()}

    def meta_parameters(self, *, init: bool, backbone: bool) -> dict[str, Tensor]:
        if backbone:
            raise CapabilityError("every weight is fast, so there is no backbone for tasks to share.")
        return {INIT + name: value.clone() for name, value in self._initial.items()} if init else {}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial, meta, num_tasks)

    def forward(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        per_task = [
            functional_call(
                self._model, {name: value[task] for name, value in fast.items()}, (inputs[task],), strict=True
            )
            for task in range(inputs.shape[0])
        ]
        return torch.stack(per_task)
