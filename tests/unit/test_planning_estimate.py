"""From facts to estimates: arithmetic against closed forms, on facts made by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from metaloom.engine.snapshots import Binomial
from metaloom.engine.unroll import Snapshot
from metaloom.errors import RecipeError
from metaloom.planning.estimate import Layout, estimate, num_advances
from metaloom.planning.facts import Amounts, Facts, Point, Samples, Sizes, Tasks, Way, sampled
from metaloom.planning.hardware import DEVICES, LINKS, Device, Hardware, device_named, link_named
from metaloom.planning.request import Request, checked, ranks_in

DEVICE = Device(
    name="test",
    memory_bytes=1000.0,
    flops_per_s={"float32": 100.0},
    bandwidth=50.0,
    operation_s=0.0,
    is_asynchronous=False,
    efficiency=0.5,
    bandwidth_efficiency=0.5,
    process_bytes=100.0,
    unusable=0.0,
    unusable_bytes=0.0,
    node_bandwidth=80.0,
    node_efficiency=1.0,
    has_host_memory=True,
)
HARDWARE = Hardware(DEVICE, LINKS["ndr"], devices_per_node=8, link_efficiency=1.0, latency_s=0.0)
TASKS: tuple[Tasks, ...] = ("loop", "vmap")
REPLICATED, SHARDED = Layout("replicated"), Layout("sharded")


def amounts_at(point: Point) -> Amounts:
    """Something linear in T, K, B and 1/W, with products of them."""
    T, K, B, share = point.coordinates()
    return Amounts(
        peak_bytes=10.0 * T * K * B + 6.0 * share + 3.0,
        flops=100.0 * T * K,
        moved_bytes=T,
        num_operations=7.0 * K,
        gathered_bytes=64.0,
        scattered_bytes=32.0,
        num_collectives=2.0,
    )


def some_facts(**changes: object) -> Facts:
    ways = (Way("loop", "rematerialized", True, sampled(((1, 2), (2, 3), (1,), (1,)), amounts_at)),)
    in_shards = sampled(((1, 2), (2, 3), (1,), (2, 64)), amounts_at)
    facts = Facts(
        tasks_per_step=16,
        micro_batch=None,
        num_steps=4,
        num_swept=4,
        num_blocks=1,
        num_parameters=1,
        snapshots="all",
        num_slots=0,
        compute="float32",
        backbone=Sizes(weights=64.0, learned=64.0, optimizer=128.0, average=0.0, gradients=64.0),
        own=Sizes(weights=0.0, learned=4.0, optimizer=8.0, average=4.0, gradients=4.0),
        update=Amounts(peak_bytes=68.0, flops=0.0, moved_bytes=10.0),
        state_bytes=5.0,
        data_bytes=0.0,
        ways=ways,
        trials=(),
        advance=Samples({Point(1, 1, 1): Amounts(flops=1000.0)}),
        graph_limit_bytes=None,
        graph_share=0.5,
        pretrain=None,
        pretrain_batch=0,
        ways_in_shards=(Way("loop", "rematerialized", True, in_shards),),
        advance_in_shards=None,
    )
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


def test_amounts_between_and_beyond_the_corners_are_those_of_what_is_linear_in_each_axis() -> None:
    samples = sampled(((1, 2), (2, 3), (2, 3), (2, 64)), amounts_at)
    assert len(samples.corners) == 16
    for point in (Point(5, 16, 32, 8), Point(1, 2, 3, 64), Point(7, 3, 2, 1024)):
        found, expected = (dataclasses.astuple(each) for each in (samples.at(point), amounts_at(point)))
        assert found == pytest.approx(expected, rel=1e-12)


def test_amounts_of_an_axis_with_one_value_do_not_depend_on_it() -> None:
    samples = sampled(((1,), (2, 3), (4,), (1,)), amounts_at)
    assert samples.at(Point(9, 5, 4)) == samples.at(Point(1, 5, 4))


def test_memory_under_replicated_is_what_is_held_and_what_a_micro_batch_takes() -> None:
    found = estimate(some_facts(), HARDWARE, REPLICATED, 8)
    assert (found.tasks_per_rank, found.micro_batch, found.num_micro_batches) == (2, 2, 1)
    memory = found.memory
    assert (memory.weights, memory.learned, memory.optimizer, memory.gradients) == (64, 72, 136, 68)
    assert memory.states == 4 * 2 * 5
    assert memory.states + memory.working == pytest.approx(amounts_at(Point(2, 4, 1)).peak_bytes)
    # Sums that are sent early have their buckets while the last micro-batch is computed.
    assert memory.total == pytest.approx(100 + 64 + 72 + 136 + 68 + 89)
    assert found.fits
    alone = estimate(dataclasses.replace(some_facts(), tasks_per_step=2), HARDWARE, REPLICATED, 1)
    assert alone.memory.gradients == 0
    assert alone.memory.total == pytest.approx(memory.total - 68)


def test_what_the_allocator_cannot_use_is_a_share_of_all_tensors_and_a_part_of_its_own() -> None:
    exact = estimate(some_facts(), HARDWARE, REPLICATED, 8).memory
    device = dataclasses.replace(DEVICE, unusable=0.1, unusable_bytes=7.0)
    found = estimate(some_facts(), dataclasses.replace(HARDWARE, device=device), REPLICATED, 8).memory
    assert found.unusable == pytest.approx(0.1 * (exact.total - exact.process) + 7.0)
    assert found.total == pytest.approx(exact.total + found.unusable)


def test_a_rank_short_of_memory_does_not_fit() -> None:
    small = dataclasses.replace(HARDWARE, device=dataclasses.replace(DEVICE, memory_bytes=528.9))
    assert not estimate(some_facts(), small, REPLICATED, 8).fits
    large = dataclasses.replace(HARDWARE, device=dataclasses.replace(DEVICE, memory_bytes=529.1))
    assert estimate(some_facts(), large, REPLICATED, 8).fits


def test_sharding_divides_all_of_the_backbone_and_nothing_else() -> None:
    facts = some_facts(micro_batch=1)
    alone, among_eight = (estimate(facts, HARDWARE, SHARDED, number) for number in (1, 8))
    for part, backbone in (("weights", 64), ("learned", 64), ("optimizer", 128), ("gradients", 64)):
        difference = getattr(alone.memory, part) - getattr(among_eight.memory, part)
        assert difference == pytest.approx(backbone * 7 / 8)


def test_deepspeed_divides_optimizer_states_and_puts_them_into_the_hosts_memory_where_asked() -> None:
    stage_1 = estimate(some_facts(), HARDWARE, Layout("deepspeed_zero", stage=1), 8)
    assert stage_1.memory.optimizer == pytest.approx((136 + 68) / 8)
    assert stage_1.host_bytes == 0.0
    offloaded = Layout("deepspeed_zero", stage=2, offload_optimizer=True)
    found = estimate(some_facts(), HARDWARE, offloaded, 8)
    assert found.memory.optimizer == 0.0
    assert found.host_bytes == pytest.approx((136 + 68) / 8)


@pytest.mark.parametrize("num_ranks", [2, 8, 16])
def test_replicated_ranks_send_what_a_ring_all_reduce_does(num_ranks: int) -> None:
    found = estimate(some_facts(), HARDWARE, REPLICATED, num_ranks)
    assert found.wire_bytes == pytest.approx(2 * (num_ranks - 1) / num_ranks * 68)
    assert found.communication_s == pytest.approx(found.wire_bytes / 80)
    assert found.step_s == pytest.approx(found.compute_s + found.communication_s)


def test_sharded_ranks_send_gathers_sums_and_once_what_copies_add_up() -> None:
    facts = some_facts(micro_batch=1)
    found = estimate(facts, HARDWARE, Layout("sharded", shard_size=4), 8)
    assert found.num_micro_batches == 2
    per_micro_batch = 3 / 4 * (64 + 32)
    once = 2 * 7 / 8 * 4 + 2 * 1 / 2 * 64 / 4
    assert found.wire_bytes == pytest.approx(2 * per_micro_batch + once)


def test_ranks_that_are_no_whole_shard_groups_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="6 ranks are no whole groups of 4"):
        estimate(some_facts(), HARDWARE, Layout("sharded", shard_size=4), 6)


def test_gathers_hide_behind_the_arithmetic_and_sums_into_shards_do_not() -> None:
    facts = some_facts(micro_batch=1, own=Sizes(), tasks_per_step=8)
    found = estimate(facts, HARDWARE, SHARDED, 8)
    scatter_s = 7 / 8 * 32 / 80
    assert found.step_s == pytest.approx(found.compute_s + scatter_s)
    slow = dataclasses.replace(DEVICE, node_bandwidth=0.8)
    waiting = estimate(facts, dataclasses.replace(HARDWARE, device=slow), SHARDED, 8)
    gather_s, pass_s = 7 / 8 * 64 / 0.8, (400 / 50 + 1 / 25)
    assert waiting.step_s == pytest.approx(waiting.compute_s + gather_s - pass_s + 100 * scatter_s)


def test_time_is_arithmetic_and_traffic_and_the_hosts_own_beside_them_on_a_gpu() -> None:
    facts = some_facts(tasks_per_step=1, update=Amounts())
    both = 400 / 50 + 1 / 25
    host = dataclasses.replace(DEVICE, operation_s=1.0)
    for device, expected in (
        (DEVICE, both),
        (host, both + 28.0),
        (dataclasses.replace(host, is_asynchronous=True), 28.0),
    ):
        found = estimate(facts, dataclasses.replace(HARDWARE, device=device), REPLICATED, 1)
        assert found.compute_s == pytest.approx(expected)


def test_binomial_snapshots_take_memory_for_slots_and_time_for_steps_computed_again() -> None:
    every = estimate(some_facts(tasks_per_step=1, update=Amounts()), HARDWARE, REPLICATED, 1)
    facts = some_facts(tasks_per_step=1, update=Amounts(), snapshots="binomial", num_slots=1)
    found = estimate(facts, HARDWARE, REPLICATED, 1)
    assert every.memory.states - found.memory.states == 3 * 5
    assert every.memory.total - found.memory.total == pytest.approx(3 * 5)
    again = num_advances(4, 1) - 4
    assert found.compute_s - every.compute_s == pytest.approx(again * 1000 / 50)


def test_in_shards_steps_that_are_computed_again_gather_again() -> None:
    again = sampled(((1,), (1,), (1,), (2, 64)), lambda _: Amounts(flops=1000.0, gathered_bytes=16.0))
    facts = some_facts(micro_batch=1, snapshots="binomial", num_slots=1, advance_in_shards=again)
    every, found = (
        estimate(each, HARDWARE, SHARDED, 8) for each in (dataclasses.replace(facts, snapshots="all"), facts)
    )
    num_again = num_advances(4, 1) - 4
    assert found.wire_bytes - every.wire_bytes == pytest.approx(2 * num_again * 7 / 8 * 16)
    assert found.compute_s - every.compute_s == pytest.approx(2 * num_again * 1000 / 50)


def test_snapshots_on_the_host_leave_two_on_the_device() -> None:
    facts = some_facts(tasks_per_step=1, update=Amounts(), snapshots="host")
    found = estimate(facts, HARDWARE, REPLICATED, 1)
    assert found.memory.states == 2 * 5
    assert found.host_bytes == 4 * 5


@pytest.mark.parametrize("num_steps", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 9])
def test_the_closed_form_counts_the_steps_that_binomial_snapshots_compute(
    num_steps: int, num_slots: int
) -> None:
    computed = 0

    def advance(at: Snapshot, step: int) -> Snapshot:
        nonlocal computed
        computed += 1
        return at

    plan = Binomial(num_slots)
    states: Iterator[Snapshot] = plan.backwards(Snapshot({"w": torch.zeros(1)}, {}), num_steps, advance)
    assert len(list(states)) == num_steps + 1
    assert num_advances(num_steps, num_slots) == computed


def test_auto_keeps_as_many_graphs_as_fit_into_its_limit() -> None:
    def graph(point: Point) -> Amounts:
        return dataclasses.replace(amounts_at(point), peak_bytes=100.0 * point.steps, flops=10.0)

    sweep = some_facts().ways[0]
    whole = Way("loop", "unrolled", False, sampled(((1,), (2, 3), (1,), (1,)), graph))
    facts = some_facts(ways=(sweep, whole), tasks_per_step=1, graph_limit_bytes=320.0)
    found = estimate(facts, HARDWARE, REPLICATED, 1)
    assert found.way == "rematerialized, loop, graph of the last 2 steps"
    flops = (0.5 * 400 + 0.5 * 10) / 50
    assert found.compute_s == pytest.approx(flops + 1 / 25 + 10 / 25)
    unlimited = dataclasses.replace(facts, graph_limit_bytes=1e9)
    assert "graph of the last 4" in estimate(unlimited, HARDWARE, REPLICATED, 1).way
    none = dataclasses.replace(facts, graph_limit_bytes=1.0)
    assert estimate(none, HARDWARE, REPLICATED, 1).way == "rematerialized, loop"


def test_auto_chooses_how_tasks_are_put_side_by_side_before_it_chooses_an_estimator() -> None:
    def taking(flops: float) -> Samples:
        return sampled(((1,), (2, 3), (1,), (1,)), lambda point: Amounts(flops=flops, peak_bytes=point.steps))

    # By itself the graph under vmap would be the fastest of all.
    flops = {"rematerialized, loop": 10.0, "unrolled, loop": 8.0, "rematerialized, vmap": 12.0}
    flops |= {"unrolled, vmap": 1.0}
    ways = {
        (tasks, kind): Way(tasks, kind, kind == "rematerialized", taking(flops[f"{kind}, {tasks}"]))
        for tasks in TASKS
        for kind in ("rematerialized", "unrolled")
    }
    trials = tuple(ways[tasks, "rematerialized"] for tasks in TASKS)
    facts = some_facts(
        ways=tuple(ways.values()), trials=trials, tasks_per_step=1, graph_limit_bytes=1e9, state_bytes=0.0
    )
    assert estimate(facts, HARDWARE, REPLICATED, 1).way == "rematerialized, loop, graph of the last 4 steps"
    without = dataclasses.replace(facts, trials=())
    assert (
        estimate(without, HARDWARE, REPLICATED, 1).compute_s
        < estimate(facts, HARDWARE, REPLICATED, 1).compute_s
    )


def test_pretraining_counts_where_it_takes_more() -> None:
    def training(point: Point) -> Amounts:
        return Amounts(peak_bytes=400.0 + 10.0 * point.tasks)

    pretrain = sampled(((1, 8), (1,), (1,), (1,)), training)
    facts = some_facts(pretrain=pretrain, pretrain_batch=32, tasks_per_step=1)
    found = estimate(facts, HARDWARE, REPLICATED, 4)
    assert found.peak_in == "pre-training"
    assert found.memory.total == pytest.approx(100 + 400 + 80)


def test_ranks_without_tasks_are_counted_and_make_a_step_no_faster() -> None:
    full, idle = (estimate(some_facts(), HARDWARE, REPLICATED, number) for number in (16, 64))
    assert (full.num_idle_ranks, idle.num_idle_ranks) == (0, 48)
    assert idle.step_s >= full.step_s


def test_weights_in_shards_that_were_not_counted_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="not counted with its backbone in shards"):
        estimate(some_facts(ways_in_shards=()), HARDWARE, SHARDED, 2)


# ---------------------------------------------------------------- hardware and requests


def test_a_ring_is_as_fast_as_its_slowest_part() -> None:
    hardware = Hardware(DEVICES["h100"], LINKS["ndr"], devices_per_node=8, link_efficiency=1.0)
    assert hardware.bandwidth_among(8) == pytest.approx(0.8 * 450e9)
    assert hardware.bandwidth_among(9) == 50e9
    ethernet = dataclasses.replace(hardware, link=LINKS["100gbe"])
    assert ethernet.bandwidth_among(16) == pytest.approx(12.5e9 / 8)


def test_every_device_has_a_rate_for_every_format_and_a_larger_one_for_halves() -> None:
    for device in DEVICES.values():
        assert device.flops_per_s.keys() == {"float64", "float32", "bfloat16", "float16"}
        assert device.flops_per_s["bfloat16"] > device.flops_per_s["float32"] >= device.flops_per_s["float64"]
        assert math.isclose(device.memory_bytes % 1e9, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", (8,)),
        ("1,3,64", (1, 3, 64)),
        ("1-1024", tuple(2**power for power in range(11))),
        ("3-20", (3, 4, 8, 16, 20)),
        ("5, 1-2", (1, 2, 5)),
    ],
)
def test_ranks_are_numbers_or_the_powers_of_two_of_a_range(text: str, expected: tuple[int, ...]) -> None:
    assert ranks_in(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "--ranks: 0; a plan is for 1 to 1024 ranks"),
        ("-4", "--ranks: -4; a plan is for 1 to 1024 ranks"),
        ("1-2000", "--ranks: 2000; a plan is for 1 to 1024 ranks"),
        ("8-2", "--ranks: '8-2' falls; give the smaller number first"),
        ("many", "--ranks: 'many' is no number of ranks; give one"),
        ("", "--ranks: '' is no number of ranks"),
    ],
)
def test_what_is_no_number_of_ranks_is_told(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ranks_in(text)


def test_unknown_hardware_is_told_with_what_was_probably_meant() -> None:
    with pytest.raises(RecipeError, match=r"'h10' is not one of .*, here; did you mean 'h100'"):
        device_named("h10")
    with pytest.raises(RecipeError, match="'token ring' is not one of hdr, ndr, 100gbe; choose one of them"):
        link_named("token ring")
    with pytest.raises(RecipeError, match="--gpus-per-node: 0; a node has at least 1"):
        checked(Request("h100", "ndr", (1,), 0, compare=False, as_json=False))
    with pytest.raises(RecipeError, match="leave it out for the recipe's processes of one machine"):
        checked(Request("here", "ndr", (1,), 0, compare=False, as_json=False))
