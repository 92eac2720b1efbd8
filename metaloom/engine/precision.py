"""In which floating-point format the engine computes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import torch

ComputeFormat = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """`float32` and `float64` compute and store in that format. `bfloat16` stores
    meta-parameters, fast weights and optimizer states in float32 and runs the forward
    passes (and with them the derivatives) under autocast.
    """

    compute: ComputeFormat = "float32"

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute == "float64" else torch.float32

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context that a forward pass runs in.

        The weight-cast cache is off: a cast cached in one inner step would be found again in
        the next graph, where it is a stale constant.
        """
        if self.compute != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
