"""Whole-model adaptation: every weight is fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaloom.engine.adapters.base import INIT, Adapter, broadcast_init


class FullAdapter(Adapter):
    """All parameters of a model are fast weights; tasks run one after the other.

    For small networks: each task holds a full copy of the weights. A loop, because on a CPU
    per-task convolutions (grouped, under vmap) are slower and take several times the memory.

    Args:
        model: any module; batch statistics are then per task, as each task is one call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def meta_parameters(self) -> dict[str, Tensor]:
        return {INIT + name: value.detach().clone() for name, value in self._model.named_parameters()}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(meta, num_tasks)

    def forward(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        per_task = [
            functional_call(
                self._model, {name: value[task] for name, value in fast.items()}, (inputs[task],), strict=True
            )
            for task in range(inputs.shape[0])
        ]
        return torch.stack(per_task)
