"""Which (phi_k, s_k) are kept for the adjoint sweep, and where; the others are computed again.

K inner steps, states 0 .. K, visited from the last to the first.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from metaloom.engine.unroll import Snapshot

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
    """Every state: nothing is computed again. Memory: K + 1 states, reserved with the first step; what the
    steps pass on as it is (`passed_on`) once.

    The states of a tensor lie in one block. Were each left where its step made it, then what a step takes
    and gives back between them would be holes that the next step does not quite fit: a tenth of the whole,
    with glibc's allocator.
    """

    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        blocks: dict[str, Tensor] = {}
        kept = [start]
        for step in range(num_steps):
            after = advance(kept[-1], step)
            kept.append(_stored(after, passed_on(kept[-1], after), blocks, step - num_steps))
            del after  # before the next one is made
        blocks.clear()
        while kept:
            yield kept.pop()


def _stored(snapshot: Snapshot, passed: frozenset[str], blocks: dict[str, Tensor], row: int) -> Snapshot:
    """The snapshot, now in that row of the blocks, counted from their end; what was passed on stays where
    it is."""

    def store(name: str, tensor: Tensor) -> Tensor:
        if name not in blocks:  # the first step to make it: room for this one and all that follow
            blocks[name] = tensor.new_empty(-row, *tensor.shape)
        return blocks[name][row].copy_(tensor)

    return _copied(snapshot, store, {name: snapshot.state[name] for name in passed})


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
    """Every state, in the memory of the host: for GPUs, whose own is scarcer.

    Memory: K states in the host, pinned (torch rounds the size of each tensor up to a power of two); on the
    GPU two states. What the steps pass on as it is (`passed_on`) is in each of them once.

    The states come and go on a stream of their own, beside the computation: state k goes while step k runs
    from it, and comes while step k + 1 is pulled back. A copy waits for all that the computation was given
    before it; the computation waits for the copy before it uses the state that came, or gives back the memory
    of the one that went. So memory is used again no sooner than both are done with it, and the GPU never
    holds a third state because the host ran ahead. Only pinned memory is given back while a copy still reads
    it: torch's allocator keeps it until then.

    Attributes:
        device: where the computation is, on the stream that is current when it begins. On a CPU it is right,
            and gains nothing.
    """

    device: torch.device

    def backwards(self, start: Snapshot, num_steps: int, advance: Advance) -> Iterator[Snapshot]:
        transfer = _Transfer(self.device)
        kept: list[Snapshot] = []
        passed = [frozenset[str]()]  # from state k - 1 to state k
        at = start
        del start
        try:
            for step in range(num_steps):
                kept.append(transfer.to_host(at, {name: kept[-1].state[name] for name in passed[-1]}))
                after = advance(at, step)
                passed.append(passed_on(at, after))
                transfer.wait()
                at = after
                del after
            while kept:
                upcoming = transfer.to_device(kept.pop(), {name: at.state[name] for name in passed.pop()})
                yield at
                transfer.wait()
                at = upcoming
                del upcoming
            yield at
        finally:
            transfer.wait()  # whoever stops early gives back memory that a copy still writes to


class _Transfer:
    """Copies between a device and the host, on a stream beside that of the computation.

    Args:
        device: where the computation is, on the stream that is current there now.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = torch.get_device_module(device)
        self._computation = self._streams.current_stream(device)
        self._stream = self._streams.Stream(device)

    def to_host(self, snapshot: Snapshot, shared: Mapping[str, Tensor]) -> Snapshot:
        """The snapshot in the host's memory, with `shared` for these entries of its state: under way."""
        pinned = self._device.type != "cpu"
        return self._copied(
            snapshot, shared, lambda like: torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        )

    def to_device(self, snapshot: Snapshot, shared: Mapping[str, Tensor]) -> Snapshot:
        """The snapshot on the device, with `shared` for these entries of its state: under way."""
        return self._copied(
            snapshot, shared, lambda like: torch.empty(like.shape, dtype=like.dtype, device=self._device)
        )

    def wait(self) -> None:
        """The computation goes on when all copies so far are done; the host does not wait."""
        self._computation.wait_stream(self._stream)

    def _copied(
        self, snapshot: Snapshot, shared: Mapping[str, Tensor], room: Callable[[Tensor], Tensor]
    ) -> Snapshot:
        # What is copied may still be computed, and what it is copied to may still be read by its last owner.
        self._stream.wait_stream(self._computation)

        def copy(_: str, tensor: Tensor) -> Tensor:
            made = room(tensor)  # the computation's memory, as it outlives the copy
            with self._streams.stream(self._stream):
                return made.copy_(tensor, non_blocking=True)

        return _copied(snapshot, copy, shared)


def passed_on(before: Snapshot, after: Snapshot) -> frozenset[str]:
    """The entries of the state that a step returned as it got them, such as the anchors of a proximal term:
    the very tensors, so that one copy serves both states."""
    return frozenset(name for name, value in after.state.items() if before.state.get(name) is value)


def _copied(
    snapshot: Snapshot, copy: Callable[[str, Tensor], Tensor], shared: Mapping[str, Tensor]
) -> Snapshot:
    """Copies of a snapshot's tensors, each by a name of its own, with `shared` for these entries of its
    state."""
    return Snapshot(
        {name: copy(f"fast/{name}", value) for name, value in snapshot.fast.items()},
        {
            name: shared[name] if name in shared else copy(f"state/{name}", value)
            for name, value in snapshot.state.items()
        },
    )
