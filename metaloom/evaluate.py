"""How well a run's result adapts to tasks never seen, beside the baselines that a sceptic asks for."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from metaloom.adapting import EpisodeCurve, episode_curves, evaluation_source
from metaloom.build import build_sharding
from metaloom.confidence import confidence_95
from metaloom.contenders import IN_CONTEXT, TRANSFERRED, Contender, baseline, meta_trained, newest_checkpoint
from metaloom.datasets import slice_for_rank
from metaloom.group_measures import group_results
from metaloom.job import Job, Place, insisted_in_words, open_job
from metaloom.keeping import writing_alone
from metaloom.recipe import (
    ARMBNAlgorithm,
    ARMCMLAlgorithm,
    ClassesData,
    Conv4Model,
    InContextAlgorithm,
    Recipe,
    load_recipe,
)
from metaloom.recipe.tasks import (
    loss_name,
    num_in_context,
    num_inputs,
    positions_in_context,
    rehearsal_facts,
    task_facts,
)
from metaloom.sources import data_names
from metaloom.tracking import read_metrics
from metaloom.tracking.cosines import read_cosines
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


def evaluate(recipe: Recipe, place: Place) -> None:
    """Evaluates a run on its test split and leaves a table, a page and a record in the run folder.

    Trains the ordinary baselines first, unless an earlier evaluation has left them. Every rank must call.

    Raises:
        CheckpointError: the run has no checkpoint yet.
        MetaloomError: the data or the tracking store cannot be used.
    """
    sharding = build_sharding(recipe, place.device)
    with (
        writing_alone(recipe, place, "evaluate") as lease,
        open_job(recipe, place, sharding, is_training=False, first_step=None, lease=lease) as job,
    ):
        newest = newest_checkpoint(job)
        baselines = [baseline(job, name, newest) for name in recipe.baselines]
        contenders = [meta_trained(job, newest), *baselines]
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


# ---------------------------------------------------------------- measuring


def _metric(recipe: Recipe) -> str:
    return "accuracy" if task_facts(recipe).objective == "classification" else loss_name(recipe)


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
        return episode_curves(
            job,
            contender.curve,
            contender.meta,
            evaluation_source(job, "test"),
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


# ---------------------------------------------------------------- telling


def _notes(job: Job) -> tuple[str, ...]:
    notes = ["Intervals are 95 %, clustered by task where a task repeats; 'ahead by' is paired by episode."]
    if job.recipe.baselines:
        notes.append(
            "Each baseline's inner rate was tuned on validation episodes; the meta-trained model uses its "
            "own."
        )
    notes += _other_shots(job)
    if job.recipe.adapts_without_labels:
        notes.append("The labels of support data have no part in adaptation.")
    recipe = job.recipe
    if isinstance(recipe.algorithm, InContextAlgorithm) or any(
        name in IN_CONTEXT for name in recipe.baselines
    ):
        num_tokens = positions_in_context(recipe) - num_inputs(task_facts(recipe).inputs)
        notes.append(
            f"In context, the last {num_in_context(recipe)} of {task_facts(recipe).num_support} support "
            f"sequences, {num_tokens} tokens, are in front of each query, whose own tokens alone are judged."
        )
    trained = [recipe.transferred if name in TRANSFERRED else name for name in recipe.baselines]
    if any("equal" in name for name in trained):
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


def _other_shots(job: Job) -> list[str]:
    """How tasks differ from those of training, where they do."""
    written = job.place.folder.recipe
    before, now = load_recipe(written).data if written.exists() else job.recipe.data, job.recipe.data
    if not isinstance(before, ClassesData) or not isinstance(now, ClassesData):
        return []
    if (before.n_shot, before.n_query) == (now.n_shot, now.n_query):
        return []
    return [
        f"Tasks have {now.n_shot} support and {now.n_query} query samples per class; those of training had "
        f"{before.n_shot} and {before.n_query}."
    ]


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
    job.disk.replace(folder.evaluation, summary.to_json())
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
    insisted = folder.facts().get("insisted", [])
    if insisted:
        facts["insisted on"] = insisted_in_words(insisted)
    pictures = write_report(
        folder.report,
        title=job.recipe.name,
        facts=facts,
        curves=read_metrics(folder.path / "metrics.jsonl"),
        evaluation=summary,
        cosines=read_cosines(folder.cosines),
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
