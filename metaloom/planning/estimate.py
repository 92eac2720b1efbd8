"""From facts to what a rank needs and how long an outer step takes: arithmetic alone, see docs/scaling.md.

Letters: N ranks, W of them in a shard group, T tasks side by side, M micro-batches of a rank, K inner steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from metaloom.planning.facts import Amounts, Facts, Point, Samples, Sizes, Way
from metaloom.planning.hardware import Hardware

DEEPSPEED_BUCKET_BYTES = 2.0**27  # see engine/sharding/deepspeed_config.py


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the meta-parameters lie on the ranks.

    Attributes:
        kind: as in a recipe.
        shard_size: W, with `sharded`; None for all ranks.
        stage: with `deepspeed_zero`: 1 divides optimizer states, 2 gradients too.
        offload_optimizer: with `deepspeed_zero`: whether optimizer states are in the host's memory.
    """

    kind: Literal["replicated", "sharded", "deepspeed_zero"]
    shard_size: int | None = None
    stage: int = 2
    offload_optimizer: bool = False

    def in_words(self) -> str:
        """As the title of a table."""
        if self.kind == "sharded":
            return "sharded" if self.shard_size is None else f"sharded, shard_size {self.shard_size}"
        if self.kind == "deepspeed_zero":
            offload = ", optimizer offloaded" if self.offload_optimizer else ""
            return f"deepspeed_zero, stage {self.stage}{offload}"
        return self.kind

    def takes(self, num_ranks: int) -> bool:
        """Whether a run starts on so many ranks: they are whole shard groups."""
        return num_ranks % self.group_size(num_ranks) == 0

    def group_size(self, num_ranks: int) -> int:
        """W; 1 where weights are whole."""
        if self.kind != "sharded":
            return 1
        return num_ranks if self.shard_size is None else self.shard_size


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak.

    Attributes:
        process: beside tensors.
        weights: the model's own values.
        learned: meta-parameters, their moving average among them.
        optimizer: its states.
        gradients: the sum over tasks, and those of single tasks where the combiner keeps them.
        states: (phi_k, s_k) that are kept.
        working: activations, graphs, and all else that lives at the peak.
        unusable: what the allocator holds beside it.
    """

    process: float
    weights: float
    learned: float
    optimizer: float
    gradients: float
    states: float
    working: float
    unusable: float

    @property
    def total(self) -> float:
        """All together."""
        parts: tuple[float, ...] = dataclasses.astuple(self)
        return sum(parts)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an outer step takes on the busiest rank.

    Attributes:
        num_ranks: N.
        way: by which the hypergradient is computed.
        tasks_per_rank: of the rank that has most.
        micro_batch: T.
        num_micro_batches: M.
        memory: of the device, at the peak.
        peak_in: in what the peak is.
        fits: whether the device has as much.
        host_bytes: in the host's memory, for states or optimizer states.
        wire_bytes: that a rank sends.
        compute_s: of arithmetic and traffic to memory.
        communication_s: of collectives, all of them.
        step_s: compute, and the communication that is not hidden behind it.
        tasks_per_s: of all ranks.
        num_idle_ranks: that have no tasks.
    """

    num_ranks: int
    way: str
    tasks_per_rank: int
    micro_batch: int
    num_micro_batches: int
    memory: Memory
    peak_in: str
    fits: bool
    host_bytes: float
    wire_bytes: float
    compute_s: float
    communication_s: float
    step_s: float
    tasks_per_s: float
    num_idle_ranks: int


def estimate(facts: Facts, hardware: Hardware, layout: Layout, num_ranks: int) -> Estimate:
    """What an outer step takes on the busiest of `num_ranks` ranks.

    Raises:
        ValueError: the layout does not take so many ranks; or weights are to be in shards, and were not
            counted so.
    """
    if not layout.takes(num_ranks):
        raise ValueError(f"{num_ranks} ranks are no whole groups of {layout.shard_size}")
    tasks_per_rank = math.ceil(facts.tasks_per_step / num_ranks)
    micro_batch = min(tasks_per_rank, facts.micro_batch or tasks_per_rank)
    rest = tasks_per_rank % micro_batch
    sizes = (micro_batch,) * (tasks_per_rank // micro_batch) + ((rest,) if rest else ())
    group_size = layout.group_size(num_ranks)
    sizes *= group_size if facts.takes_turns else 1
    held = _held(facts, layout, num_ranks)
    free = hardware.device.memory_bytes - hardware.device.process_bytes - held.total
    ways = _ways(facts, hardware, layout, micro_batch)
    passes = {size: _pass(facts, hardware, layout, ways, size, group_size, free) for size in set(sizes)}
    largest = passes[micro_batch]
    all_passes = [passes[size] for size in sizes]

    batch_bytes = facts.data_bytes * tasks_per_rank
    # The sum over tasks is there from the first micro-batch on, but not while that is computed: but where it
    # is sent as it is completed.
    is_sent_early = layout.kind == "replicated" and num_ranks > 1
    summed = held.gradients if len(sizes) > 1 or is_sent_early else 0.0
    # In turns a rank has the gradients of W times as many tasks, and a W-th of each.
    stored = facts.stored_bytes * tasks_per_rank
    summed += stored
    peaks = {
        "outer step": summed + largest.amounts.peak_bytes + batch_bytes,
        "update": stored + _update_bytes(facts, layout, num_ranks) + batch_bytes,
    }
    for trial in facts.trials:
        amounts = trial.amounts.at(Point(micro_batch, facts.num_steps, facts.num_blocks))
        peaks["first trials"] = max(peaks.get("first trials", 0.0), amounts.peak_bytes + batch_bytes)
    kept = held.total - held.gradients
    if facts.pretrain is not None:
        # What ordinary training holds are other tensors than those of meta-training.
        peaks["pre-training"] = _pretrain_bytes(facts, num_ranks, group_size) - kept
    peak_in = max(peaks, key=lambda name: peaks[name])
    gradients = {"outer step": summed, "update": stored + held.gradients}.get(peak_in, 0.0)
    states = largest.states if peak_in == "outer step" else 0.0
    memory = Memory(
        process=hardware.device.process_bytes,
        weights=held.weights,
        learned=held.learned + held.average,
        optimizer=held.optimizer,
        gradients=gradients,
        states=states,
        working=peaks[peak_in] - gradients - states,
        unusable=hardware.device.unusable * (kept + peaks[peak_in]) + hardware.device.unusable_bytes,
    )
    wires = _wires(facts, hardware, layout, num_ranks, all_passes)
    computing_s = sum(one.compute_s for one in all_passes)
    computing_s += compute_s(facts.update, facts.compute, hardware)
    step_s = computing_s + wires.exposed_s
    return Estimate(
        num_ranks=num_ranks,
        way=largest.way,
        tasks_per_rank=tasks_per_rank,
        micro_batch=micro_batch,
        num_micro_batches=len(sizes),
        memory=memory,
        peak_in=peak_in,
        fits=memory.total <= hardware.device.memory_bytes,
        host_bytes=largest.host_bytes + (_offloaded(facts, num_ranks) if layout.offload_optimizer else 0.0),
        wire_bytes=wires.num_bytes,
        compute_s=computing_s,
        communication_s=wires.total_s,
        step_s=step_s,
        tasks_per_s=facts.tasks_per_step / step_s,
        num_idle_ranks=max(0, num_ranks - facts.tasks_per_step),
    )


# ---------------------------------------------------------------- memory


def _held(facts: Facts, layout: Layout, num_ranks: int) -> Sizes:
    """What a rank holds between hypergradients."""
    held = facts.own.plus(facts.backbone.divided(layout.group_size(num_ranks)))
    if layout.kind != "deepspeed_zero":
        return held
    # A rank's part of the states, and the copy of its part of the meta-parameters that DeepSpeed steps on.
    part = 0.0 if layout.offload_optimizer else (held.optimizer + held.learned) / num_ranks
    return dataclasses.replace(held, optimizer=part)


def _offloaded(facts: Facts, num_ranks: int) -> float:
    both = facts.own.plus(facts.backbone)
    return (both.learned + both.optimizer) / num_ranks


def _update_bytes(facts: Facts, layout: Layout, num_ranks: int) -> float:
    """The peak of combining and updating, above what is held; the sum of gradients among it."""
    own, backbone = facts.own.gradients, facts.backbone.gradients
    in_full = own + backbone
    if in_full == 0.0:
        return 0.0
    on_rank = own + backbone / layout.group_size(num_ranks)
    peak = facts.update.peak_bytes * on_rank / in_full
    if layout.kind != "deepspeed_zero":
        return peak
    # The gradients as they are handed over: whole, or a rank's part of them by way of a bucket.
    handed = on_rank / num_ranks + min(on_rank, DEEPSPEED_BUCKET_BYTES) if layout.stage == 2 else on_rank
    return peak + handed


def _pretrain_bytes(facts: Facts, num_ranks: int, group_size: int) -> float:
    """The peak of ordinary training: what it holds is divided among a shard group."""
    assert facts.pretrain is not None
    samples = math.ceil(facts.pretrain_batch / num_ranks)
    at = functools.partial(Point, steps=1, blocks=facts.num_blocks)
    nothing, batch = (facts.pretrain.at(at(count)).peak_bytes for count in (0, samples))
    return nothing / group_size + batch - nothing


# ---------------------------------------------------------------- one micro-batch


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The hypergradient of one micro-batch.

    Attributes:
        states: bytes of kept states in `amounts.peak_bytes`.
    """

    way: str
    amounts: Amounts
    states: float
    host_bytes: float
    compute_s: float


def _ways(facts: Facts, hardware: Hardware, layout: Layout, micro_batch: int) -> list[Way]:
    """The ways that are left once a run has chosen how tasks are put side by side, which it does first, by
    its trials; of what is possible, the fastest."""
    ways = list(facts.ways_in_shards if layout.kind == "sharded" else facts.ways)
    if not ways:
        raise ValueError("the recipe was not counted with its backbone in shards")
    possible = {way.tasks for way in ways}
    trials = [trial for trial in facts.trials if trial.tasks in possible]
    if not trials:
        return ways
    point = Point(micro_batch, facts.num_steps, facts.num_blocks)
    fastest = min(trials, key=lambda trial: compute_s(trial.amounts.at(point), facts.compute, hardware))
    return [way for way in ways if way.tasks == fastest.tasks]


def _pass(
    facts: Facts,
    hardware: Hardware,
    layout: Layout,
    ways: list[Way],
    num_tasks: int,
    group_size: int,
    free_bytes: float,
) -> _Pass:
    """By the fastest of the ways."""
    advance = facts.advance_in_shards if layout.kind == "sharded" else facts.advance
    passes = [_pass_by(facts, hardware, way, advance, num_tasks, group_size) for way in ways]
    fastest = min(passes, key=lambda one: one.compute_s)
    stateful = [one for one, way in zip(passes, ways, strict=True) if way.keeps_states]
    is_auto = len({way.estimator for way in ways}) > 1
    if not is_auto or fastest in stateful or not stateful:
        return fastest
    # `auto`: the graph of as many of the last steps as fit, the faster sweep over the others.
    sweep = min(stateful, key=lambda one: one.compute_s)
    limit = facts.graph_limit_bytes or facts.graph_share * max(0.0, free_bytes)
    step_bytes = fastest.amounts.peak_bytes / facts.num_steps
    num_kept = max(0, min(facts.num_steps, int(limit / step_bytes) - 1))
    share = num_kept / facts.num_steps
    amounts = sweep.amounts.plus(sweep.amounts, -share).plus(fastest.amounts, share)
    return _Pass(
        way=f"{sweep.way}, graph of the last {num_kept} steps" if num_kept else sweep.way,
        amounts=amounts,
        states=(1.0 - share) * sweep.states,
        host_bytes=(1.0 - share) * sweep.host_bytes,
        compute_s=compute_s(amounts, facts.compute, hardware),
    )


def _pass_by(
    facts: Facts, hardware: Hardware, way: Way, advance: Samples | None, num_tasks: int, group_size: int
) -> _Pass:
    point = Point(num_tasks, facts.num_steps, facts.num_blocks, group_size)
    amounts = way.amounts.at(point)
    states = host_bytes = 0.0
    if way.keeps_states:
        state = facts.state_bytes * num_tasks
        num_swept = facts.num_swept
        num_kept = {
            "all": num_swept,
            "binomial": min(num_swept, facts.num_slots),
            "host": min(num_swept, 2),
        }[facts.snapshots]
        states = num_kept * state
        peak = max(0.0, amounts.peak_bytes - num_swept * state) + states
        amounts = dataclasses.replace(amounts, peak_bytes=peak)
        if facts.snapshots == "binomial":
            assert advance is not None, "counted with such snapshots"
            again = num_advances(num_swept, facts.num_slots) - num_swept
            once = dataclasses.replace(advance.at(dataclasses.replace(point, steps=1)), peak_bytes=0.0)
            amounts = amounts.plus(once, again)
        if facts.snapshots == "host":
            host_bytes = num_swept * state
    return _Pass(way.name, amounts, states, host_bytes, compute_s(amounts, facts.compute, hardware))


def num_advances(num_steps: int, num_slots: int) -> int:
    """The inner steps that are computed to visit the states of K = `num_steps` backwards, s = `num_slots` of
    them kept beside the first.

    `t (K + 1) - C(s + t + 1, t - 1)`, t the fewest repeats with `C(s + t + 1, t) - 1 >= K` (Griewank and
    Walther 2000, "Algorithm 799: Revolve", theorem 1).
    """
    repeats = 1
    while math.comb(num_slots + repeats + 1, repeats) - 1 < num_steps:
        repeats += 1
    return repeats * (num_steps + 1) - math.comb(num_slots + repeats + 1, repeats - 1)


# ---------------------------------------------------------------- time


def compute_s(amounts: Amounts, compute: str, hardware: Hardware) -> float:
    """Seconds: of arithmetic and of traffic one after the other; the host's own beside them, or before."""
    device = hardware.device
    on_device = amounts.flops / (device.efficiency * device.flops_per_s[compute])
    on_device += amounts.moved_bytes / (device.bandwidth_efficiency * device.bandwidth)
    on_host = amounts.num_operations * device.operation_s
    return max(on_device, on_host) if device.is_asynchronous else on_device + on_host


@dataclasses.dataclass(frozen=True)
class _Wires:
    num_bytes: float
    total_s: float
    exposed_s: float


def _wires(facts: Facts, hardware: Hardware, layout: Layout, num_ranks: int, passes: list[_Pass]) -> _Wires:
    """The collectives of an outer step."""
    own, backbone = facts.own.gradients, facts.backbone.gradients
    group_size = layout.group_size(num_ranks)
    if group_size == 1:
        crossing = _all_reduce(hardware, own + backbone, num_ranks, num_ranks)
        return _Wires(crossing[0], crossing[1], crossing[1])
    # Once per outer step: what is whole over all ranks, a rank's shard of the gradient over the copies.
    num_copies = num_ranks // group_size
    once = [
        _all_reduce(hardware, own, num_ranks, num_ranks),
        _all_reduce(hardware, backbone / group_size, num_copies, num_ranks),
    ]
    num_bytes, total_s = sum(one[0] for one in once), sum(one[1] for one in once)
    exposed_s = total_s
    share = (group_size - 1) / group_size
    for one in passes:
        amounts = one.amounts
        # Weights come from shards ahead of need, beside the arithmetic; gradients into shards are waited for.
        latency_s = amounts.num_collectives * math.log2(group_size) * hardware.latency_s
        bandwidth = hardware.bandwidth_among(group_size)
        gather_s = share * amounts.gathered_bytes / bandwidth + latency_s
        scatter_s = share * amounts.scattered_bytes / bandwidth
        num_bytes += share * (amounts.gathered_bytes + amounts.scattered_bytes)
        total_s += gather_s + scatter_s
        exposed_s += max(0.0, gather_s - one.compute_s) + scatter_s
    return _Wires(num_bytes, total_s, exposed_s)


def _all_reduce(
    hardware: Hardware, num_bytes: float, num_ranks: int, num_spanned: int
) -> tuple[float, float]:
    """Bytes that a rank sends, and seconds, of a sum over `num_ranks` ranks.

    Args:
        num_spanned: ranks among which they lie.
    """
    if num_ranks == 1 or num_bytes == 0.0:
        return 0.0, 0.0
    sent = 2.0 * (num_ranks - 1) / num_ranks * num_bytes
    latency_s = 2.0 * math.log2(num_ranks) * hardware.latency_s
    return sent, sent / hardware.bandwidth_among(num_spanned) + latency_s
