"""What an evaluation compares: the meta-trained model, and the baselines, trained and tuned."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from metaloom.adapting import episode_curves, evaluation_source
from metaloom.budgets import ordinary_budget
from metaloom.build import (
    Choices,
    build_adapter,
    build_algorithm,
    build_in_context,
    build_model,
    build_unroll,
    model_structure,
    ordinary_settings,
    task_output,
)
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.engine.algorithms.arm import ArmBn, ArmCml
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.evaluation import Curve, adaptation_curve
from metaloom.engine.streams import StreamCurve
from metaloom.engine.unroll import Unroll
from metaloom.job import Job
from metaloom.keeping import checkpoint_root, held_rooms
from metaloom.ordinary import finished_weights, train_ordinary
from metaloom.recipe import FullFast, GroupsData, HeadFast, Recipe
from metaloom.recipe.tasks import task_facts
from metaloom.result import best_result, newest_result, result_parameters
from metaloom.sources import ordinary_samples

ORDINARY_WARMUP_SHARE = 0.05
MAX_GRID_EXTENSIONS = 4

_SHOWN_NAMES = {
    "random": "random init",
    "ordinary_equal_data": "ordinary, equal data",
    "ordinary_equal_compute": "ordinary, equal compute",
    "pretrained": "pre-trained only",
    "linear_probe": "linear probe",
    "fine_tuned": "fine-tuned",
    "in_context": "in context",
    "in_context_equal_data": "in context, equal data",
    "in_context_equal_compute": "in context, equal compute",
}
# They adapt in ways of their own what another baseline has learned: `Recipe.transferred`.
TRANSFERRED = ("linear_probe", "fine_tuned")
# The ordinary training that a model in context has had; None for none after the recipe's pre-training.
IN_CONTEXT = {
    "in_context": None,
    "in_context_equal_data": "ordinary_equal_data",
    "in_context_equal_compute": "ordinary_equal_compute",
}

MetaTensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to adapt: a starting point with its inner rates.

    Attributes:
        name: in tables and plots.
        curve: how it adapts.
        meta: its meta-parameters, trained or not.
        inner_rate: its rates, in words.
        training: what was spent on it, in words.
        stream: how it does over a stream; None where none is asked for.
    """

    name: str
    curve: Curve
    meta: MetaTensors
    inner_rate: str
    training: str
    stream: Curve | None = None


def meta_trained(job: Job, newest: Checkpoint) -> Contender:
    recipe = job.recipe
    checkpoint = best_result(_checkpoints(job), newest, job.console.warn, held_rooms(job.sharding))
    model = build_model(recipe, job.place.device, job.sharding)
    if recipe.pretrain is not None:
        model.load(_pretrained(job))
    choices = _choices(job, newest)
    algorithm = build_algorithm(recipe, model, choices, job.place.device, sharding=job.sharding)

    def hold(stored: Tensor) -> Tensor:
        return job.sharding.held(stored).to(job.place.device)

    meta = result_parameters(recipe, algorithm, checkpoint.tensors, hold)
    tasks = recipe.outer.tasks_per_step
    return Contender(
        name="meta-trained",
        curve=algorithm.curve,
        meta=meta,
        inner_rate=_own_rate(recipe),
        training=_after_pretraining(recipe, f"{checkpoint.step} outer steps of {tasks} tasks"),
        stream=_stream(recipe, algorithm) if recipe.evaluation.stream else None,
    )


def _stream(recipe: Recipe, algorithm: Algorithm) -> StreamCurve:
    """A method over a stream, where what is predicted is never a part of the context."""
    if isinstance(algorithm, ArmBn | ArmCml):
        algorithm = dataclasses.replace(algorithm, is_own_context=False)
    assert isinstance(recipe.data, GroupsData), "a rule of the recipe has seen to it"
    return StreamCurve(algorithm.curve, has_queries=not recipe.data.query_is_support)


def _own_rate(recipe: Recipe) -> str:
    """The inner rates of what was meta-trained, in words."""
    if recipe.maml is None:
        return "no steps"
    rule = recipe.adaptation.rule
    return f"{rule.lr:g}" if rule.learned == "none" else "learned"


def _choices(job: Job, newest: Checkpoint) -> Choices:
    """What was chosen in meta-training, as far as it fits the recipe."""
    return Choices.load(newest.scalars["choices"]).filled(job.recipe)


def newest_checkpoint(job: Job) -> Checkpoint:
    rooms = held_rooms(job.sharding)
    return newest_result(_checkpoints(job), job.place.folder, job.console.warn, rooms)


def _checkpoints(job: Job) -> CheckpointStore:
    return CheckpointStore(checkpoint_root(job.recipe, job.place.folder, "meta"))


def baseline(job: Job, name: str, newest: Checkpoint) -> Contender:
    """A baseline with its inner rate tuned on validation episodes.

    Args:
        newest: the checkpoint of meta-training, from whose step and choices budgets follow.
    """
    if name in IN_CONTEXT:
        return _in_context(job, name, newest)
    model = build_model(job.recipe, job.place.device, job.sharding)
    choices = _choices(job, newest)
    start = job.recipe.transferred if name in TRANSFERRED else name
    training = "none"
    if start == "pretrained":
        model.load(_pretrained(job))
        training = _after_pretraining(job.recipe, "")
    elif start.startswith("ordinary_"):
        weights, training = _after_ordinary_training(job, start, newest)
        model.load(weights)
    recipe = _adapting(job.recipe, name)
    adapter = build_adapter(recipe, model, choices, is_learned=False)
    shown = _SHOWN_NAMES[name]

    def unroll_at(rate: float) -> Unroll:
        return build_unroll(recipe, adapter, rate=rate, grain="none", learns_loss=False)

    rate = _tuned_rate(job, shown, unroll_at)
    return Contender(
        name=shown,
        curve=functools.partial(adaptation_curve, unroll_at(rate)),
        meta={},
        inner_rate=f"{rate:.3g} (tuned)",
        training=training,
    )


def _adapting(recipe: Recipe, name: str) -> Recipe:
    """The recipe by whose inner loop a baseline adapts: its own, but for what is fast.

    Of `linear_probe` the head alone, on what ordinary training has made of the layers before: Chen et al.
    2019, "A Closer Look at Few-shot Classification" (their Baseline), and Tian et al. 2020, "Rethinking
    Few-Shot Image Classification: a Good Embedding Is All You Need?". Of `fine_tuned` all weights: Dhillon et
    al. 2020, "A Baseline for Few-Shot Image Classification".
    """
    adaptation = recipe.adaptation
    if name == "linear_probe":
        # Steps of the head alone come before no others.
        head = adaptation.head.model_copy(update={"first_steps": 0})
        adaptation = adaptation.model_copy(update={"fast": HeadFast(), "head": head})
    elif name == "fine_tuned":
        adaptation = adaptation.model_copy(update={"fast": FullFast()})
    return recipe.model_copy(update={"adaptation": adaptation})


def _in_context(job: Job, name: str, newest: Checkpoint) -> Contender:
    """A language model that has support sequences in front of each query, and does not adapt.

    Args:
        newest: as for `baseline`.
    """
    recipe = job.recipe
    model = build_model(recipe, job.place.device, job.sharding)
    training = "none"
    ordinary = IN_CONTEXT[name]
    if ordinary is not None:
        weights, training = _after_ordinary_training(job, ordinary, newest)
        model.load(weights)
    elif recipe.pretrain is not None:
        model.load(_pretrained(job))
        training = _after_pretraining(recipe, "")
    return Contender(
        name=_SHOWN_NAMES[name],
        curve=build_in_context(recipe, model).curve,
        meta={},
        inner_rate="no steps",
        training=training,
    )


def _after_ordinary_training(job: Job, name: str, newest: Checkpoint) -> tuple[MetaTensors, str]:
    """The weights of a baseline that is ordinarily trained, and what was spent on them, in words."""
    choices = _choices(job, newest)
    num_samples, num_steps = ordinary_budget(job, name, choices, num_outer_steps=newest.step)
    weights = _ordinarily_trained(job, name, num_steps)
    return weights, _after_pretraining(job.recipe, f"{num_steps} steps, {num_samples} samples")


def _after_pretraining(recipe: Recipe, training: str) -> str:
    """What was spent on a contender in words, the recipe's pre-training first."""
    if recipe.pretrain is None:
        return training
    return f"{recipe.pretrain.num_steps} steps of pre-training" + (training and f", then {training}")


def _pretrained(job: Job) -> MetaTensors:
    assert job.recipe.pretrain is not None, "the recipe has no pre-training"
    return finished_weights(
        job.recipe,
        job.place,
        job.sharding,
        "pretrain",
        num_steps=job.recipe.pretrain.num_steps,
        on_skip=job.console.warn,
    )


def _ordinarily_trained(job: Job, name: str, num_steps: int) -> MetaTensors:
    """Weights after ordinary training on the training split; a classifier's head starts at zero again."""
    recipe = job.recipe
    samples = ordinary_samples(recipe, job.data, ("train",), purpose=name)
    model = build_model(recipe, job.place.device, job.sharding, num_classes=samples.num_classes)
    if recipe.pretrain is not None:
        model.load(_pretrained(job))
    ordinary = recipe.evaluation.ordinary
    warmup_steps = round(ORDINARY_WARMUP_SHARE * num_steps)
    weights = train_ordinary(
        job,
        model,
        samples,
        ordinary_settings(ordinary, num_steps=num_steps, warmup_steps=warmup_steps),
        batch_size=ordinary.batch_size,
        phase_name=name,
        shown_name=_SHOWN_NAMES[name],
    )
    if task_facts(recipe).draws_labels:
        # The new task's classes are others: no output is preferred before adaptation.
        head = f"{model_structure(model.module).head_of(task_output(recipe).head)}."
        fresh = build_model(recipe, job.place.device, job.sharding).values()
        weights |= {key: torch.zeros_like(value) for key, value in fresh.items() if key.startswith(head)}
    return weights


def _tuned_rate(job: Job, name: str, unroll_at: Callable[[float], Unroll]) -> float:
    """The inner rate with the lowest validation loss after adaptation.

    Tries the recipe's factors, then goes on beyond the end of the grid for as long as the best lies
    there. Every rank must call, and finds the same.
    """
    recipe = job.recipe
    factors = sorted(recipe.evaluation.tuning.rate_factors)
    source = evaluation_source(job, "validation")
    losses: dict[float, float] = {}
    with job.console.phase(f"tune {name}", total=None, unit="rate") as phase:

        def try_factor(factor: float) -> None:
            curve = functools.partial(adaptation_curve, unroll_at(factor * recipe.adaptation.rule.lr))
            curves = episode_curves(
                job, curve, {}, source, recipe.evaluation.tuning.num_episodes, metric="loss"
            )
            loss = statistics.fmean(curve.metric[-1] for curve in curves)
            losses[factor] = loss if math.isfinite(loss) else math.inf
            phase.advance(1)

        for factor in factors:
            try_factor(factor)
        for _ in range(MAX_GRID_EXTENSIONS):
            tried = sorted(losses)
            best = min(tried, key=losses.__getitem__)
            if len(tried) == 1 or tried[0] < best < tried[-1]:
                break
            try_factor(best * (best / tried[1] if best == tried[0] else best / tried[-2]))
    return min(losses, key=losses.__getitem__) * recipe.adaptation.rule.lr
