"""What is counted on tensors without data, against the same run on real ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metaloom import choosing
from metaloom.build import (
    Choices,
    build_maml,
    build_model,
    outer_settings,
)
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.kernels.linear import product_flops
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Event, ShardedWeights, ShardGroup, rows_in
from metaloom.errors import CapabilityError
from metaloom.planning import counting, sample
from metaloom.planning.counting import count
from metaloom.planning.estimate import num_advances
from metaloom.planning.facts import Amounts, Point, Samples, Way
from metaloom.recipe import Recipe, recipe_from_dict
from metaloom.recipe.schema import maml_of
from metaloom.weights import HeldModel

CPU = torch.device("cpu")
NUM_TASKS, NUM_STEPS, NUM_BLOCKS = 2, 2, 2
KINDS = ("gather", "scatter")


def recipe(*, full: bool = False, num_steps: int = NUM_STEPS, **changes: Any) -> Recipe:
    """A transformer with LoRA inside, or a convolutional network with all weights inside."""
    values: dict[str, Any] = {
        "name": "counted",
        "model": {"kind": "gpt", "num_layers": NUM_BLOCKS, "width": 32, "num_heads": 2, "context_length": 32},
        "data": {"kind": "documents", "url": "none", "num_support": 4, "num_query": 2, "sequence_length": 32},
        "adaptation": {
            "fast": {"kind": "lora", "rank": 2, "alpha": 2.0},
            "rule": {"kind": "sgd", "lr": 0.1},
            "num_steps": num_steps,
        },
        "algorithm": {"hypergradient": "rematerialized"},
        "outer": {"num_steps": 10, "tasks_per_step": 4},
    }
    if full:
        values["model"] = {"kind": "conv4", "width": 8, "num_blocks": 3}
        values["data"] = {"kind": "classes", "url": "none", "n_way": 3, "n_shot": 1, "n_query": 2}
        values["adaptation"]["fast"] = {"kind": "full", "tasks": "loop"}
    return recipe_from_dict(values | changes, source="test")


def algorithm(kind: str, **changes: Any) -> dict[str, Any]:
    return {"hypergradient": {"kind": kind}, **changes}


RECIPES = {
    "lora, rematerialized": recipe(),
    "lora, mixed_mode, backbone learned": recipe(
        algorithm=algorithm("mixed_mode", meta_parameters={"init": True, "backbone": True})
    ),
    "lora, unrolled, multi-step loss": recipe(algorithm=algorithm("unrolled", step_weights="uniform")),
    "lora, blocks recomputed, head in chunks": recipe(memory={"recompute_blocks": True, "head_chunk": 32}),
    "lora, first_order, bfloat16": recipe(
        algorithm=algorithm("first_order"), precision={"compute": "bfloat16"}
    ),
    "full, unrolled": recipe(full=True, algorithm=algorithm("unrolled")),
    "full, implicit": recipe(
        full=True,
        # Of conjugate gradients all iterations are counted, also those that a task is not in need of.
        algorithm={
            "hypergradient": {"kind": "implicit", "solver": {"kind": "neumann", "num_terms": 3}},
        },
        adaptation={
            "fast": {"kind": "full", "tasks": "loop"},
            "rule": {"kind": "sgd", "lr": 0.1, "proximal": 0.1},
            "num_steps": NUM_STEPS,
        },
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_counted_without_data_is_what_a_real_hypergradient_allocates_and_computes(case: str) -> None:
    counted = counting._step_amounts(RECIPES[case], Choices(), Point(NUM_TASKS, NUM_STEPS, NUM_BLOCKS))
    differentiate = real_hypergradient(RECIPES[case])
    differentiate()
    with FlopCounter() as counter:
        differentiate()
    assert counted.flops == counter.total
    # Kernels also allocate for themselves, how much is up to the processor, and numbers shorter than torch's
    # alignment are rounded up.
    assert counted.peak_bytes == pytest.approx(peak_allocated(differentiate), rel=0.12)


@pytest.mark.slow
def test_a_recipe_larger_than_what_is_counted_follows_linearly() -> None:
    deep = recipe(
        num_steps=5,
        model={"kind": "gpt", "num_layers": 5, "width": 16, "num_heads": 2, "context_length": 32},
        outer={"num_steps": 10, "tasks_per_step": 4, "micro_batch": 2},
    )
    way = count(deep, with_shards=False, on_gpu=False).ways[0]
    assert {(point.steps, point.blocks) for point in way.amounts.corners} == {(2, 2), (2, 3), (3, 2), (3, 3)}
    point = Point(2, 5, 5)
    direct = counting._step_amounts(deep, Choices(), point)
    followed = way.amounts.at(point)
    assert followed.flops == pytest.approx(direct.flops, rel=1e-6)
    # Tasks and blocks side by side do not all reach their peak at once.
    assert followed.peak_bytes == pytest.approx(direct.peak_bytes, rel=0.02)
    assert followed.moved_bytes == pytest.approx(direct.moved_bytes, rel=0.01)
    assert followed.num_operations == pytest.approx(direct.num_operations, rel=0.01)


def test_layers_of_single_blocks_are_counted_at_the_models_full_depth() -> None:
    def deep(*targets: str) -> Recipe:
        return recipe(
            num_steps=1,
            model={"kind": "gpt", "num_layers": 5, "width": 16, "num_heads": 2, "context_length": 32},
            adaptation={
                "fast": {"kind": "lora", "rank": 2, "targets": list(targets)},
                "rule": {"kind": "sgd", "lr": 0.1},
                "num_steps": 1,
            },
            outer={"num_steps": 10, "tasks_per_step": 1},
        )

    assert counting._block_sizes(deep("qkv", "head")) == (2, 3)
    assert counting._block_sizes(deep("blocks.4.attention.qkv")) == (5,)
    assert counting._block_sizes(deep("qkv", "1.mlp.fc_in")) == (5,)
    facts = count(deep("blocks.4.attention.qkv"), with_shards=False, on_gpu=False)
    assert facts.state_bytes == 4 * 2 * (16 + 3 * 16)  # one layer of 16 inputs and 48 outputs


# As docs/scaling.md has it.
@pytest.mark.parametrize(("estimator", "of_pull_back"), [("rematerialized", 4), ("mixed_mode", 2)])
def test_what_crosses_between_shards_is_what_a_real_shard_group_is_told(
    estimator: str, of_pull_back: int
) -> None:
    learned = recipe(
        memory={"recompute_blocks": True},
        algorithm=algorithm(estimator, meta_parameters={"init": True, "backbone": True}),
    )
    events: list[Event] = []
    group = ShardGroup(on_event=events.append)
    real_hypergradient(learned, group)()
    gathered, scattered = (
        sum(4 * event.num_elements for event in events if event.kind == kind) for kind in KINDS
    )
    counted = counting._step_amounts(learned, Choices(), Point(NUM_TASKS, NUM_STEPS, NUM_BLOCKS, 2))
    # Rows are filled up to a multiple of the ranks: here none are missing.
    assert counted.gathered_bytes == gathered
    assert counted.scattered_bytes == scattered
    assert counted.num_collectives == sum(event.kind in KINDS for event in events)
    weights = dict(build_model(learned, CPU, Replicated()).module.named_parameters())
    of_blocks = sum(value.numel() for name, value in weights.items() if name.startswith("blocks."))
    sizes = {kind: Counter(event.num_elements for event in events if event.kind == kind) for kind in KINDS}
    assert sizes["gather"][of_blocks // NUM_BLOCKS] == ((2 + of_pull_back) * NUM_STEPS + 2) * NUM_BLOCKS
    assert sizes["scatter"][of_blocks // NUM_BLOCKS] == (2 * NUM_STEPS + 1) * NUM_BLOCKS


def test_steps_that_binomial_snapshots_compute_again_gather_again_as_a_real_shard_group_is_told() -> None:
    num_steps, num_slots = 3, 1
    sparing = recipe(
        num_steps=num_steps,
        memory={"recompute_blocks": True, "snapshots": {"kind": "binomial", "num_slots": num_slots}},
    )
    events: list[Event] = []
    real_hypergradient(sparing, ShardGroup(on_event=events.append))()
    gathered = sum(4 * event.num_elements for event in events if event.kind == "gather")
    step = counting._step_amounts(sparing, Choices(), Point(1, num_steps, NUM_BLOCKS, 2))
    again = counting._advance_amounts(sparing, Point(1, 1, NUM_BLOCKS, 2))
    num_again = num_advances(num_steps, num_slots) - num_steps
    assert num_again == 1
    assert gathered == step.gathered_bytes + num_again * again.gathered_bytes


def test_the_task_that_rates_are_scaled_by_computes_what_was_counted_for_it() -> None:
    sparing = recipe(num_steps=3, memory={"snapshots": {"kind": "binomial", "num_slots": 1}})
    amounts = counting._step_amounts(sparing, Choices(), Point(1, 3, NUM_BLOCKS))
    way = Way("loop", "rematerialized", True, Samples({Point(1, 3, NUM_BLOCKS): amounts}))
    with FlopCounter() as counter:
        sample.seconds_of_a_task(sparing, way, CPU)
    assert counter.total == (1 + sample.NUM_REPEATS) * amounts.flops


def test_what_is_held_is_every_copy_of_the_meta_parameters() -> None:
    learned = recipe(
        algorithm=algorithm("rematerialized", meta_parameters={"init": True, "backbone": True}),
        outer={"num_steps": 10, "tasks_per_step": 4, "ema": 0.9},
    )
    facts = count(learned, with_shards=False, on_gpu=False)
    width, tokens = 32, 256 + 32
    backbone = 4 * (NUM_BLOCKS * (12 * width**2 + 13 * width) + tokens * width + 2 * width)
    own = 4 * NUM_BLOCKS * 16 * width * 2
    assert facts.num_parameters * 4 == backbone
    # Learned weights are held once; where LoRA starts, the adapter has a copy of its own.
    for sizes, weights, kept in ((facts.backbone, 0, backbone), (facts.own, own, own)):
        assert (sizes.weights, sizes.learned, sizes.average, sizes.gradients) == (weights, kept, kept, kept)
        # Two moments, and a count of steps for each tensor.
        assert sizes.optimizer == pytest.approx(2 * kept, rel=0.01)
    assert facts.state_bytes == own


def test_auto_has_all_exact_ways_and_a_choice_between_loop_and_vmap_its_trials() -> None:
    auto = recipe(
        full=True,
        algorithm=algorithm("auto"),
        adaptation={"fast": "full", "rule": {"kind": "sgd", "lr": 0.1}, "num_steps": 1},
        outer={"num_steps": 10, "tasks_per_step": 4, "micro_batch": 1},
    )
    facts = count(auto, with_shards=False, on_gpu=False)
    estimators = ("rematerialized", "mixed_mode", "unrolled")
    assert [way.name for way in facts.ways] == [
        f"{estimator}, {tasks}" for tasks in ("loop", "vmap") for estimator in estimators
    ]
    assert [way.keeps_states for way in facts.ways] == [True, True, False] * 2
    assert [trial.name for trial in facts.trials] == ["rematerialized, loop", "rematerialized, vmap"]


def test_trials_take_as_many_steps_as_a_runs_and_tasks_that_share_weights_are_in_no_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[tuple[str, int]] = []

    def note(of: Recipe, choices: Choices, point: Point) -> Amounts:
        counted.append((choices.tasks, point.steps))
        return Amounts()

    monkeypatch.setattr(counting, "_step_amounts", note)
    chosen = recipe(
        full=True, adaptation={"fast": "full", "rule": {"kind": "sgd", "lr": 0.1}, "num_steps": 5}
    )
    axes = ((1,), (2, 3), (3,), (1,))
    counting._trials(chosen, axes)
    assert counted == [("loop", choosing.TIMED_STEPS), ("vmap", choosing.TIMED_STEPS)]
    assert [way.name for way in counting._ways(recipe(), axes)] == ["rematerialized"]


def test_an_estimator_that_the_model_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Amounts:
        raise CapabilityError("the model has no such derivative")

    monkeypatch.setattr(counting, "_step_amounts", refuse)
    with pytest.raises(CapabilityError, match="no such derivative"):
        count(recipe(), with_shards=False, on_gpu=False)


def test_what_only_a_loop_over_tasks_can_do_is_counted_without_vmap_where_a_run_may_choose() -> None:
    chosen = recipe(
        full=True,
        adaptation={"fast": "full", "rule": {"kind": "sgd", "lr": 0.1}, "num_steps": 1},
        memory={"head_chunk": 64},
        outer={"num_steps": 10, "tasks_per_step": 4, "micro_batch": 1},
    )
    facts = count(chosen, with_shards=False, on_gpu=False)
    assert [way.tasks for way in facts.ways] == ["loop"]
    assert [trial.tasks for trial in facts.trials] == ["loop"]


def test_a_choice_of_which_nothing_is_possible_is_refused_with_every_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons = iter(("one", "two", "three"))

    def refuse(*_: object) -> Amounts:
        raise NotImplementedError(next(reasons))

    monkeypatch.setattr(counting, "_step_amounts", refuse)
    with pytest.raises(CapabilityError, match="rematerialized: one; mixed_mode: two; unrolled: three"):
        count(recipe(algorithm=algorithm("auto")), with_shards=False, on_gpu=False)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The arithmetic of what runs inside, by torch's own counts, and by hand for what it does not know:
    products by oneDNN, and the CPU's fused attention, two products forwards and five backwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = str(packet)
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        elif packet in product_flops():
            self.total += 2 * args[0].numel() * args[1].shape[0]
        elif name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
            query, key = args[1:3] if "backward" in name else args[:2]
            self.total += (5 if "backward" in name else 2) * 2 * query.numel() * key.shape[-2]
        return output


def real_hypergradient(of: Recipe, group: ShardGroup | None = None) -> Any:
    """A function that makes one hypergradient on real tensors and adds it to a sum."""
    held = build_model(of, CPU, Replicated())
    if group is not None:
        held = HeldModel(held.module, ShardedWeights(held.module, group, rows_in(held.module)))
    built = build_maml(of, maml_of(of), held, Choices(), CPU)
    sharding = Replicated()
    outer = OuterOptimizer(built.meta_parameters(), outer_settings(of), sharding)
    combiner = Mean(outer.meta, sharding, metric_names=built.metric_names)
    scales = LossScaler(Precision(of.precision.compute)).scales

    def differentiate() -> None:
        batch = counting.batch_like(of, NUM_TASKS, NUM_STEPS)
        combiner.add(built.meta_gradient(outer.meta, batch, scales))

    return differentiate


def peak_allocated(run: Any) -> int:
    """The most bytes above those at its start that a run holds, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler
    assert results is not None
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_the_first_outer_steps_without_second_derivatives_are_not_what_is_planned() -> None:
    plain, cheap = (
        count(
            recipe(full=True, algorithm=algorithm("rematerialized", first_order_steps=steps)),
            with_shards=False,
            on_gpu=False,
        )
        for steps in (0, 3)
    )
    assert cheap.ways == plain.ways


@pytest.mark.slow
def test_steps_are_added_of_what_adapts_in_them() -> None:
    adaptation = {
        "fast": {"kind": "full", "tasks": "loop"},
        "rule": {"kind": "sgd", "lr": 0.1},
        "num_steps": 12,
        "head": {"first_steps": 3},
    }
    (way,) = count(recipe(full=True, adaptation=adaptation), with_shards=False, on_gpu=False).ways
    assert {point.steps for point in way.amounts.corners} == {5, 6}


def test_what_is_drawn_counts_with_its_deviations() -> None:
    plain, drawn = (
        count(recipe(full=True, regularisation=regularisation), with_shards=False, on_gpu=False)
        for regularisation in (None, {"kind": "weights", "kinds": ["init"]})
    )
    assert drawn.own.learned == 2 * plain.own.learned
