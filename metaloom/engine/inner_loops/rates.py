"""Learning rates of the inner loop: fixed, or meta-parameters themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

RATES = "rates."
Grain = Literal["none", "shared", "per_group", "per_tensor", "per_tensor_per_step", "per_element"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rate of each fast weight at each inner step.

    Learned rates are kept as logarithms: a rate stays positive, and the outer optimizer's step is
    relative to it.

        none                   all rates stay `initial`
        shared                 `rates.shared` [], one for all
        per_group              `rates.group.<end>` [], one for the fast weights whose names end alike:
                               `weight`, `bias`, `lora_a` ...
        per_tensor             `rates.<name>` [], one for each fast weight
        per_tensor_per_step    `rates.<name>` [K], and for each inner step (LSLR of MAML++: Antoniou et al.
                               2019, section 4)
        per_element            `rates.<name>` of one task's shape, one for each number (Meta-SGD: Li et al.
                               2017, whose rates may also be negative)

    Attributes:
        initial: the rate at which all start, above 0.
        grain: which rates are meta-parameters.
        num_steps: K, the number of rates kept for `per_tensor_per_step`; later steps reuse the last.
    """

    initial: float
    grain: Grain
    num_steps: int

    def meta_parameters(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Initial log rates by name, for fast weights `[T, ...]`, in their dtype and on their device."""
        start = math.log(self.initial)
        if self.grain == "none":
            return {}
        if self.grain == "shared":
            return {_SHARED: next(iter(fast.values())).new_full((), start)}
        if self.grain == "per_group":
            return {_group(name): value.new_full((), start) for name, value in fast.items()}
        shapes: dict[str, tuple[int, ...]] = {
            name: {
                "per_tensor": (),
                "per_tensor_per_step": (self.num_steps,),
                "per_element": tuple(value.shape[1:]),
            }[self.grain]
            for name, value in fast.items()
        }
        return {RATES + name: value.new_full(shapes[name], start) for name, value in fast.items()}

    def at(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The rate of each fast weight at inner step `step`, by name: scalars, or with `per_element`
        the shape of one task's weight."""
        if self.grain == "none":
            # Filled where the weights are: a number copied to a GPU would make the host wait for it.
            return {name: value.new_full((), self.initial) for name, value in fast.items()}
        if self.grain == "shared":
            return dict.fromkeys(fast, meta[_SHARED].exp())
        if self.grain == "per_group":
            return {name: meta[_group(name)].exp() for name in fast}
        if self.grain == "per_tensor_per_step":
            column = min(step, self.num_steps - 1)
            return {name: meta[RATES + name][column].exp() for name in fast}
        return {name: meta[RATES + name].exp() for name in fast}


_SHARED = f"{RATES}shared"


def _group(name: str) -> str:
    """The meta-parameter of a fast weight's group: those whose names have the same last part."""
    return f"{RATES}group.{name.rpartition('.')[2]}"
