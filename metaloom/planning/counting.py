"""A recipe's real outer step, run on tensors without data: `Facts`.

Nothing here knows an architecture or an estimator: the recipe's own model, adapter, estimator and outer
optimizer run, at a few small sizes, and what they do is counted. From those sizes to the recipe's it goes on
linearly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from metaloom.build import (
    Choices,
    Tasks,
    build_maml,
    build_model,
    model_structure,
    ordinary_settings,
    outer_settings,
    task_output,
)
from metaloom.build.regularisation import regularised
from metaloom.choosing import FREE_SHARE, TIMED_STEPS
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.choice import EXACT_AND_FLAT, EstimatorChoice, why_none
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.combiners.per_task import selected
from metaloom.engine.hypergradients.base import prefixed, unprefixed
from metaloom.engine.kernels.attention import CHUNK_GPU, chunks_of
from metaloom.engine.learner import TaskBatch
from metaloom.engine.ordinary import ordinary_gradient
from metaloom.engine.outer import OuterOptimizer, OuterSettings, parameter_of
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import ShardedWeights, ShardGroup
from metaloom.engine.step import StepTasks, outer_step
from metaloom.engine.unroll import advance, first_snapshot
from metaloom.errors import CapabilityError
from metaloom.planning.facts import Amounts, Facts, Point, Samples, Sizes, Way, name_of_way, sampled
from metaloom.planning.tracing import Trace, traced
from metaloom.recipe import (
    AllSnapshots,
    AutoHypergradient,
    BinomialSnapshots,
    Conv4Model,
    CustomModel,
    GPTModel,
    HuggingFaceModel,
    LoRAFast,
    MLPModel,
    PartFast,
    Pretrain,
    Recipe,
    RematerializedHypergradient,
    SingleLayerModel,
    TextInputs,
    TruncatedHypergradient,
    WholeFast,
    shares_passes,
)
from metaloom.recipe.rules.model import GPT_BLOCK_LAYERS
from metaloom.recipe.schema import maml_of
from metaloom.recipe.tasks import (
    InputSection,
    ObjectiveName,
    num_rehearsed,
    num_rehearsed_outside,
    rehearsal_facts,
    shape_of,
    task_facts,
)
from metaloom.weights import HeldModel, materialize

CPU, META = torch.device("cpu"), torch.device("meta")
GRAPH = "unrolled"
# Beyond these, amounts go on linearly from smaller problems.
MOST_STEPS, MOST_BLOCKS, MOST_FULL_TASKS = 4, 4, 4
SHARD_SIZES = (2, 64)

# What a run that measures several ways passes over.
IMPOSSIBLE = (CapabilityError, NotImplementedError, RuntimeError)

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Counted = TypeVar("Counted")


def count(recipe: Recipe, *, with_shards: bool, on_gpu: bool) -> Facts:
    """The recipe's facts. Takes seconds to minutes on one core, and little memory, whatever the model's size.

    Args:
        with_shards: whether to count the backbone in shards too, where it can be.
        on_gpu: whether kernels take as much at a time as on a GPU.

    Raises:
        CapabilityError: the recipe's estimator cannot be computed on its model.
    """
    with chunks_of(CHUNK_GPU if on_gpu else None):
        return _counted(recipe, with_shards=with_shards)


def _counted(recipe: Recipe, *, with_shards: bool) -> Facts:
    fast, estimator, snapshots = (
        recipe.adaptation.fast,
        maml_of(recipe).hypergradient,
        recipe.memory.snapshots,
    )
    tasks, steps, blocks, _ = axes = (_task_sizes(recipe), _step_sizes(recipe), _block_sizes(recipe), (1,))
    ways = tuple(_ways(recipe, axes))
    held = _held(recipe, ways[0].tasks or "loop")
    in_shards: tuple[Way, ...] = ()
    again: Samples | None = None
    again_in_shards: Samples | None = None
    is_again = isinstance(snapshots, BinomialSnapshots)
    if is_again:
        again = sampled((tasks, (1,), blocks, (1,)), functools.partial(_advance_amounts, recipe))
    if with_shards and shares_passes(fast):
        recomputed = _with_blocks_recomputed(recipe)
        in_shards = tuple(_ways(recomputed, (tasks, steps, blocks, SHARD_SIZES)))
        if is_again:
            counted = functools.partial(_advance_amounts, recomputed)
            again_in_shards = sampled((tasks, (1,), blocks, SHARD_SIZES), counted)
    limit = estimator.limit_gib if isinstance(estimator, AutoHypergradient) else None
    one = batch_like(recipe, 1, recipe.adaptation.num_steps)
    return Facts(
        tasks_per_step=recipe.outer.tasks_per_step,
        micro_batch=recipe.outer.side_by_side,
        num_steps=recipe.adaptation.num_steps,
        num_swept=_num_swept(recipe),
        num_blocks=_num_blocks(recipe),
        num_parameters=held.num_parameters,
        snapshots=snapshots.kind,
        num_slots=snapshots.num_slots if isinstance(snapshots, BinomialSnapshots) else 0,
        compute=recipe.precision.compute,
        backbone=held.backbone,
        own=held.own,
        update=held.update,
        state_bytes=held.state_bytes,
        data_bytes=_bytes_of(one.support)
        + _bytes_of(one.query)
        + _bytes_of(one.rehearsal or {})
        + _bytes_of(one.outer_rehearsal or {}),
        ways=ways,
        trials=tuple(_trials(recipe, axes)),
        advance=again,
        graph_limit_bytes=None if limit is None else limit * 2.0**30,
        graph_share=FREE_SHARE,
        pretrain=None if recipe.pretrain is None else _pretraining(recipe, recipe.pretrain),
        pretrain_batch=0 if recipe.pretrain is None else recipe.pretrain.batch_size,
        ways_in_shards=in_shards,
        advance_in_shards=again_in_shards,
        stored_bytes=sum(held.stored.values()),
        takes_turns=any(name.startswith(BACKBONE) for name in held.stored),
    )


# ---------------------------------------------------------------- at which sizes


def _task_sizes(recipe: Recipe) -> tuple[int, ...]:
    most = min(recipe.outer.tasks_per_step, recipe.outer.side_by_side or recipe.outer.tasks_per_step)
    if not shares_passes(recipe.adaptation.fast):
        most = min(most, MOST_FULL_TASKS)
    return (1,) if most == 1 else (1, most)


def _step_sizes(recipe: Recipe) -> tuple[int, ...]:
    num_steps, estimator = recipe.adaptation.num_steps, maml_of(recipe).hypergradient
    # Truncation passes over the earlier steps: they are what grows with K.
    fewest = estimator.num_steps if isinstance(estimator, TruncatedHypergradient) else 2
    # Steps of the head alone cost less than those that are gone on with.
    fewest = max(fewest, recipe.adaptation.head.first_steps + 2)
    return (num_steps,) if num_steps <= max(MOST_STEPS, fewest) else (fewest, fewest + 1)


def _num_swept(recipe: Recipe) -> int:
    num_steps, estimator = recipe.adaptation.num_steps, maml_of(recipe).hypergradient
    if isinstance(estimator, TruncatedHypergradient) and maml_of(recipe).step_weights == "last":
        return min(num_steps, estimator.num_steps)
    return num_steps


def _block_sizes(recipe: Recipe) -> tuple[int, ...]:
    num_blocks = _num_blocks(recipe)
    # The built-in convolutions halve the image: their blocks differ. Those of a transformer do not.
    is_uniform = isinstance(recipe.model, GPTModel) and _are_adapted_alike(recipe)
    return (2, 3) if is_uniform and num_blocks > MOST_BLOCKS else (num_blocks,)


def _are_adapted_alike(recipe: Recipe) -> bool:
    """Whether the same layers of every block are adapted; `blocks.5.attention.qkv` names one of a single
    block."""
    fast = recipe.adaptation.fast
    if isinstance(fast, PartFast):
        return not any(character.isdigit() for pattern in fast.parameters for character in pattern)
    if not isinstance(fast, LoRAFast) or fast.targets == "all-linear":
        return True
    adapted = {
        tuple(
            any(f".blocks.{block}.{layer}".endswith(f".{target}") for target in fast.targets)
            for layer in GPT_BLOCK_LAYERS
        )
        for block in range(_num_blocks(recipe))
    }
    return len(adapted) == 1


def _num_blocks(recipe: Recipe) -> int:
    match recipe.model:
        case Conv4Model(num_blocks=num_blocks):
            return num_blocks
        case GPTModel(num_layers=num_layers) | MLPModel(num_layers=num_layers):
            return num_layers
        case HuggingFaceModel():
            return recipe.model.num_layers or 0
        case SingleLayerModel() | CustomModel():
            return 0  # it is counted as it is


def _with_blocks(recipe: Recipe, num_blocks: int) -> Recipe:
    if not isinstance(recipe.model, GPTModel):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"num_layers": num_blocks})})


def _with_steps(recipe: Recipe, num_steps: int) -> Recipe:
    adaptation = recipe.adaptation.model_copy(update={"num_steps": num_steps})
    return recipe.model_copy(update={"adaptation": adaptation})


def with_every_state(recipe: Recipe) -> Recipe:
    """The recipe as amounts are counted: no state is computed again."""
    memory = recipe.memory.model_copy(update={"snapshots": AllSnapshots()})
    return recipe.model_copy(update={"memory": memory})


def _with_blocks_recomputed(recipe: Recipe) -> Recipe:
    memory = recipe.memory.model_copy(update={"recompute_blocks": True})
    return recipe.model_copy(update={"memory": memory})


# ---------------------------------------------------------------- what is counted


def _ways(recipe: Recipe, axes: Axes) -> list[Way]:
    """The ways that a run of the recipe may compute its hypergradient by."""
    estimator = maml_of(recipe).hypergradient
    choices = [Choices(tasks) for tasks in _tasks(recipe)]
    if isinstance(estimator, AutoHypergradient):
        kinds = [EstimatorChoice(kind, 0) for kind in EXACT_AND_FLAT]
        kinds.append(EstimatorChoice("rematerialized", max(axes[1])))  # the graph of all steps
        choices = [Choices(tasks, kind) for tasks in _tasks(recipe) for kind in kinds]
    counts: dict[str, Callable[[], Way]] = {}
    for choice in choices:
        name: str = estimator.kind
        if choice.estimator is not None:
            name = GRAPH if choice.estimator.num_graph_steps > 0 else choice.estimator.kind
        in_words = name_of_way(name, _tasks_of(recipe, choice))
        counts[in_words] = functools.partial(_way, recipe, axes, choice, name)
    return _possible(counts)


def _way(recipe: Recipe, axes: Axes, choice: Choices, name: str) -> Way:
    amounts = sampled(axes, functools.partial(_step_amounts, recipe, choice))
    return Way(_tasks_of(recipe, choice), name, keeps_states=name in KEEPING_STATES, amounts=amounts)


def _tasks_of(recipe: Recipe, choice: Choices) -> Tasks | None:
    return choice.tasks if isinstance(recipe.adaptation.fast, WholeFast) else None


def _possible(counts: Mapping[str, Callable[[], Counted]]) -> list[Counted]:
    """What can be counted: a run that measures several ways passes over those that raise, too.

    Raises:
        CapabilityError: none of several can be; of a single one, its own error.
    """
    found: list[Counted] = []
    failures: dict[str, str] = {}
    for name, counted in counts.items():
        try:
            found.append(counted())
        except IMPOSSIBLE as error:
            if len(counts) == 1:
                raise
            failures[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if counts and not found:
        raise CapabilityError(why_none(failures))
    return found


# The estimators that keep (phi_k, s_k) of every inner step.
KEEPING_STATES = ("rematerialized", "mixed_mode", "first_order", "truncated")


def _trials(recipe: Recipe, axes: Axes) -> list[Way]:
    """What a run tries before it chooses how tasks are put side by side."""
    if len(_tasks(recipe)) == 1:
        return []
    algorithm = maml_of(recipe).model_copy(update={"hypergradient": RematerializedHypergradient()})
    tried = recipe.model_copy(update={"algorithm": algorithm})
    steps = (min(recipe.adaptation.num_steps, TIMED_STEPS),)
    of_trial = (axes[0], steps, axes[2], (1,))
    counts: dict[str, Callable[[], Way]] = {
        tasks: functools.partial(_way, tried, of_trial, Choices(tasks), "rematerialized")
        for tasks in _tasks(recipe)
    }
    return _possible(counts)


def _tasks(recipe: Recipe) -> tuple[Tasks, ...]:
    return recipe.task_ways


def _step_amounts(recipe: Recipe, choices: Choices, point: Point) -> Amounts:
    """Of the hypergradient of one micro-batch."""
    recipe = _with_steps(_with_blocks(recipe, point.blocks), point.steps)
    with _assembled(recipe, choices, point.shards) as (trace, parts):
        held = trace.live_bytes
        trace.restart()
        parts.differentiate(batch_like(recipe, point.tasks, point.steps))
        return _amounts(trace, held, parts.group)


def _advance_amounts(recipe: Recipe, point: Point) -> Amounts:
    """Of one inner step without a graph."""
    recipe = _with_blocks(recipe, point.blocks)
    choices = Choices(_tasks(recipe)[0], EstimatorChoice("rematerialized", 0))
    with _assembled(recipe, choices, point.shards) as (trace, parts):
        unroll, meta = parts.algorithm.unroll, parts.outer.meta
        batch = batch_like(recipe, point.tasks, recipe.adaptation.num_steps)
        start = first_snapshot(unroll, meta, point.tasks)
        held = trace.live_bytes
        trace.restart()
        advance(unroll, meta, batch, start, 0)
        return _amounts(trace, held, parts.group)


@dataclasses.dataclass(frozen=True)
class _Held:
    num_parameters: int
    backbone: Sizes
    own: Sizes
    update: Amounts
    state_bytes: int
    stored: Mapping[str, int]


def _held(recipe: Recipe, tasks: Tasks) -> _Held:
    """What a rank holds between hypergradients, and what an update takes, at full size."""
    with _assembled(recipe, Choices(tasks, EstimatorChoice("rematerialized", 0))) as (trace, parts):
        parts.update()  # makes the optimizer's states
        held = trace.live_bytes
        trace.restart()
        parts.update()
        update = _amounts(trace, held, None)
        parameters = dict(parts.model.module.named_parameters())
        held_tensors = parts.outer.tensors()
        initial = parts.algorithm.unroll.learner.init({}, 1)
        values = {True: _extra_bytes(parameters, parts.outer.meta), False: _extra_bytes(initial, parameters)}

        def sizes(*, of_backbone: bool) -> Sizes:
            def part(kind: str) -> int:
                return sum(
                    _bytes(value)
                    for key, value in held_tensors.items()
                    if key.startswith(f"{kind}/") and parameter_of(key).startswith(BACKBONE) == of_backbone
                )

            return Sizes(values[of_backbone], part("meta"), part("optimizer"), part("average"), part("meta"))

        fast, state = parts.algorithm.unroll.start(parts.outer.meta, 1)
        return _Held(
            num_parameters=sum(value.numel() for value in parameters.values()),
            backbone=sizes(of_backbone=True),
            own=sizes(of_backbone=False),
            update=update,
            # A proximal term's anchors are phi_0 itself, and kept once.
            state_bytes=_bytes_of(fast) + _extra_bytes(state, fast),
            stored=_stored(recipe, parts.outer.meta),
        )


def _stored(recipe: Recipe, meta: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of what the combiner keeps of each task's gradient, by name."""
    combiner = recipe.outer.combiner
    if not combiner.is_per_task:
        return {}
    return {name: _bytes(value) for name, value in selected(meta, combiner.combined).items()}


def _pretraining(recipe: Recipe, pretrain: Pretrain) -> Samples:
    """A step of ordinary training, all that it holds included, by samples of a rank."""
    batch_size = pretrain.batch_size
    sizes = (1,) if batch_size == 1 else (1, batch_size)
    settings = ordinary_settings(pretrain, num_steps=pretrain.num_steps, warmup_steps=pretrain.warmup_steps)
    axes = (sizes, (1,), _block_sizes(recipe), (1,))
    return sampled(axes, functools.partial(_pretrain_amounts, recipe, settings))


def _pretrain_amounts(recipe: Recipe, settings: OuterSettings, point: Point) -> Amounts:
    recipe = _with_blocks(recipe, point.blocks)
    on_meta = _on_meta(recipe)
    with traced() as trace:
        model = _held_model(on_meta, None)
        outer = OuterOptimizer(prefixed(BACKBONE, model.values()), settings, Replicated())
        tokens = torch.zeros(point.tasks, *shape_of(task_facts(recipe).inputs), dtype=torch.int64)
        output = task_output(recipe)
        for _ in range(2):  # the first makes the optimizer's states
            trace.restart()
            gradient, _ = ordinary_gradient(
                model.module,
                model_structure(model.module),
                unprefixed(BACKBONE, outer.meta),
                {"inputs": tokens, "targets": tokens},
                Precision(recipe.precision.compute),
                draws=None,
                scale=1.0,
                recompute_blocks=recipe.memory.recompute_blocks,
                shards=None,
                criterion=output.criterion,
                head=output.head,
            )
            outer.update(prefixed(BACKBONE, gradient))
            del gradient
        return _amounts(trace, 0, None)


# ---------------------------------------------------------------- the parts of an outer step


@dataclasses.dataclass(frozen=True)
class _Parts:
    """An outer step's.

    Attributes:
        algorithm: that takes inner steps.
        whole: the same under the recipe's regularisation.
    """

    model: HeldModel
    algorithm: Maml
    whole: Algorithm
    outer: OuterOptimizer
    combiner: Mean
    scaler: LossScaler
    group: _CountedGroup | None

    def differentiate(self, batch: TaskBatch) -> None:
        """The hypergradient of a micro-batch, added to the sum, of the first outer step that takes second
        derivatives."""
        algorithm = self.whole.at_step(self.outer.meta, [batch], list)
        part = algorithm.meta_gradient(
            self.outer.meta, batch, self.scaler.scales, outer_step=self.algorithm.num_first_order
        )
        self.combiner.add(part, batch)

    def update(self) -> None:
        """All of an outer step that is not `differentiate`."""
        outer_step(StepTasks(None, 1, 1), self.whole, self.combiner, self.outer, self.scaler)


@contextlib.contextmanager
def _assembled(recipe: Recipe, choices: Choices, num_shards: int = 1) -> Iterator[tuple[Trace, _Parts]]:
    """The parts of the recipe's outer step on tensors without data, and the trace that they run under.

    Every state is kept, whatever the recipe says: what other plans of snapshots save and cost is arithmetic.
    """
    recipe = with_every_state(recipe)
    on_meta = _on_meta(recipe)
    with traced() as trace:
        group = None if num_shards == 1 else _CountedGroup(num_shards)
        model = _held_model(on_meta, group)
        algorithm = build_maml(recipe, maml_of(recipe), model, choices, CPU)
        sharding = Replicated()
        whole = regularised(recipe, algorithm)
        outer = OuterOptimizer(whole.meta_parameters(), outer_settings(recipe), sharding)
        model.hold_once(outer.meta)
        combiner = Mean(outer.meta, sharding, metric_names=whole.metric_names)
        scaler = LossScaler(Precision(recipe.precision.compute))
        yield trace, _Parts(model, algorithm, whole, outer, combiner, scaler, group)


def _on_meta(recipe: Recipe) -> nn.Module:
    """The recipe's model without memory, whatever files its weights are in."""
    unread = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    with META:
        return build_model(unread, META, Replicated()).module


def _held_model(on_meta: nn.Module, group: _CountedGroup | None) -> HeldModel:
    """The same as a rank holds it, on tensors without data."""
    shapes = {
        name: (value.shape, value.dtype) for name, value in on_meta.named_parameters(remove_duplicate=False)
    }

    def read(name: str, rows: range) -> Tensor:
        shape, dtype = shapes[name]
        return torch.empty(len(rows), *shape[1:], dtype=dtype)

    for module in on_meta.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    if group is not None:
        return HeldModel(on_meta, ShardedWeights(on_meta, group, read))
    materialize(on_meta, read)
    return HeldModel(on_meta)


class _CountedGroup(ShardGroup):
    """A group of ranks of which there is only this one: its collectives give tensors of the right shapes, and
    are counted."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.gathered_bytes = self.scattered_bytes = self.num_collectives = 0

    def start_gather(
        self, shard: Tensor, names: tuple[str, ...], *, is_ahead: bool = False
    ) -> Callable[[], Tensor]:
        shard = shard.detach().contiguous()
        whole = shard.new_empty(self.size * shard.numel())
        self.gathered_bytes += _bytes(whole)
        self.num_collectives += 1
        return lambda: whole

    def scatter_sum(self, whole: Tensor) -> Tensor:
        self.scattered_bytes += _bytes(whole)
        self.num_collectives += 1
        return whole.new_empty(whole.numel() // self.size)


# ---------------------------------------------------------------- data without data


def batch_like(recipe: Recipe, num_tasks: int, num_steps: int) -> TaskBatch:
    """Tasks of the recipe's shapes."""
    facts, old = task_facts(recipe), rehearsal_facts(recipe)
    dtype = Precision(recipe.precision.compute).storage_dtype

    def examples(
        inputs: InputSection, objective: ObjectiveName, num_outputs: int | None, count: int
    ) -> dict[str, Tensor]:
        shape = (num_tasks, count)
        is_text = isinstance(inputs, TextInputs)
        given = torch.zeros(*shape, *shape_of(inputs), dtype=torch.int64 if is_text else dtype)
        if objective == "language_modelling":
            return {"inputs": given, "targets": torch.zeros_like(given)}
        if objective == "regression":
            assert num_outputs is not None
            return {"inputs": given, "targets": torch.zeros(*shape, num_outputs, dtype=dtype)}
        return {"inputs": given, "targets": torch.zeros(shape, dtype=torch.int64)}

    def of_tasks(count: int) -> dict[str, Tensor]:
        return examples(facts.inputs, facts.objective, facts.num_outputs, count)

    def rehearsed(count: int) -> dict[str, Tensor] | None:
        return (
            None if old is None or not count else examples(old.inputs, old.objective, old.num_outputs, count)
        )

    return TaskBatch(
        numbers=tuple(range(num_tasks)),
        support=of_tasks(facts.num_support),
        query=of_tasks(facts.num_query),
        rehearsal=rehearsed(num_rehearsed(recipe, num_steps)),
        outer_rehearsal=rehearsed(num_rehearsed_outside(recipe)),
    )


def _amounts(trace: Trace, held_bytes: int, group: _CountedGroup | None) -> Amounts:
    return Amounts(
        peak_bytes=trace.peak_bytes - held_bytes,
        flops=trace.flops,
        moved_bytes=trace.moved_bytes,
        num_operations=trace.num_operations,
        gathered_bytes=0 if group is None else group.gathered_bytes,
        scattered_bytes=0 if group is None else group.scattered_bytes,
        num_collectives=0 if group is None else group.num_collectives,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(map(_bytes, tensors.values()))


def _extra_bytes(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    """Bytes of tensors that are no views of others."""
    known = {value.untyped_storage()._cdata for value in others.values()}
    return sum(_bytes(value) for value in tensors.values() if value.untyped_storage()._cdata not in known)
