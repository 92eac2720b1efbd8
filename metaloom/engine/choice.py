"""Choosing between exact ways by measuring them on the user's own model and data.

Ways that compute the same hypergradient differ in time and memory, by model and machine. They are timed on
a short unroll of the first batch; memory is what the graph of an inner step keeps, counted, not sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import meta_losses
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.sweep import AdjointSweep
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.snapshots import KeepAll, SnapshotPlan
from metaloom.engine.unroll import Unroll, first_snapshot, leaves
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
TIMED_STEPS = 3
NUM_REPEATS = 2
GRAPH = "graph of all steps"
EXACT_AND_FLAT: dict[str, type[AdjointSweep]] = {"rematerialized": Rematerialized, "mixed_mode": MixedMode}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A choice, and what was measured for it.

    Attributes:
        name: of what was chosen.
        seconds: of each way that could be timed, summed over ranks.
        failures: why the others could not.
    """

    name: str
    seconds: dict[str, float]
    failures: dict[str, str]

    def in_words(self) -> str:
        """Everything measured, in one line."""
        timed = [f"{name} {seconds:.3g} s" for name, seconds in self.seconds.items()]
        failed = [f"{name} not possible ({why})" for name, why in self.failures.items()]
        return ", ".join([*timed, *failed])


@dataclasses.dataclass(frozen=True)
class EstimatorChoice:
    """Which estimator a run takes, and how many of the last inner steps keep their graph."""

    kind: str
    num_graph_steps: int

    def build(self, snapshots: SnapshotPlan) -> AdjointSweep:
        """The estimator."""
        return EXACT_AND_FLAT[self.kind](snapshots, self.num_graph_steps)


def fastest(
    ways: Mapping[str, Callable[[], object]], device: torch.device, sharding: Sharding, *, has_tasks: bool
) -> Measured:
    """Times each way on every rank that has tasks, and takes the one that is fastest on all together.

    Every rank must call, and chooses the same. A way that raises on any rank is not taken.

    Args:
        ways: what to time, by name.
        has_tasks: whether this rank has anything to time.

    Raises:
        CapabilityError: no way is possible.
    """
    seconds: dict[str, float] = dict.fromkeys(ways, math.inf)
    failures: dict[str, str] = {}
    if has_tasks:
        for repeat in range(1 + NUM_REPEATS):  # the first warms up; the repeats take turns
            for name, way in ways.items():
                if name in failures:
                    continue
                try:
                    elapsed = _timed(way, device)
                except (RuntimeError, NotImplementedError, CapabilityError) as error:
                    failures[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    continue
                if repeat > 0:
                    seconds[name] = min(seconds[name], elapsed)
    measured = sharding.gather([(seconds, failures)] if has_tasks else [])
    failures = {name: why for _, failed in measured for name, why in failed.items()}
    totals = {name: sum(each[name] for each, _ in measured) for name in ways if name not in failures}
    if not totals:
        raise CapabilityError(why_none(failures))
    return Measured(min(totals, key=lambda name: totals[name]), totals, failures)


def why_none(failures: Mapping[str, str]) -> str:
    """Why none of several ways is possible, by their names; a reason that they share is said once."""
    if len(failures) > 1 and len(set(failures.values())) == 1:
        return next(iter(failures.values()))
    return "; ".join(f"{way}: {why}" for way, why in failures.items())


def choose_estimator(
    unroll: Unroll,
    meta: Tensors,
    batch: TaskBatch | None,
    *,
    memory_limit_bytes: int,
    sharding: Sharding,
) -> tuple[EstimatorChoice, str]:
    """The exact estimator that is fastest here, and why in words.

    Times `rematerialized`, `mixed_mode` and the graph of whole steps on a short unroll. Where the graph is
    fastest, as many of the last steps keep theirs as fit into the limit; the others are swept by the
    faster of the two. Every rank must call, and chooses the same.

    Args:
        batch: this rank's first micro-batch; None where it has no tasks.
        memory_limit_bytes: for the graph that a hypergradient keeps.
    """
    short = shortened(unroll, TIMED_STEPS)
    device = next(iter(meta.values())).device
    # First what a graph takes, so that timing one does not exceed the limit either.
    sizes = sharding.gather([] if batch is None else [_graph_sizes(unroll, meta, batch)])
    limit = min(sharding.gather([memory_limit_bytes]))
    fitting, space = _fitting(sizes, limit, unroll.num_steps)
    estimators = {name: estimator() for name, estimator in EXACT_AND_FLAT.items()}
    if fitting > 0:
        estimators[GRAPH] = Rematerialized(KeepAll(), min(fitting, short.num_steps))

    def differentiate(estimator: AdjointSweep) -> None:
        if batch is not None:
            estimator.meta_gradient(short, meta, batch)

    ways = {name: functools.partial(differentiate, estimator) for name, estimator in estimators.items()}
    measured = fastest(ways, device, sharding, has_tasks=batch is not None)
    what = f"timed on {short.num_steps} inner steps: {measured.in_words()}; {space}"
    flat = {name: value for name, value in measured.seconds.items() if name in EXACT_AND_FLAT}
    if not flat:
        # The graph alone is possible, and not all steps need fit: nothing would sweep over the others.
        raise CapabilityError(f"neither exact way over single steps is possible ({what})")
    kind = min(flat, key=lambda name: flat[name])
    if measured.name != GRAPH:
        return EstimatorChoice(kind, 0), f"{kind} ({what})"
    return (
        EstimatorChoice(kind, fitting),
        f"{kind}, keeping the graph of the last {fitting} inner steps ({what})",
    )


def _fitting(sizes: Sequence[tuple[int, int] | None], limit: int, num_steps: int) -> tuple[int, str]:
    """How many steps' graphs fit into the limit on every rank, and that in words."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return 0, "the graph of a step cannot be built"
    query_bytes, step_bytes = (max(column) for column in zip(*known, strict=True))
    # One more step's worth is needed while the last graph is differentiated.
    fitting = max(0, min(num_steps, (limit - query_bytes) // max(1, step_bytes) - 1))
    words = f"one step's graph keeps {_mib(step_bytes)}, so {fitting} of {num_steps} fit into the limit"
    return fitting, f"{words} of {_mib(limit)}"


def shortened(unroll: Unroll, num_steps: int) -> Unroll:
    """The same inner problem with at most so many steps, its meta-loss after the last. None of them is of the
    head alone: those cost less than what is measured for."""
    count = min(num_steps, unroll.num_steps)
    return dataclasses.replace(unroll, step_weights=(*(0.0,) * count, 1.0), head_first=None)


def _timed(way: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _graph_sizes(unroll: Unroll, meta: Tensors, batch: TaskBatch) -> tuple[int, int] | None:
    """Bytes that the graph of the query pass keeps, and that of one inner step, with the query pass before it
    where the meta-loss has a term there; None where there is no such graph, or no memory for one."""
    whole = dataclasses.replace(unroll, head_first=None)
    ends = (dataclasses.replace(whole, step_weights=unroll.step_weights[-1 - count :]) for count in (0, 1))
    try:
        sizes = [graph_bytes(end, meta, batch) for end in ends]
    except RuntimeError:  # what cannot be built is not timed either, and told
        return None
    return sizes[0], max(0, sizes[1] - sizes[0])


def graph_bytes(unroll: Unroll, meta: Tensors, batch: TaskBatch) -> int:
    """Bytes of all tensors that the whole graph of an unroll keeps for its backward pass."""
    theta = leaves(meta)
    start = first_snapshot(unroll, meta, batch.num_tasks)
    with torch.enable_grad(), _counted() as saved:
        losses, _ = meta_losses(unroll, theta, (leaves(start.fast), leaves(start.state)), batch, 0)
    # What the passes inside have saved and freed is gone; the losses hold what their graph keeps.
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage() for one in saved}
    del losses
    return sum(storage.nbytes() for storage in storages.values())


class _Saved:
    """A tensor that a graph keeps; it goes when the graph goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def _counted() -> Iterator[weakref.WeakSet[_Saved]]:
    """What autograd has saved in this context and not freed since."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
