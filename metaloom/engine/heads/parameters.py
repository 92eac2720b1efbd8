"""The few numbers of a linear head that are no task's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

HEAD = "head."
HeadParameter = Literal["regulariser", "scale", "bias"]


@dataclasses.dataclass(frozen=True)
class HeadTensors:
    """What a head is fitted with, and what its outputs become: `scale * X W + bias`."""

    regulariser: Tensor | float
    scale: Tensor | float
    bias: Tensor | float


@dataclasses.dataclass(frozen=True)
class HeadParameters:
    """The regulariser lambda of a linear head, and the scale alpha and bias beta of its outputs (Bertinetto
    et al. 2019, equation 6; the scale is gamma of Lee et al. 2019).

    Learned ones are kept where they are free: `head.regulariser` and `head.scale` hold logarithms,
    `head.bias` the number itself. The same bias on all logits changes no probability: it is of use in a
    regression alone.

    Attributes:
        regulariser: above 0; where a learned one starts.
        scale: above 0, likewise.
        bias: likewise.
        learned: which of them are meta-parameters.
    """

    regulariser: float
    scale: float = 1.0
    bias: float = 0.0
    learned: tuple[HeadParameter, ...] = ()

    def meta_parameters(self, like: Tensor) -> dict[str, Tensor]:
        """Initial values by name, in the dtype and on the device of `like`."""
        start = {
            "regulariser": math.log(self.regulariser),
            "scale": math.log(self.scale),
            "bias": self.bias,
        }
        return {f"{HEAD}{name}": like.new_full((), start[name]) for name in self.learned}

    def at(self, meta: Mapping[str, Tensor]) -> HeadTensors:
        """The three at these meta-parameters; what `meta` lacks is where it starts."""
        log_regulariser, log_scale = meta.get(f"{HEAD}regulariser"), meta.get(f"{HEAD}scale")
        return HeadTensors(
            self.regulariser if log_regulariser is None else log_regulariser.exp(),
            self.scale if log_scale is None else log_scale.exp(),
            meta.get(f"{HEAD}bias", self.bias),
        )
