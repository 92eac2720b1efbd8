"""A head that starts at zero in every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaloom.engine.adapters.base import INIT, Adapter
from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError


class ZeroHeadAdapter(Adapter):
    """Another adapter, whose fast weights of the head start at zero, which is no meta-parameter then.

    No output is preferred before adaptation, whatever classes a task's labels stand for, and whatever number
    of them it has (Kao et al. 2022, "MAML is a Noisy Contrastive Learner in Classification", section 4: the
    zeroing trick). The first inner step then moves the head alone: the gradient of all behind a zero head is
    zero.

    Args:
        adapter: has the head among its fast weights.
        names: of the head's fast weights.

    Raises:
        CapabilityError: the head is not fast.
    """

    def __init__(self, adapter: Adapter, names: Sequence[str]) -> None:
        require_fast_head(adapter, names)
        self._adapter = adapter
        self._names = frozenset(names)

    def meta_parameters(self, *, init: bool, backbone: bool) -> dict[str, Tensor]:
        meta = self._adapter.meta_parameters(init=init, backbone=backbone)
        return {name: value for name, value in meta.items() if name.removeprefix(INIT) not in self._names}

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


def require_fast_head(adapter: Adapter, names: Sequence[str]) -> None:
    """Passes where all weights of the head are fast.

    Raises:
        CapabilityError: they are not.
    """
    fast = adapter.init({}, 1)
    missing = [name for name in names if name not in fast]
    if missing:
        raise CapabilityError(
            f"adaptation.head is about the output head's weights, and {', '.join(missing)} is not fast: "
            "choose it in adaptation.fast, or leave adaptation.head out."
        )
