"""States in the host's memory: in the right order on every stream, without a GPU to show it on.

Two streams are faked, with the order that they promise (vector clocks: what of each stream is known to be
done before the next operation of this one). The GPU's tensors lie on torch's device `meta`, so that each
operation on them is seen, and held against all that touched the same memory before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaloom.engine.snapshots import HostMemory
from metaloom.engine.unroll import Snapshot

GPU = torch.device("meta")
NUM_STEPS = 4


class Stream:
    """Operations that run in their order.

    Attributes:
        done: how many operations of each stream are done before the next one of this.
    """

    def __init__(self, device: torch.device) -> None:
        assert device == GPU
        self.done: Counter[int] = Counter()

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def run(self) -> tuple[int, int]:
        """A new operation: the stream's number and the operation's in it."""
        self.done[id(self)] += 1
        return id(self), self.done[id(self)]


class Streams:
    """What `torch.get_device_module` gives of a GPU."""

    def __init__(self) -> None:
        self.computation = self._current = Stream(GPU)
        self.Stream = Stream

    def current_stream(self, device: torch.device) -> Stream:
        assert device == GPU
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current = stream
        yield
        self._current = self.computation


@dataclasses.dataclass
class Memory:
    """One storage: whose it is, and the operations that touched it."""

    storage: StorageWeakRef
    owner: Stream
    on_gpu: bool
    writes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    reads: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def is_freed(self) -> bool:
        return bool(self.storage.expired())  # type: ignore[no-untyped-call]


class RaceDetector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where an operation reads memory that another one may still be writing, or writes what another
    one may still be touching; and where memory is given back to the stream that it belongs to while an
    operation of another stream may still be touching it."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams
        self._memory: dict[int, Memory] = {}
        self.num_copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        stream = self._streams.current_stream(GPU)
        self.check_freed()
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = func.name()
        if name == "aten::copy_":
            assert args[2] is True, "a blocking copy"
            assert args[0].device != args[1].device
            self.num_copies += 1
            self._touch(stream, reads=[args[1]], writes=[args[0]])
            return args[0]  # a meta tensor has nothing to copy
        if name == "aten::empty.memory_format" and kwargs["device"].type == "cpu":
            assert kwargs.pop("pin_memory"), (
                "memory of the host that a GPU cannot copy from while it computes"
            )
        outputs = func(*args, **kwargs)
        made = [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]
        for value in made:
            storage = value.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._memory.setdefault(storage._cdata, Memory(reference, stream, value.device == GPU))
        if not name.startswith("aten::empty"):
            self._touch(stream, reads=inputs, writes=made)
        return outputs

    def _touch(self, stream: Stream, *, reads: list[Tensor], writes: list[Tensor]) -> None:
        operation = stream.run()
        for value in reads:
            memory = self._memory[value.untyped_storage()._cdata]
            self._require(stream, memory.writes, "reads what is not written yet")
            memory.reads.append(operation)
        for value in writes:
            memory = self._memory[value.untyped_storage()._cdata]
            self._require(stream, memory.writes + memory.reads, "writes what is still in use")
            memory.writes.append(operation)

    def check_freed(self) -> None:
        """Memory given back to its stream: what that runs next may write to it."""
        for key, memory in list(self._memory.items()):
            if memory.is_freed:
                if memory.on_gpu:
                    self._require(memory.owner, memory.writes + memory.reads, "was given back while in use")
                del self._memory[key]

    def _require(self, stream: Stream, before: list[tuple[int, int]], what: str) -> None:
        assert all(stream.done[other] >= number for other, number in before), what

    @property
    def num_on_gpu(self) -> int:
        return sum(memory.on_gpu and not memory.is_freed for memory in self._memory.values())

    @property
    def num_in_host(self) -> int:
        return sum(not memory.on_gpu and not memory.is_freed for memory in self._memory.values())


def first_state() -> Snapshot:
    weight = torch.ones(2, 3, device=GPU)
    return Snapshot({"w": weight}, {"anchor/w": weight, "momentum/w": torch.zeros(2, 3, device=GPU)})


def advance(at: Snapshot, step: int) -> Snapshot:
    momentum = at.state["momentum/w"] + at.fast["w"]
    weight = at.fast["w"] - momentum * at.state["anchor/w"]
    return Snapshot({"w": weight}, {"anchor/w": at.state["anchor/w"], "momentum/w": momentum})


def used(at: Snapshot) -> None:
    """What a sweep does with a state: reads it."""
    _ = at.fast["w"] * at.state["anchor/w"] + at.state["momentum/w"]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    return streams


def test_no_copy_races_with_the_computation(streams: Streams) -> None:
    with RaceDetector(streams) as detector:
        num_given = 0
        for at in HostMemory(GPU).backwards(first_state(), NUM_STEPS, advance):
            used(at)
            del at
            num_given += 1
        detector.check_freed()
    assert num_given == NUM_STEPS + 1
    # Weight and momentum of all states but the last, there and back; the anchor there alone, since the last
    # state still has it.
    assert detector.num_copies == 2 * 2 * NUM_STEPS + 1


@pytest.mark.parametrize("num_given", range(1, NUM_STEPS + 1))
def test_no_copy_races_with_what_follows_a_sweep_that_stops_early(streams: Streams, num_given: int) -> None:
    with RaceDetector(streams) as detector:
        states = HostMemory(GPU).backwards(first_state(), NUM_STEPS, advance)
        for _ in range(num_given):
            used(next(states))
        del states
        detector.check_freed()


def test_no_copy_races_with_what_follows_an_inner_step_that_fails(streams: Streams) -> None:
    def fail(at: Snapshot, step: int) -> Snapshot:
        if step == 2:
            raise ArithmeticError
        return advance(at, step)

    with RaceDetector(streams) as detector:
        with pytest.raises(ArithmeticError):
            next(HostMemory(GPU).backwards(first_state(), NUM_STEPS, fail))
        detector.check_freed()


def test_the_next_state_comes_beside_the_computation_on_this_one(streams: Streams) -> None:
    with RaceDetector(streams):
        transfer = None
        for number, at in enumerate(HostMemory(GPU).backwards(first_state(), NUM_STEPS, advance)):
            others = [key for key in streams.computation.done if key != id(streams.computation)]
            (transfer,) = others
            used(at)
            del at
            # Each state comes by two copies and goes by two, the anchor goes with the first: all are done
            # that bring this state, and none that brings the next.
            assert streams.computation.done[transfer] == 2 * NUM_STEPS + 1 + 2 * number


def test_a_gpu_holds_two_states_and_what_steps_pass_on_once(streams: Streams) -> None:
    with RaceDetector(streams) as detector:
        for number, at in enumerate(HostMemory(GPU).backwards(first_state(), NUM_STEPS, advance)):
            # Weight and momentum of this state, and of the next where there is one; the anchor.
            assert detector.num_on_gpu == (5 if number < NUM_STEPS else 3)
            assert detector.num_in_host == (2 * (NUM_STEPS - 1 - number) + 1 if number < NUM_STEPS - 1 else 0)
            del at
