"""Learning rates of the inner loop: fixed, or meta-parameters themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

RATES = "rates."
Grain = Literal["none", "shared", "per_group", "per_tensor", "per_tensor_per_step", "per_element"]
Scale = Literal["log", "linear"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rate of each fast weight at each inner step.

    Learned rates are kept as logarithms: a rate stays positive, and the outer optimizer's step is
    relative to it. On a linear scale they are kept as they are, and may become negative.

        none                   all rates stay `initial`
        shared                 `rates.shared` [], one for all
        per_group              `rates.group.<end>` [], one for the fast weights whose names end alike:
                               `weight`, `bias`, `lora_a` ...
        per_tensor             `rates.<name>` [], one for each fast weight
        per_tensor_per_step    `rates.<name>` [K], and for each inner step (LSLR of MAML++: Antoniou et al.
                               2019, section 4)
        per_element            `rates.<name>` of one task's shape, one for each number (Meta-SGD: Li et al.
                               2017, "Meta-SGD", equation 3; there on a linear scale)

    Attributes:
        initial: the rate at which all start, above 0.
        grain: which rates are meta-parameters.
        num_steps: K, the number of rates kept for `per_tensor_per_step`; later steps reuse the last.
        scale: `log` or `linear`: what is learned of a rate.
        spread: (low, high), above 0: learned rates start at numbers drawn evenly from between the two, in
            place of `initial` (Meta-SGD has 0.005 to 0.1); None: all at `initial`.
        seed: what these draws follow from, together with a rate's name.
    """

    initial: float
    grain: Grain
    num_steps: int
    scale: Scale = "log"
    spread: tuple[float, float] | None = None
    seed: int = 0

    def meta_parameters(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Initial rates by name, or their logarithms, for fast weights `[T, ...]`, in their dtype and on
        their device."""
        if self.grain == "none":
            return {}
        if self.grain == "shared":
            return {_SHARED: self._start(_SHARED, next(iter(fast.values())), ())}
        if self.grain == "per_group":
            return {_group(name): self._start(_group(name), value, ()) for name, value in fast.items()}
        shapes: dict[str, tuple[int, ...]] = {
            name: {
                "per_tensor": (),
                "per_tensor_per_step": (self.num_steps,),
                "per_element": tuple(value.shape[1:]),
            }[self.grain]
            for name, value in fast.items()
        }
        return {RATES + name: self._start(RATES + name, value, shapes[name]) for name, value in fast.items()}

    def _start(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.spread is None:
            initial = math.log(self.initial) if self.scale == "log" else self.initial
            return like.new_full(shape, initial)
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        # 63 bits: a generator's seed is a signed number. Drawn on the CPU: the same on every device.
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        drawn = torch.empty(shape, dtype=like.dtype).uniform_(*self.spread, generator=generator)
        return (drawn.log() if self.scale == "log" else drawn).to(like.device)

    def _rate(self, learned: Tensor) -> Tensor:
        return learned.exp() if self.scale == "log" else learned

    def at(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The rate of each fast weight at inner step `step`, by name: scalars, or with `per_element`
        the shape of one task's weight."""
        if self.grain == "none":
            # Filled where the weights are: a number copied to a GPU would make the host wait for it.
            return {name: value.new_full((), self.initial) for name, value in fast.items()}
        if self.grain == "shared":
            return dict.fromkeys(fast, self._rate(meta[_SHARED]))
        if self.grain == "per_group":
            return {name: self._rate(meta[_group(name)]) for name in fast}
        if self.grain == "per_tensor_per_step":
            column = min(step, self.num_steps - 1)
            return {name: self._rate(meta[RATES + name][column]) for name in fast}
        return {name: self._rate(meta[RATES + name]) for name in fast}


_SHARED = f"{RATES}shared"


def _group(name: str) -> str:
    """The meta-parameter of a fast weight's group: those whose names have the same last part."""
    return f"{RATES}group.{name.rpartition('.')[2]}"
