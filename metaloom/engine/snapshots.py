"""Which (phi_k, s_k) are kept for the adjoint sweep, and where; the others are computed again.

K inner steps, states 0 .. K, visited from the last to the first.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metaloom.engine.unroll import Snapshot
from metaloom.errors import CapabilityError

Advance = Callable[[Snapshot, int], Snapshot]


class SnapshotPlan(abc.ABC):
    """How the states of an unroll are had in reverse order."""

    @abc.abstractmethod
    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        """The states num_steps, ..., 1, 0.

        Args:
            start: state 0.
            num_steps: inner steps from it.
            advance: `(state k, k) -> state k + 1`.
        """


@dataclasses.dataclass(frozen=True)
class KeepAll(SnapshotPlan):
    """Every state: nothing is computed again. Memory: K + 1 states, reserved at once.

    The K states of a tensor lie in one block. Were each left where its step made it, then what a step takes
    and gives back between them would be holes that the next step does not quite fit: a tenth of the whole,
    with glibc's allocator.
    """

    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        blocks = _mapped(start, lambda tensor: tensor.new_empty(num_steps, *tensor.shape))
        at = start
        for step in range(num_steps):
            at = _stored(advance(at, step), blocks, step)
        del at
        for step in reversed(range(num_steps)):
            yield _mapped(blocks, lambda block: block[step])  # noqa: B023
        del blocks
        yield start


def _stored(snapshot: Snapshot, blocks: Snapshot, row: int) -> Snapshot:
    """The snapshot, now in that row of the blocks."""
    kept = _mapped(blocks, lambda block: block[row])
    for name, value in snapshot.fast.items():
        kept.fast[name].copy_(value)
    for name, value in snapshot.state.items():
        kept.state[name].copy_(value)
    return kept


@dataclasses.dataclass(frozen=True)
class Binomial(SnapshotPlan):
    """At most `num_slots` states beside the first; the rest is computed again, as rarely as can be.

    Griewank and Walther 2000, "Algorithm 799: Revolve", theorem 1. With s slots and each step computed at
    most t times, C(s + t + 1, t) - 1 steps can be reversed: 9 slots suffice for 65 steps at t = 2.

    Attributes:
        num_slots: s, at least 1.
    """

    num_slots: int

    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        yield from self._reversed([start], 0, num_steps, self.num_slots, advance)

    def _reversed(
        self, holder: list[Snapshot], first: int, last: int, num_slots: int, advance: Advance
    ) -> Iterator[Snapshot]:
        """States `last` .. `first`, from state `first`, which `holder` alone holds."""
        if last == first:
            yield holder.pop()
            return
        middle = first + (split(last - first, num_slots) if num_slots > 0 else last - first)
        state = holder[0]
        for step in range(first, middle):
            state = advance(state, step)
        upper = [state]
        del state
        yield from self._reversed(upper, middle, last, max(0, num_slots - 1), advance)
        yield from self._reversed(holder, first, middle - 1, num_slots, advance)


def split(num_steps: int, num_slots: int) -> int:
    """Where the next state is kept, counted from the last one kept, so that the fewest steps are repeated."""
    repeats = 1
    while num_reversed(num_slots, repeats) < num_steps:
        repeats += 1
    # Both parts stay in the range of lengths where every step is computed at most (and many exactly) as
    # often.
    most_below = num_reversed(num_slots, repeats - 1)
    least_above = num_reversed(num_slots - 1, repeats - 1)
    return 1 + min(most_below, num_steps - 1 - least_above) if num_steps - 1 > least_above else 1


def num_reversed(num_slots: int, num_repeats: int) -> int:
    """The most steps that can be reversed with so many slots, none of them computed more than so often."""
    return math.comb(num_slots + num_repeats + 1, num_repeats) - 1


@dataclasses.dataclass(frozen=True)
class HostMemory(SnapshotPlan):
    """Every state, in the memory of the host: for GPUs, whose own is scarcer. They come and go beside the
    computation. Memory: K + 1 states, pinned, in the host; two states on the GPU.

    Attributes:
        device: where the computation is.

    Raises:
        CapabilityError: it is not a GPU.
    """

    device: torch.device

    def __post_init__(self) -> None:
        if self.device.type != "cuda":
            raise CapabilityError(
                f"memory.snapshots: host, and the weights are on the {self.device.type} already; choose all "
                "or binomial."
            )

    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        device = self.device
        transfer = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        kept = [_to_host(start, transfer)]
        at = start
        del start  # `at` alone holds a state on the GPU, until it is given out
        for step in range(num_steps):
            at = advance(at, step)
            kept.append(_to_host(at, transfer))
        yield at
        del at
        kept.pop()
        upcoming = _to_device(kept.pop(), device, transfer) if kept else None
        while upcoming is not None:
            torch.cuda.current_stream(device).wait_stream(transfer)
            current = upcoming
            upcoming = _to_device(kept.pop(), device, transfer) if kept else None
            for tensor in (*current.fast.values(), *current.state.values()):
                tensor.record_stream(torch.cuda.current_stream(device))
            yield current


def _to_host(snapshot: Snapshot, transfer: torch.cuda.Stream) -> Snapshot:
    def copy(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(transfer)
        return host

    transfer.wait_stream(torch.cuda.current_stream(transfer.device))
    with torch.cuda.stream(transfer):
        return _mapped(snapshot, copy)


def _to_device(snapshot: Snapshot, device: torch.device, transfer: torch.cuda.Stream) -> Snapshot:
    with torch.cuda.stream(transfer):
        return _mapped(snapshot, lambda tensor: tensor.to(device, non_blocking=True))


def _mapped(snapshot: Snapshot, function: Callable[[Tensor], Tensor]) -> Snapshot:
    return Snapshot(
        {name: function(value) for name, value in snapshot.fast.items()},
        {name: function(value) for name, value in snapshot.state.items()},
    )
