"""In which floating-point format the engine computes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import torch
from torch import Tensor

ComputeFormat = Literal["float32", "bfloat16", "float16", "float64"]
HALF: dict[ComputeFormat, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Precision:
    """`float32` and `float64` compute and store in that format. `bfloat16` and `float16` store
    meta-parameters, fast weights and optimizer states in float32 and run the forward
    passes (and with them the derivatives) under autocast; `float16` needs `Scales`.
    """

    compute: ComputeFormat = "float32"

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute == "float64" else torch.float32

    def on_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Inputs, targets or weights as models take them: pixels, which are uint8 `[..., H, W, C]`, as
        numbers from 0 to 1, `[..., C, H, W]`; numbers in the storage format; tokens and classes as they
        are."""
        tensor = tensor.to(device)
        if tensor.dtype == torch.uint8:
            # By a tensor: a GPU would multiply by a plain number's reciprocal, and the last digit be another.
            tensor = tensor.movedim(-1, -3).contiguous().float().div_(torch.full((), 255.0, device=device))
        return tensor.to(self.storage_dtype) if tensor.is_floating_point() else tensor

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context that a forward pass runs in.

        The weight-cast cache is off: a cast cached in one inner step would be found again in
        the next graph, where it is a stale constant.
        """
        if self.compute not in HALF:
            return contextlib.nullcontext()
        return torch.autocast(device.type, HALF[self.compute], cache_enabled=False)


@dataclasses.dataclass(frozen=True)
class Scales:
    """What numbers of half precision are multiplied by, so that they neither vanish nor overflow; powers of
    two.

    Attributes:
        loss: S: the inner gradient is that of S * L, divided by S in float32.
        tangent: the meta-loss is multiplied by it, and with it every adjoint and every tangent; the
            hypergradient is divided by it in float32.
    """

    loss: float = 1.0
    tangent: float = 1.0


class LossScaler:
    """Chooses the scales of an outer step: the same for all of its tasks, smaller after one that overflowed.

    Both start high, are halved when a step's hypergradient is not finite, and doubled after
    `GROWTH_INTERVAL` steps that were (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).
    Outside float16 they are 1 and stay so. Ranks agree, since they all hold the same hypergradient.
    """

    GROWTH_INTERVAL = 200
    SMALLEST, LARGEST = 1.0, 2.0**24

    def __init__(self, precision: Precision) -> None:
        self._is_active = precision.compute == "float16"
        self.scales = Scales(2.0**12, 2.0**10) if self._is_active else Scales()
        self._num_good = 0

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow can still be answered by smaller scales."""
        return self._is_active and max(self.scales.loss, self.scales.tangent) > self.SMALLEST

    def update(self, *, is_finite: bool) -> None:
        """Takes in how an outer step ended."""
        if not self._is_active:
            return
        self._num_good = self._num_good + 1 if is_finite else 0
        if not is_finite:
            self._multiply(0.5)
        elif self._num_good == self.GROWTH_INTERVAL:
            self._multiply(2.0)
            self._num_good = 0

    def metrics(self) -> dict[str, float]:
        """What to log of this step's scales; nothing where they never change."""
        if not self._is_active:
            return {}
        return {"loss_scale": self.scales.loss, "tangent_scale": self.scales.tangent}

    def scalars(self) -> dict[str, float]:
        """What the next step's scales depend on; empty where they never change."""
        if not self._is_active:
            return {}
        return self.metrics() | {"num_good_steps": self._num_good}

    def load(self, scalars: dict[str, float]) -> None:
        """Takes over what `scalars` returned, or nothing where that was in another format."""
        if self._is_active and scalars:
            self.scales = Scales(scalars["loss_scale"], scalars["tangent_scale"])
            self._num_good = int(scalars["num_good_steps"])

    def _multiply(self, factor: float) -> None:
        def bounded(scale: float) -> float:
            return min(self.LARGEST, max(self.SMALLEST, factor * scale))

        self.scales = Scales(bounded(self.scales.loss), bounded(self.scales.tangent))
