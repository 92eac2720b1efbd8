"""A head that starts at zero in every task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.adapters.base import INIT, Adapter, Learned
from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass


class ZeroHeadAdapter(Adapter):
    """Another adapter, whose fast weights of the head start at zero, which is no meta-parameter then.

    No output is preferred before adaptation, whatever classes a task's labels stand for, and whatever number
    of them it has (Kao et al. 2022, "MAML is a Noisy Contrastive Learner in Classification", section 4: the
    zeroing trick). The first inner step then moves the head alone: the gradient of all behind a zero head is
    zero.

    Args:
        adapter: has the head among its fast weights.
        output: which of the model's the head gives; None for the one that there is.

    Raises:
        CapabilityError: the head is not fast.
    """

    def __init__(self, adapter: Adapter, output: str | None) -> None:
        self._adapter = adapter
        self._names = adapter.head_weights(output)

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        meta = self._adapter.meta_parameters(init=init, backbone=backbone)
        return {name: value for name, value in meta.items() if name.removeprefix(INIT) not in self._names}

    def tracked(self) -> dict[str, Tensor]:
        return self._adapter.tracked()

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        fast = self._adapter.init(meta, num_tasks)
        return {
            name: torch.zeros_like(value) if name in self._names else value for name, value in fast.items()
        }

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        return self._adapter.forward(meta, fast, inputs, forward_pass)

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        return self._adapter.head_weights(output)
