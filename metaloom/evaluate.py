"""How well a run's result adapts to tasks never seen, beside the baselines that a sceptic asks for."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metaloom.adapting import measured_episodes
from metaloom.budgets import ordinary_budget
from metaloom.build import (
    Choices,
    build_adapter,
    build_algorithm,
    build_in_context,
    build_model,
    build_sharding,
    build_unroll,
    model_structure,
    ordinary_settings,
    task_output,
)
from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.confidence import confidence_95
from metaloom.datasets import EpisodeSource, slice_for_rank
from metaloom.engine.algorithms.arm import ArmBn, ArmCml
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.evaluation import Curve, adaptation_curve
from metaloom.engine.losses import bits
from metaloom.engine.outer import COUNTED
from metaloom.engine.streams import StreamCurve
from metaloom.engine.unroll import Unroll
from metaloom.errors import CheckpointError
from metaloom.group_measures import group_results
from metaloom.job import Job, Place, open_job, stored_room
from metaloom.ordinary import finished_weights, train_ordinary
from metaloom.recipe import (
    ARMBNAlgorithm,
    ARMCMLAlgorithm,
    Conv4Model,
    GPTModel,
    GroupsData,
    InContextAlgorithm,
    Recipe,
)
from metaloom.recipe.tasks import (
    num_in_context,
    num_inputs,
    positions_in_context,
    rehearsal_facts,
    task_facts,
)
from metaloom.sources import data_names, episode_source, ordinary_samples
from metaloom.tracking import read_metrics
from metaloom.tracking.groups import group_rows, stream_rows, worst_group
from metaloom.tracking.report import write_report
from metaloom.tracking.results import (
    EvaluationSummary,
    MethodResult,
    StreamResult,
    effort_rows,
    headline,
    summary_rows,
)

ORDINARY_WARMUP_SHARE = 0.05
MAX_GRID_EXTENSIONS = 4

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


@dataclasses.dataclass(frozen=True)
class EpisodeCurve:
    """What adaptation did on one episode.

    Attributes:
        task: what the episode is clustered by.
        metric: after 0 .. K steps.
        retention: loss on data that was not rehearsed, before and after; None where there is none.
        group: of the episode; None where it has none.
    """

    task: str
    metric: tuple[float, ...]
    retention: tuple[float, float] | None
    group: str | None = None


def evaluate(recipe: Recipe, place: Place) -> None:
    """Evaluates a run on its test split and leaves a table, a page and a record in the run folder.

    Trains the ordinary baselines first, unless an earlier evaluation has left them. Every rank must call.

    Raises:
        CheckpointError: the run has no checkpoint yet.
        MetaloomError: the data or the tracking store cannot be used.
    """
    with open_job(
        recipe, place, build_sharding(recipe, place.device), is_training=False, first_step=None
    ) as job:
        newest = _newest(job)
        baselines = [_baseline(job, name, newest) for name in recipe.baselines]
        contenders = [_meta_trained(job, newest), *baselines]
        curves = [_test_curves(job, contender.name, contender) for contender in contenders]
        results = [
            _result(job, contender, own, ours=curves[0])
            for contender, own in zip(contenders, curves, strict=True)
        ]
        summary = EvaluationSummary(
            dataset=_data_name(job), split="test", methods=tuple(results), notes=_notes(job)
        )
        if job.sharding.rank == 0:
            _publish(job, summary)


# ---------------------------------------------------------------- contenders


def _meta_trained(job: Job, newest: Checkpoint) -> Contender:
    recipe = job.recipe
    best_step = newest.scalars["progress"]["best_step"]  # None where there was no validation
    checkpoint = newest if best_step is None else _checkpoints(job).load(best_step)
    model = build_model(recipe, job.place.device, job.sharding)
    if recipe.pretrain is not None:
        model.load(_pretrained(job))
    choices = Choices.load(newest.scalars["choices"])
    algorithm = build_algorithm(recipe, model, choices, job.place.device, sharding=job.sharding)
    prefix = "meta/" if recipe.outer.ema is None else "average/"
    meta = {
        name: job.sharding.held(checkpoint.tensors[prefix + name]).to(job.place.device)
        for name in algorithm.meta_parameters()
    }
    meta |= {
        name: job.sharding.held(checkpoint.tensors[COUNTED + name]).to(job.place.device)
        for name in algorithm.tracked()
    }
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


def _newest(job: Job) -> Checkpoint:
    folder = job.place.folder
    newest = _checkpoints(job).load_newest(job.console.warn)
    if newest is None:
        raise CheckpointError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )
    return newest


def _checkpoints(job: Job) -> CheckpointStore:
    return CheckpointStore(job.place.folder.checkpoints("meta"), room=stored_room(job.sharding))


def _baseline(job: Job, name: str, newest: Checkpoint) -> Contender:
    """A baseline with its inner rate tuned on validation episodes.

    Args:
        newest: the checkpoint of meta-training, from whose step and choices budgets follow.
    """
    if name in _IN_CONTEXT:
        return _in_context(job, name, newest)
    model = build_model(job.recipe, job.place.device, job.sharding)
    choices = Choices.load(newest.scalars["choices"])
    training = "none"
    if name == "pretrained":
        model.load(_pretrained(job))
        training = _after_pretraining(job.recipe, "")
    elif name.startswith("ordinary_"):
        weights, training = _after_ordinary_training(job, name, newest)
        model.load(weights)
    adapter = build_adapter(job.recipe, model, choices, is_learned=False)
    shown = _SHOWN_NAMES[name]

    def unroll_at(rate: float) -> Unroll:
        return build_unroll(job.recipe, adapter, rate=rate, grain="none", learns_loss=False)

    rate = _tuned_rate(job, shown, unroll_at)
    return Contender(
        name=shown,
        curve=functools.partial(adaptation_curve, unroll_at(rate)),
        meta={},
        inner_rate=f"{rate:.3g} (tuned)",
        training=training,
    )


def _in_context(job: Job, name: str, newest: Checkpoint) -> Contender:
    """A language model that has support sequences in front of each query, and does not adapt.

    Args:
        newest: as for `_baseline`.
    """
    recipe = job.recipe
    model = build_model(recipe, job.place.device, job.sharding)
    training = "none"
    ordinary = _IN_CONTEXT[name]
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
    choices = Choices.load(newest.scalars["choices"])
    num_samples, num_steps = ordinary_budget(job, name, choices, num_outer_steps=newest.step)
    weights = _ordinarily_trained(job, name, num_steps)
    return weights, _after_pretraining(job.recipe, f"{num_steps} steps, {num_samples} samples")


def _after_pretraining(recipe: Recipe, training: str) -> str:
    """What was spent on a contender in words, the recipe's pre-training first."""
    if recipe.pretrain is None:
        return training
    return f"{recipe.pretrain.num_steps} steps of pre-training" + (training and f", then {training}")


_SHOWN_NAMES = {
    "random": "random init",
    "ordinary_equal_data": "ordinary, equal data",
    "ordinary_equal_compute": "ordinary, equal compute",
    "pretrained": "pre-trained only",
    "in_context": "in context",
    "in_context_equal_data": "in context, equal data",
    "in_context_equal_compute": "in context, equal compute",
}
# The ordinary training that a model in context has had; None for none after the recipe's pre-training.
_IN_CONTEXT = {
    "in_context": None,
    "in_context_equal_data": "ordinary_equal_data",
    "in_context_equal_compute": "ordinary_equal_compute",
}


def _pretrained(job: Job) -> MetaTensors:
    assert job.recipe.pretrain is not None, "the recipe has no pre-training"
    return finished_weights(job, "pretrain", num_steps=job.recipe.pretrain.num_steps)


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


# ---------------------------------------------------------------- measuring


def _tuned_rate(job: Job, name: str, unroll_at: Callable[[float], Unroll]) -> float:
    """The inner rate with the lowest validation loss after adaptation.

    Tries the recipe's factors, then goes on beyond the end of the grid for as long as the best lies
    there. Every rank must call, and finds the same.
    """
    recipe = job.recipe
    factors = sorted(recipe.evaluation.tuning.rate_factors)
    source = _source(job, "validation")
    losses: dict[float, float] = {}
    with job.console.phase(f"tune {name}", total=None, unit="rate") as phase:

        def try_factor(factor: float) -> None:
            curve = functools.partial(adaptation_curve, unroll_at(factor * recipe.adaptation.rule.lr))
            curves = _curves(job, curve, {}, source, recipe.evaluation.tuning.num_episodes, metric="loss")
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


def _metric(recipe: Recipe) -> str:
    objective = task_facts(recipe).objective
    if objective != "language_modelling":
        return "accuracy" if objective == "classification" else "mean squared error"
    is_bytes = isinstance(recipe.model, GPTModel) and recipe.model.vocabulary == 256
    return "bits per byte" if is_bytes else "bits per token"


def _data_name(job: Job) -> str:
    """The data sets of the tasks, in words."""
    return ", ".join(dict.fromkeys(data_names(job.recipe, job.data)))


def _stream_result(job: Job, contender: Contender) -> StreamResult | None:
    """How a contender does over the test episodes as streams. Every rank must call."""
    if contender.stream is None:
        return None
    as_stream = dataclasses.replace(contender, curve=contender.stream)
    curves = _test_curves(job, f"{contender.name} over streams", as_stream)
    clusters = [curve.task for curve in curves]
    columns = list(zip(*(curve.metric for curve in curves), strict=True))
    return StreamResult(
        tuple(2**place for place in range(len(columns))),
        tuple(statistics.fmean(column) for column in columns),
        tuple(confidence_95(column, clusters) for column in columns),
    )


def _test_curves(job: Job, shown: str, contender: Contender) -> list[EpisodeCurve]:
    """A contender's curves on the test episodes, the same ones for every contender.

    Args:
        shown: what is evaluated, in words.
    """
    num_episodes = job.recipe.evaluation.num_episodes
    name = f"evaluate {shown}"
    job.place.whereabouts.enter(f"the evaluation of {shown}")
    num_here = len(slice_for_rank(num_episodes, job.sharding.rank, job.sharding.world_size))
    with job.console.phase(name, total=num_here, unit="episode") as phase:
        return _curves(
            job,
            contender.curve,
            contender.meta,
            _source(job, "test"),
            num_episodes,
            metric=_metric(job.recipe),
            on_done=phase.advance,
        )


def _result(
    job: Job, contender: Contender, curves: Sequence[EpisodeCurve], *, ours: Sequence[EpisodeCurve]
) -> MethodResult:
    """What a contender's curves say, and how they compare, episode by episode, with the meta-trained."""
    metric = _metric(job.recipe)
    columns = list(zip(*(curve.metric for curve in curves), strict=True))
    clusters = [curve.task for curve in curves]
    retention = [curve.retention for curve in curves if curve.retention is not None]
    differences = [
        [our - own for our, own in zip(ours[row].metric, curve.metric, strict=True)]
        for row, curve in enumerate(curves)
    ]
    return MethodResult(
        name=contender.name,
        inner_rate=contender.inner_rate,
        metric=metric,
        higher_is_better=metric == "accuracy",
        mean=tuple(statistics.fmean(column) for column in columns),
        ci95=tuple(confidence_95(column, clusters) for column in columns),
        num_episodes=len(curves),
        num_clusters=len(set(clusters)),
        training=contender.training,
        rehearsal=(statistics.fmean(r[0] for r in retention), statistics.fmean(r[1] for r in retention))
        if retention
        else None,
        paired_ci95=None
        if curves is ours
        else tuple(confidence_95(column, clusters) for column in zip(*differences, strict=True)),
        groups=group_results([curve.metric[-1] for curve in curves], [curve.group for curve in curves]),
        stream=_stream_result(job, contender),
    )


def _source(job: Job, split: str) -> EpisodeSource:
    # Another seed than training's and validation's: the tuning must not see the test's draws.
    recipe = job.recipe
    return episode_source(
        recipe, job.data, split, seed=recipe.seed + 1, num_steps=recipe.evaluation_num_steps
    )


def _curves(
    job: Job,
    curve: Curve,
    meta: MetaTensors,
    source: EpisodeSource,
    num_episodes: int,
    *,
    metric: str,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[EpisodeCurve]:
    """The curves of episodes 0 .. `num_episodes` - 1, on every rank. Every rank must call."""
    curves: list[EpisodeCurve] = []
    num_steps = job.recipe.evaluation_num_steps
    for episodes, measured in measured_episodes(
        job, curve, meta, source, num_episodes=num_episodes, num_steps=num_steps, step=None
    ):
        values = measured["accuracy" if metric == "accuracy" else "loss"].tolist()
        retention = measured["retention_loss"].tolist() if "retention_loss" in measured else None
        for row, episode in enumerate(episodes):
            unit = bits if metric.startswith("bits") else float
            pair = None if retention is None else (unit(retention[row][0]), unit(retention[row][1]))
            points = tuple(unit(value) for value in values[row])
            curves.append(EpisodeCurve(episode.task, points, pair, episode.group))
        on_done(len(episodes))
    return job.sharding.gather(curves)


# ---------------------------------------------------------------- telling


def _notes(job: Job) -> tuple[str, ...]:
    notes = ["Intervals are 95 %, clustered by task where a task repeats; 'ahead by' is paired by episode."]
    if job.recipe.baselines:
        notes.append(
            "Each baseline's inner rate was tuned on validation episodes; the meta-trained model uses its "
            "own."
        )
    if job.recipe.adapts_without_labels:
        notes.append("The labels of support data have no part in adaptation.")
    recipe = job.recipe
    if isinstance(recipe.algorithm, InContextAlgorithm) or any(
        name in _IN_CONTEXT for name in recipe.baselines
    ):
        num_tokens = positions_in_context(recipe) - num_inputs(task_facts(recipe).inputs)
        notes.append(
            f"In context, the last {num_in_context(recipe)} of {task_facts(recipe).num_support} support "
            f"sequences, {num_tokens} tokens, are in front of each query, whose own tokens alone are judged."
        )
    if any("equal" in name for name in job.recipe.baselines):
        notes.append("Ordinary training is judged at its last step, with the recipe's optimizer settings.")
    if any(name.endswith("equal_compute") for name in job.recipe.baselines):
        notes.append(
            "Equal compute counts the floating-point operations of matrix products and convolutions."
        )
    if rehearsal_facts(job.recipe) is not None:
        notes.append("Forgetting is measured on data of the pre-training kind that were not rehearsed.")
    model = job.recipe.model
    if isinstance(model, Conv4Model) and model.norm == "batch" and not _has_a_context(job.recipe):
        if job.recipe.adaptation.norms.statistics == "batch":
            notes.append(
                "Batch norm sees the query images of an episode together: predictions are transductive."
            )
        else:
            notes.append(
                "Batch norm of the meta-trained model takes running means of training; that of the baselines "
                "sees the query images of an episode together, so that their predictions are transductive."
            )
    return tuple(notes)


def _has_a_context(recipe: Recipe) -> bool:
    """Whether batch statistics are those of the support inputs alone."""
    return isinstance(recipe.algorithm, ARMBNAlgorithm | ARMCMLAlgorithm)


def _tell_of_groups(job: Job, summary: EvaluationSummary) -> None:
    """Tables and metrics of groups and of streams, where there are any. Rank 0 calls."""
    for method in summary.methods:
        key, name = method.name.replace(",", "").replace(" ", "_"), method.metric.replace(" ", "_")
        worst = worst_group(method)
        if worst is not None:
            job.tracker.log({f"evaluation/{key}/worst_group_{name}": worst.mean}, len(method.mean) - 1)
        if method.stream is not None:
            for seen, mean in zip(method.stream.seen, method.stream.mean, strict=True):
                job.tracker.log({f"evaluation/{key}/stream_{name}": mean}, seen)
    for title, (columns, rows) in (
        ("by group", group_rows(summary)),
        ("over a stream of unlabelled inputs", stream_rows(summary)),
    ):
        if rows:
            job.console.table(f"{summary.dataset}: {summary.methods[0].metric} {title}", columns, rows)


def _publish(job: Job, summary: EvaluationSummary) -> None:
    """Table, page and record. Rank 0 calls."""
    folder = job.place.folder
    folder.evaluation.write_text(summary.to_json(), encoding="utf-8")
    for method in summary.methods:
        key = method.name.replace(",", "").replace(" ", "_")
        name = method.metric.replace(" ", "_")
        for step, (mean, ci95) in enumerate(zip(method.mean, method.ci95, strict=True)):
            job.tracker.log({f"evaluation/{key}/{name}": mean, f"evaluation/{key}/{name}_ci95": ci95}, step)
    facts = {
        "run": str(folder.path),
        "recipe": job.recipe.name,
        "data": f"{_data_name(job)}, digest {job.data.digest[:12]}",
        "tracking": job.tracker.describe(),
    }
    pictures = write_report(
        folder.report,
        title=job.recipe.name,
        facts=facts,
        curves=read_metrics(folder.path / "metrics.jsonl"),
        evaluation=summary,
    )
    for path in (folder.evaluation, folder.report, *pictures):
        job.tracker.artifact(path, "evaluation")
    num_episodes = summary.methods[0].num_episodes
    job.console.table(f"{summary.dataset}: {num_episodes} test episodes", *summary_rows(summary))
    job.console.table(headline(summary), *effort_rows(summary))
    _tell_of_groups(job, summary)
    for note in summary.notes:
        job.console.note(note)
    job.console.note(f"report: {folder.report}")
    job.console.note(f"tracked in {job.tracker.describe()}")
