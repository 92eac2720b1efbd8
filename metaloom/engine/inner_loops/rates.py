"""Learning rates of the inner loop: fixed, or meta-parameters themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

RATES = "rates."
Grain = Literal["none", "shared", "per_tensor", "per_tensor_per_step"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rate of each fast weight at each inner step.

    Learned rates are kept as logarithms (`rates.<name>`): a rate stays positive, and the outer
    optimizer's step is relative to it. Grains: `shared` is one number; `per_tensor` one for each
    fast weight (Meta-SGD by tensor: Li et al. 2017); `per_tensor_per_step` one for each of those
    and inner step (LSLR of MAML++: Antoniou et al. 2019, section 4).

    Attributes:
        initial: the rate at which all start, above 0.
        grain: which rates are meta-parameters; `none` keeps `initial`.
        num_steps: K, the number of rates kept for `per_tensor_per_step`; later steps reuse the last.
    """

    initial: float
    grain: Grain
    num_steps: int

    def meta_parameters(self, fast_names: Iterable[str], like: Tensor) -> dict[str, Tensor]:
        """Initial log rates by name, in the dtype and on the device of `like`."""
        start = math.log(self.initial)
        if self.grain == "none":
            return {}
        if self.grain == "shared":
            return {f"{RATES}shared": like.new_full((), start)}
        shape = (self.num_steps,) if self.grain == "per_tensor_per_step" else ()
        return {f"{RATES}{name}": like.new_full(shape, start) for name in fast_names}

    def at(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The rate of each fast weight at inner step `step`: scalars by name."""
        if self.grain == "none":
            return {
                name: torch.tensor(self.initial, dtype=value.dtype, device=value.device)
                for name, value in fast.items()
            }
        if self.grain == "shared":
            shared = meta[f"{RATES}shared"].exp()
            return dict.fromkeys(fast, shared)
        if self.grain == "per_tensor":
            return {name: meta[f"{RATES}{name}"].exp() for name in fast}
        column = min(step, self.num_steps - 1)
        return {name: meta[f"{RATES}{name}"][column].exp() for name in fast}
