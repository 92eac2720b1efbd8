"""From a recipe to the parts of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metaloom.datasets import Episode
from metaloom.datasets.pixels import as_numbers, of_one_form
from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.maml import Maml, step_weights
from metaloom.engine.choice import EXACT_AND_FLAT, EstimatorChoice
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Neumann, Solver
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.losses import Criterion, CrossEntropy, MeanSquaredError, SupportLoss
from metaloom.engine.outer import OuterSettings
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero, ZeroSettings
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Sharded
from metaloom.engine.snapshots import Binomial, HostMemory, KeepAll, SnapshotPlan
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import Gpt
from metaloom.models.mlp import Mlp
from metaloom.recipe import (
    AdamOptimizer,
    AdamWRule,
    AllSnapshots,
    AutoHypergradient,
    BinomialSnapshots,
    ConjugateGradientSolver,
    Conv4Model,
    DeepSpeedZeroSharding,
    FiniteDifferenceHypergradient,
    FirstOrderHypergradient,
    FullFast,
    GPTModel,
    HostSnapshots,
    ImageInputs,
    ImplicitHypergradient,
    MixedModeHypergradient,
    MLPModel,
    NeumannSolver,
    OrdinaryTraining,
    Pretrain,
    Recipe,
    RematerializedHypergradient,
    ReplicatedSharding,
    ReptileHypergradient,
    RMSPropRule,
    SGDRule,
    ShardedSharding,
    TruncatedHypergradient,
    UnrolledHypergradient,
)
from metaloom.recipe import InnerRule as InnerRuleSection
from metaloom.recipe import Rehearsal as RehearsalSection
from metaloom.recipe.tasks import num_inputs, num_rehearsed, rehearsal_facts, task_facts
from metaloom.weights import HeldModel, hold

Tasks = Literal["loop", "vmap"]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a run has measured and keeps to, where its recipe leaves the choice.

    Attributes:
        tasks: how tasks are put side by side where every weight is fast.
        estimator: of the hypergradient; None where the recipe names one.
    """

    tasks: Tasks = "loop"
    estimator: EstimatorChoice | None = None

    def scalars(self) -> dict[str, Any]:
        """As JSON values, for checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, scalars: Mapping[str, Any]) -> Choices:
        """What `scalars` returned."""
        estimator = scalars["estimator"]
        return cls(scalars["tasks"], None if estimator is None else EstimatorChoice(**estimator))


def build_sharding(recipe: Recipe, device: torch.device) -> Sharding:
    """How the meta-parameters lie on the ranks. Every rank must call."""
    match recipe.sharding:
        case ShardedSharding(shard_size=shard_size):
            return Sharded(device, shard_size=shard_size)
        case ReplicatedSharding(bucket_mib=bucket_mib):
            return Replicated(bucket_bytes=int(bucket_mib * 2**20))
        case DeepSpeedZeroSharding(stage=stage, offload_optimizer=offload_optimizer, extra=extra):
            return DeepSpeedZero(ZeroSettings(stage, offload_optimizer, extra), device)


def build_model(
    recipe: Recipe, device: torch.device, sharding: Sharding, *, num_classes: int | None = None
) -> HeldModel:
    """The recipe's model with its initial weights: those of `model.weights`, or such as follow from the seed.

    Args:
        num_classes: outputs of a classifier; as many as a task has classes where None.

    Raises:
        CheckpointError: `model.weights` cannot be read, or belongs to another model.
    """

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return _make_model(recipe, num_classes)

    return hold(
        make,
        None if recipe.model.weights is None else Path(recipe.model.weights),
        sharding,
        device,
        Precision(recipe.precision.compute).storage_dtype,
    )


def _make_model(recipe: Recipe, num_classes: int | None) -> nn.Module:
    facts, rehearsed = task_facts(recipe), rehearsal_facts(recipe)
    num_outputs = num_classes or facts.num_outputs
    own_head = None if rehearsed is None or rehearsed.shares_head else rehearsed.num_outputs
    match recipe.model:
        case Conv4Model(width=width, num_blocks=num_blocks, norm=norm):
            assert isinstance(facts.inputs, ImageInputs)
            assert num_outputs is not None
            return Conv4(
                num_classes=num_outputs,
                width=width,
                num_blocks=num_blocks,
                norm=norm,
                num_channels=facts.inputs.channels,
                num_rehearsal_classes=own_head,
            )
        case MLPModel(width=width, num_layers=num_layers, activation=activation):
            assert num_outputs is not None
            return Mlp(
                num_inputs=num_inputs(facts.inputs),
                width=width,
                num_layers=num_layers,
                num_outputs=num_outputs,
                activation=activation,
                num_rehearsal_outputs=own_head,
            )
        case GPTModel():
            return Gpt(
                num_layers=recipe.model.num_layers,
                width=recipe.model.width,
                num_heads=recipe.model.num_heads,
                context_length=recipe.model.context_length,
                tied_embeddings=recipe.model.tied_embeddings,
                dropout=recipe.model.dropout,
                vocabulary=recipe.model.vocabulary,
                num_classes=num_outputs,
            )


def model_structure(model: nn.Module) -> Structure:
    """Where a model can be taken apart: the built-in ones alike have `blocks` and `heads`."""
    names = [name for name, _ in model.named_modules()]
    blocks = tuple(name for name in names if name.startswith("blocks.") and name.count(".") == 1)
    assert isinstance(model, Conv4 | Mlp | Gpt)
    return Structure(blocks, model.heads)


@dataclasses.dataclass(frozen=True)
class Output:
    """Which output of a model is read, and what it is judged by."""

    head: str
    criterion: Criterion


def task_output(recipe: Recipe) -> Output:
    """What tasks read of the model."""
    objective = task_facts(recipe).objective
    criterion = MeanSquaredError() if objective == "regression" else CrossEntropy()
    return Output(objective if isinstance(recipe.model, GPTModel) else "tasks", criterion)


def _rehearsal_output(recipe: Recipe) -> Output:
    """What rehearsal reads of the model."""
    rehearsed = rehearsal_facts(recipe)
    if rehearsed is None or rehearsed.shares_head:
        return task_output(recipe)
    # Of a language model, its own: that it was trained by before.
    return Output("language_modelling" if isinstance(recipe.model, GPTModel) else "rehearsal", CrossEntropy())


def build_adapter(recipe: Recipe, model: HeldModel, choices: Choices) -> Adapter:
    """What is fast in a model."""
    fast = recipe.adaptation.fast
    structure = model_structure(model.module)
    if isinstance(fast, FullFast):
        return FullAdapter(model.module, structure=structure, tasks=choices.tasks)
    return LoraAdapter(
        model.module,
        targets=fast.targets,
        rank=fast.rank,
        alpha=fast.alpha,
        generator=torch.Generator().manual_seed(recipe.seed),
        structure=structure,
        shards=model.shards,
    )


def build_rule(section: InnerRuleSection) -> InnerRule:
    """The inner rule; its rates are apart, as they may be learned."""
    is_decoupled = isinstance(section, AdamWRule)
    terms = GradientTerms(0.0 if is_decoupled else section.weight_decay, section.clip_norm, section.proximal)
    if isinstance(section, SGDRule):
        return Sgd(terms, momentum=section.momentum, nesterov=section.nesterov)
    if isinstance(section, RMSPropRule):
        return RmsProp(
            terms,
            alpha=section.alpha,
            eps=section.eps,
            eps_root=section.eps_root,
            momentum=section.momentum,
            centered=section.centered,
        )
    return Adam(
        terms,
        betas=section.betas,
        eps=section.eps,
        eps_root=section.eps_root,
        decoupled_weight_decay=section.weight_decay if is_decoupled else 0.0,
    )


def build_unroll(
    recipe: Recipe, adapter: Adapter, *, rate: float, grain: Grain, learns_loss: bool = True
) -> Unroll:
    """The inner problem with a given rate, fixed or where learned rates start.

    Args:
        learns_loss: whether the loss parameters that the recipe learns are read from the meta-parameters;
            they stay where they start otherwise.
    """
    adaptation = recipe.adaptation
    rehearsal, loss, output = adaptation.rehearsal, adaptation.loss, task_output(recipe)
    return Unroll(
        learner=Learner(
            adapter,
            Precision(recipe.precision.compute),
            None if rehearsal is None else _rehearsal(recipe, rehearsal),
            support_loss=SupportLoss(
                loss.temperature, loss.label_smoothing, loss.learned if learns_loss else ()
            ),
            seed=recipe.seed,
            recompute_blocks=recipe.memory.recompute_blocks,
            head_chunk=recipe.memory.head_chunk,
            criterion=output.criterion,
            head=output.head,
        ),
        rule=build_rule(adaptation.rule),
        rates=Rates(rate, grain, adaptation.num_steps),
        step_weights=step_weights(recipe.algorithm.step_weights, adaptation.num_steps),
    )


def _rehearsal(recipe: Recipe, section: RehearsalSection) -> Rehearsal:
    output = _rehearsal_output(recipe)
    return Rehearsal(
        section.ratio,
        section.num_samples,
        outer_ratio=section.outer_ratio,
        criterion=output.criterion,
        head=output.head,
    )


def build_algorithm(
    recipe: Recipe,
    adapter: Adapter,
    choices: Choices,
    device: torch.device,
    *,
    sharding: Sharding | None = None,
) -> Maml:
    """The algorithm with the estimator of its hypergradient.

    Args:
        sharding: what the ranks that compute together agree by; None for a rank alone.
    """
    rule = recipe.adaptation.rule
    unroll = build_unroll(recipe, adapter, rate=rule.lr, grain=rule.learned)
    return Maml(unroll, build_hypergradient(recipe, choices, device, sharding=sharding))


def build_hypergradient(
    recipe: Recipe, choices: Choices, device: torch.device, *, sharding: Sharding | None = None
) -> Hypergradient:
    """The estimator with its options; `sharding` as in `build_algorithm`."""
    snapshots = build_snapshots(recipe, device)
    match recipe.algorithm.hypergradient:
        case AutoHypergradient():
            assert choices.estimator is not None, "auto is chosen before anything is built with it"
            return choices.estimator.build(snapshots)
        case RematerializedHypergradient():
            return Rematerialized(snapshots)
        case MixedModeHypergradient():
            return MixedMode(snapshots)
        case FirstOrderHypergradient():
            return FirstOrder(snapshots)
        case TruncatedHypergradient(num_steps=num_steps, by=by):
            return Truncated(snapshots, num_steps=num_steps, exact=EXACT_AND_FLAT[by]())
        case ImplicitHypergradient(solver=solver, damping=damping):
            return Implicit(_build_solver(solver, sharding), damping)
        case FiniteDifferenceHypergradient(epsilon=epsilon):
            return FiniteDifference(epsilon)
        case ReptileHypergradient():
            return Reptile()
        case UnrolledHypergradient():
            return Unrolled()


def build_snapshots(recipe: Recipe, device: torch.device) -> SnapshotPlan:
    """Which fast weights are kept.

    Raises:
        CapabilityError: they are to go to the host's memory, and are there already.
    """
    match recipe.memory.snapshots:
        case BinomialSnapshots(num_slots=num_slots):
            return Binomial(num_slots)
        case HostSnapshots():
            if device.type == "cpu":
                raise CapabilityError(
                    "memory.snapshots.kind: host; has no effect, since this run computes on a CPU, whose "
                    "memory is the host's: set it to all or binomial, or run on a GPU."
                )
            return HostMemory(device)
        case AllSnapshots():
            return KeepAll()


def _build_solver(solver: ConjugateGradientSolver | NeumannSolver, sharding: Sharding | None) -> Solver:
    match solver:
        case ConjugateGradientSolver():
            any_rank = sharding.any_rank if sharding is not None and sharding.is_lockstep else bool
            return ConjugateGradient(solver.num_iterations, solver.tolerance, any_rank)
        case NeumannSolver():
            return Neumann(solver.num_terms, solver.step_size)


def initial_meta(recipe: Recipe, unroll: Unroll) -> dict[str, Tensor]:
    """The meta-parameters that the recipe learns, at their initial values."""
    learned = recipe.algorithm.meta_parameters
    adapter = unroll.learner.adapter
    meta = adapter.meta_parameters(init=learned.init, backbone=learned.backbone)
    fast = adapter.init({}, 1)
    like = next(iter(fast.values()))
    return meta | unroll.rates.meta_parameters(fast) | unroll.learner.support_loss.meta_parameters(like)


def outer_settings(recipe: Recipe) -> OuterSettings:
    """The outer optimizer's settings."""
    outer, optimizer, schedule = recipe.outer, recipe.outer.optimizer, recipe.outer.schedule
    is_adam = isinstance(optimizer, AdamOptimizer)
    return OuterSettings(
        optimizer="adam" if is_adam else "sgd",
        lr=optimizer.lr,
        lr_rates=optimizer.lr if outer.lr_rates is None else outer.lr_rates,
        lr_loss=optimizer.lr if outer.lr_loss is None else outer.lr_loss,
        betas=optimizer.betas if isinstance(optimizer, AdamOptimizer) else (optimizer.momentum, 0.0),
        eps=optimizer.eps if isinstance(optimizer, AdamOptimizer) else 0.0,
        weight_decay=optimizer.weight_decay,
        num_steps=outer.num_steps,
        warmup_steps=schedule.warmup_steps,
        decay=schedule.decay,
        final_ratio=schedule.final_ratio,
        clip_norm=outer.clip_norm,
        ema=outer.ema,
    )


def ordinary_settings(
    training: Pretrain | OrdinaryTraining, *, num_steps: int, warmup_steps: int
) -> OuterSettings:
    """The optimizer's settings of an ordinary training: AdamW, warm-up, cosine to a tenth."""
    return OuterSettings(
        optimizer="adam",
        lr=training.lr,
        lr_rates=training.lr,
        lr_loss=training.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=training.weight_decay,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay="cosine",
        final_ratio=0.1,
        clip_norm=1.0,
        ema=None,
    )


def task_batch(
    recipe: Recipe,
    episodes: Sequence[Episode],
    device: torch.device,
    *,
    num_steps: int,
    num_dummies: int = 0,
) -> TaskBatch:
    """Episodes side by side, in the recipe's precision; those with fewer examples are padded.

    Args:
        num_steps: inner steps: the rehearsal data beyond what they read is for measuring retention.
        num_dummies: how many of the last episodes do not count.
    """
    precision = Precision(recipe.precision.compute)

    def beside(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        tensors = as_tensors(_padded(parts), device)
        return {name: precision.on_device(tensor, device) for name, tensor in tensors.items()}

    rehearsal = retention = outer = None
    if episodes[0].rehearsal is not None:
        old = [episode.rehearsal for episode in episodes if episode.rehearsal is not None]
        count = num_rehearsed(recipe, num_steps)
        rehearsal = beside([_rows(part, slice(0, count)) for part in old]) if count > 0 else None
        retention = beside([_rows(part, slice(count, None)) for part in old])
        retention = retention if retention["inputs"].shape[1] > 0 else None
    if episodes[0].outer_rehearsal is not None:
        outer = beside([e.outer_rehearsal for e in episodes if e.outer_rehearsal is not None])
    counted = precision.on_device(_task_weights(len(episodes), num_dummies), device) if num_dummies else None
    num_ways = None
    if task_facts(recipe).has_own_ways:
        num_ways = torch.tensor([_ways_of(episode) for episode in episodes], device=device)
    return TaskBatch(
        numbers=tuple(episode.number for episode in episodes),
        support=beside([episode.support for episode in episodes]),
        query=beside([episode.query for episode in episodes]),
        rehearsal=rehearsal,
        retention=retention,
        weights=counted,
        num_ways=num_ways,
        outer_rehearsal=outer,
    )


def as_tensors(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays of examples, for `Precision.on_device`. For a CPU pixels become numbers here, which takes numpy
    a third of torch's time; a GPU is sent the pixels."""
    if device.type == "cpu":
        arrays = {name: as_numbers(array) for name, array in arrays.items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _ways_of(episode: Episode) -> int:
    assert episode.num_ways is not None, "a source whose tasks are classifications says of how many classes"
    return episode.num_ways


def _rows(part: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in part.items()}


def _padded(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples of several tasks side by side, `[T, N, ...]`. Where some have fewer, their first one is
    repeated behind their own, with weight 0."""
    counts = [len(part["targets"]) for part in parts]
    most = max(counts)
    stacked = {}
    for name in ("inputs", "targets"):
        arrays = of_one_form([part[name] for part in parts])
        stacked[name] = np.stack(
            [
                np.concatenate([array, array[:1].repeat(most - count, axis=0)]) if count < most else array
                for array, count in zip(arrays, counts, strict=True)
            ]
        )
    if min(counts) == most:
        return stacked
    weights = np.stack([(np.arange(most) < count).astype(np.float32) for count in counts])
    return stacked | {"weights": weights}


def _task_weights(num_tasks: int, num_dummies: int) -> Tensor:
    """1, and 0 for the last `num_dummies`; `[T]`."""
    weights = torch.ones(num_tasks)
    weights[num_tasks - num_dummies :] = 0.0
    return weights
