"""Meta-training: the parts of a run, put together, and the outer loop."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaloom.adapting import measured_episodes
from metaloom.build import (
    Choices,
    build_algorithm,
    build_combiner,
    build_model,
    build_sharding,
    ordinary_settings,
    outer_settings,
    task_batch,
)
from metaloom.changed import fitted
from metaloom.checkpoints.manifest import Manifest
from metaloom.checkpoints.retention import retention_of
from metaloom.checkpoints.store import (
    Checkpoint,
    CheckpointStore,
    from_rank_0,
    require_same_tensors,
)
from metaloom.checkpoints.tensors import dtype_of
from metaloom.choosing import choose
from metaloom.datasets import Episode, EpisodeSource, EpisodeStream
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.learner import TaskBatch
from metaloom.engine.outer import OuterOptimizer, parameter_of, update_rule
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero
from metaloom.engine.step import StepTasks, outer_step
from metaloom.errors import RecipeError
from metaloom.group_measures import worst_of_groups
from metaloom.job import Job, Place, open_job
from metaloom.keeping import (
    Keeper,
    checkpoint_root,
    held_rooms,
    require_own,
    require_recorded,
    writing_alone,
)
from metaloom.last_good import naming_last_good
from metaloom.left_out_log import LeftOutLog
from metaloom.ordinary import finished_weights, train_ordinary
from metaloom.recipe import Pretrain, Recipe
from metaloom.recipe.tasks import tokens_per_task
from metaloom.sources import episode_source, pretraining_samples
from metaloom.tracking.console import Phase
from metaloom.tracking.cosines import CosineRecord, add_cosines
from metaloom.weights import HeldModel


def train(recipe: Recipe, place: Place) -> None:
    """Meta-trains by a recipe, from the newest checkpoint or from the start.

    Every rank must call.

    Raises:
        MetaloomError: the data, a checkpoint or the tracking store cannot be used.
    """
    notes: list[str] = []
    sharding = build_sharding(recipe, place.device)
    with writing_alone(recipe, place, "train") as lease:
        root = checkpoint_root(recipe, place.folder, "meta")
        timeout = datetime.timedelta(seconds=recipe.launcher.timeout_s)
        store = CheckpointStore(root, retention=retention_of(recipe), lease=lease, timeout=timeout)
        model = build_model(recipe, place.device, sharding)
        resumed = _resumed(recipe, place, sharding, store, model, notes.append)
        first_step = _first_step(recipe, place, resumed)
        last_step = 0 if resumed is None else resumed.state.outer.step
        with open_job(
            recipe,
            place,
            sharding,
            is_training=True,
            first_step=first_step,
            last_step=last_step,
            lease=lease,
        ) as job:
            for note in notes:
                job.console.warn(note)
            job.tracker.artifact(place.folder.recipe)
            run = resumed or _new_run(job, model)
            if not run.state.choices.fit(recipe):
                run = _chosen_anew(job, run, model)
            if isinstance(job.sharding, DeepSpeedZero):
                _tell_of_deepspeed(job, job.sharding)
            if resumed is not None:
                job.console.note(
                    f"resumed after outer step {run.state.outer.step} of {recipe.outer.num_steps}"
                )
            store.remove_remains()
            is_saved = resumed is not None and run.state.unfinished is None
            keeper = Keeper(
                job, store, last_step=last_step if is_saved else None, noun="outer step {}", is_recorded=True
            )
            _outer_loop(job, run, keeper)
            if job.sharding.rank == 0 and job.place.folder.cosines.exists():
                job.tracker.artifact(job.place.folder.cosines)
            where = job.tracker.describe()
    if sharding.rank == 0:
        _say_closing(job, run.state, where)


@dataclasses.dataclass
class Run:
    """What trains, and the state that it trains from."""

    algorithm: Algorithm
    state: State


def _resumed(
    recipe: Recipe,
    place: Place,
    sharding: Sharding,
    store: CheckpointStore,
    model: HeldModel,
    on_skip: Callable[[str], None],
) -> Run | None:
    """The run as its newest valid checkpoint has it; None where there is none yet. Every rank must call.

    Args:
        on_skip: called on rank 0 with a line for each checkpoint that was passed over, and for what is left
            out of one.

    Raises:
        CheckpointError: no checkpoint is valid, or they belong to another model.
    """
    built: list[Run] = []
    facts = from_rank_0(place.folder.facts)  # other hosts may have folders of their own

    def rooms(manifest: Manifest) -> dict[str, Tensor]:
        # Before anything is read: what belongs to another run, or model, is refused at once.
        require_own(place.folder, facts, manifest, shown=store.shown)
        choices = Choices.load(manifest.scalars["choices"])
        run = _run(recipe, place, sharding, model, choices.filled(recipe))
        run.state.choices = choices
        _require_same(run.state.outer, manifest, source=store.shown)
        built[:] = [run]
        return held_rooms(sharding)(manifest)

    if recipe.pretrain is not None and from_rank_0(store.steps):
        num_steps = recipe.pretrain.num_steps
        model.load(
            finished_weights(recipe, place, sharding, "pretrain", num_steps=num_steps, on_skip=on_skip)
        )
    newest = store.load_newest(on_skip, rooms)
    require_recorded(facts, newest)
    if newest is None:
        return None
    (run,) = built
    fitting, left_out = fitted(newest, recipe, data_digest=facts.get("data_digest"))
    if sharding.rank == 0:
        for text in left_out:
            on_skip(text)
    run.state.load(fitting)
    return run


def _require_same(outer: OuterOptimizer, manifest: Manifest, *, source: str) -> None:
    """Checks that a checkpoint is of what this recipe trains.

    Raises:
        CheckpointError: it is not; all differences are listed.
    """
    expected, found_tensors = outer.room(), dict(manifest.tensors)
    if any(map(_is_average, expected)) != any(map(_is_average, found_tensors)):
        # It begins, or ends, here: see `fitted`.
        expected = {key: value for key, value in expected.items() if not _is_average(key)}
        found_tensors = {key: value for key, value in found_tensors.items() if not _is_average(key)}
    meta = outer.stored_meta()
    for key, found in found_tensors.items():
        like = meta.get(parameter_of(key))
        if key.startswith("optimizer/") and like is not None:
            # What an optimizer keeps of a parameter is shaped like that, or a number.
            shape = found.shape if found.shape in ((), tuple(like.shape)) else like.shape
            expected[key] = torch.empty(shape, dtype=dtype_of(found), device="meta")
    require_same_tensors(expected, found_tensors, source=source)


def _is_average(key: str) -> bool:
    return key.startswith("average/")


def _new_run(job: Job, model: HeldModel) -> Run:
    """The run at its start, after what the recipe has come before."""
    recipe = job.recipe
    # Before any training: what is refused must not cost a pre-training.
    choices = choose(job, model, _train_source(job))
    algorithm = build_algorithm(recipe, model, choices, job.place.device, sharding=job.sharding)
    if recipe.outer.lr_parts:
        update_rule(algorithm.meta_parameters(), outer_settings(recipe))
    if recipe.pretrain is not None:
        model.load(_pretrained(job, recipe.pretrain, model))
    return _run(recipe, job.place, job.sharding, model, choices)


def _chosen_anew(job: Job, run: Run, model: HeldModel) -> Run:
    """A run that goes on by a recipe that leaves more to be chosen than the one before."""
    run.state.choices = choices = choose(job, model, _train_source(job))
    algorithm = build_algorithm(
        job.recipe, model, choices, job.place.device, sharding=job.sharding, points=job.place.points
    )
    return dataclasses.replace(run, algorithm=algorithm)


def _run(recipe: Recipe, place: Place, sharding: Sharding, model: HeldModel, choices: Choices) -> Run:
    algorithm = build_algorithm(recipe, model, choices, place.device, sharding=sharding, points=place.points)
    outer = OuterOptimizer(
        algorithm.meta_parameters(), outer_settings(recipe), sharding, tracked=algorithm.tracked()
    )
    model.hold_once(outer.meta)
    combiner = build_combiner(recipe, outer.meta, sharding, metric_names=algorithm.metric_names)
    scaler = LossScaler(Precision(recipe.precision.compute))
    return Run(algorithm, State(outer, combiner, scaler, Progress(), choices))


@dataclasses.dataclass
class Progress:
    """What decides on the best step and on an early stop; saved with every checkpoint.

    Attributes:
        best_step: the outer step with the best validation so far, None before the first.
        best_value: what it was the best by.
        num_worse: validations in a row that did not improve on the best before them by `min_delta`.
    """

    best_step: int | None = None
    best_value: float | None = None
    num_worse: int = 0

    def take(self, step: int, value: float, *, is_higher_better: bool, min_delta: float) -> bool:
        """Takes in one validation; True if it is the best so far."""
        sign = -1.0 if is_higher_better else 1.0
        best = math.inf if self.best_value is None else sign * self.best_value
        self.num_worse = 0 if sign * value < best - min_delta else self.num_worse + 1
        if not sign * value < best:
            return False
        self.best_step, self.best_value = step, value
        return True


@dataclasses.dataclass
class State:
    """What a run is, apart from its recipe: what a checkpoint holds.

    Attributes:
        unfinished: the metrics of the last outer step, where they were not logged yet.
    """

    outer: OuterOptimizer
    combiner: Combiner
    scaler: LossScaler
    progress: Progress
    choices: Choices
    unfinished: dict[str, float] | None = None

    def checkpoint(self, origin: Mapping[str, Any], metrics: Mapping[str, float]) -> Checkpoint:
        """Everything that the next outer step depends on.

        Args:
            origin: what the run is, for whoever finds the checkpoint alone.
            metrics: of the last validation, where it was after this step.
        """
        scalars = self.outer.scalars() | {
            "combiner": self.combiner.scalars(),
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.scalars(),
            "choices": self.choices.scalars(),
            "unfinished": self.unfinished,
            "origin": dict(origin),
        }
        return Checkpoint(self.outer.step, self.outer.tensors(), scalars, dict(metrics))

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over what `checkpoint` returned, as far as it is `fitted`; the choices are made before."""
        self.outer.load(checkpoint.tensors, checkpoint.scalars)
        if checkpoint.scalars["combiner"] is not None:
            self.combiner.load(checkpoint.scalars["combiner"])
        self.scaler.load(checkpoint.scalars["scaler"])
        self.progress = Progress(**checkpoint.scalars["progress"] or {})
        self.unfinished = checkpoint.scalars["unfinished"]


def _train_source(job: Job) -> EpisodeSource:
    recipe = job.recipe
    num_inner = recipe.adaptation.num_steps
    return episode_source(recipe, job.data, "train", seed=recipe.seed, num_steps=num_inner)


def _pretrained(job: Job, pretrain: Pretrain, model: HeldModel) -> dict[str, Tensor]:
    """The weights after the recipe's ordinary training phase, from its checkpoint if it is done."""
    return train_ordinary(
        job,
        model,
        pretraining_samples(job.recipe, job.data),
        ordinary_settings(pretrain, num_steps=pretrain.num_steps, warmup_steps=pretrain.warmup_steps),
        batch_size=pretrain.batch_size,
        phase_name="pretrain",
        shown_name="pretrain",
    )


def _tell_of_deepspeed(job: Job, sharding: DeepSpeedZero) -> None:
    """Says what DeepSpeed does, and keeps the configuration that it was given."""
    if sharding.rank == 0:
        job.disk.replace(job.place.folder.deepspeed, json.dumps(sharding.config, indent=1))
    job.console.note(sharding.describe())
    job.tracker.artifact(job.place.folder.deepspeed)


def _outer_loop(job: Job, run: Run, keeper: Keeper) -> None:
    """Trains until the last step, or until the run is stopped: then its last whole step is saved.

    Raises:
        Stopped: it was.
    """
    with keeper.saving_when_stopped(lambda: _checkpoint(job, run.state, {})):
        _steps(job, run, keeper)


def _steps(job: Job, run: Run, keeper: Keeper) -> None:
    recipe, sharding = job.recipe, job.sharding
    state, outer, points = run.state, run.state.outer, job.place.points
    clock = _Clock(job)
    left_out = LeftOutLog(sharding, job.console, num_tasks=recipe.outer.tasks_per_step)
    stream = EpisodeStream(
        _train_source(job),
        tasks_per_step=recipe.outer.tasks_per_step,
        rank=sharding.rank,
        world_size=sharding.world_size,
        start_step=outer.step,
        stop_step=recipe.outer.num_steps,
        read_ahead=recipe.loading.read_ahead,
        num_workers=recipe.loading.num_workers,
        is_lockstep=sharding.is_lockstep,
    )
    num_done = outer.step - (state.unfinished is not None)
    phases = job.console.phase("meta-train", total=recipe.outer.num_steps, num_done=num_done)
    with stream, phases as phase:
        if state.unfinished is not None:
            _finish_step(job, run, keeper, phase)
        while not _is_over(recipe, state):
            job.place.whereabouts.enter(f"outer step {outer.step + 1}")
            clock.start_step()
            job.place.whereabouts.begin("reading its tasks")
            with points.waiting():
                _, episodes = next(stream)
            clock.data_ready()
            points.meet()
            met = [broken for episode in episodes for broken in episode.broken]
            job.broken.take(met, step=outer.step + 1)
            tasks = StepTasks(
                _own_tasks(job, episodes, num_dummies=stream.share.num_dummies),
                recipe.outer.tasks_per_step,
                recipe.outer.side_by_side or max(1, len(episodes)),
            )
            job.place.whereabouts.begin("computing its tasks")
            metrics = _one_step(job, tasks, run, keeper.store, left_out)
            metrics |= clock.end_step()
            waited_s = keeper.waited_s()
            if waited_s > 0.0:
                metrics["checkpoint_wait_s"] = waited_s
            if job.broken.count:
                metrics["broken_samples"] = job.broken.count
            state.unfinished = metrics
            if _is_validated(recipe, outer.step) or outer.step == recipe.outer.num_steps:
                _keep_cosines(job, state)
            _finish_step(job, run, keeper, phase)


def _finish_step(job: Job, run: Run, keeper: Keeper, phase: Phase) -> None:
    """What follows on an outer step: validation, the records of it, a checkpoint. A run that is stopped in
    the midst of it begins with this when it goes on."""
    recipe, state = job.recipe, run.state
    outer, progress = state.outer, state.progress
    assert state.unfinished is not None
    metrics, is_best = dict(state.unfinished), False
    if _is_validated(recipe, outer.step):
        job.place.whereabouts.begin("validating")
        validated = validate(job, run.algorithm, outer.evaluation_parameters(), step=outer.step)
        is_best = _is_best(recipe, progress, validated, step=outer.step)
        metrics |= validated
    job.tracker.log(metrics, outer.step)
    state.unfinished = None
    phase.advance(1, **_shown(metrics))
    if _is_over(recipe, state):
        job.place.whereabouts.begin("writing the last checkpoint")
        keeper.save_last(_checkpoint(job, state, metrics))
    elif keeper.is_due(outer.step) or is_best:
        job.place.whereabouts.begin("writing a checkpoint")
        keeper.save(_checkpoint(job, state, metrics))


def _one_step(
    job: Job, tasks: StepTasks, run: Run, store: CheckpointStore, log: LeftOutLog
) -> dict[str, float]:
    """Makes one outer step, and tells of the tasks that it leaves out; returns what to log of it."""
    state = run.state
    number = state.outer.step + 1
    with naming_last_good(store, f"metaloom train --resume {job.place.folder.path}"):
        return outer_step(
            tasks,
            run.algorithm,
            state.combiner,
            state.outer,
            state.scaler,
            on_left_out=lambda left_out: log.take(left_out, step=number),
            points=job.place.points,
        )


def _keep_cosines(job: Job, state: State) -> None:
    """Writes down the cosines of the step that was just done, where they were measured."""
    cosines = state.combiner.cosines
    if cosines is not None and job.sharding.rank == 0:
        record = CosineRecord(state.outer.step, cosines.of, cosines.labels, cosines.values)
        add_cosines(job.place.folder.cosines, record, job.disk)


def _own_tasks(job: Job, episodes: Sequence[Episode], *, num_dummies: int) -> TaskBatch | None:
    """This rank's tasks of one outer step; None where there are fewer tasks than ranks."""
    if not episodes:
        return None
    num_inner = job.recipe.adaptation.num_steps
    return task_batch(job.recipe, episodes, job.place.device, num_steps=num_inner, num_dummies=num_dummies)


def validate(job: Job, algorithm: Algorithm, meta: Mapping[str, Tensor], *, step: int) -> dict[str, float]:
    """Mean query loss and scores over the recipe's validation episodes, always the same ones; and of the
    worst group, where these have groups.

    Every rank must call; each adapts its share.

    Args:
        step: after which they are measured.
    """
    recipe, sharding = job.recipe, job.sharding
    num_episodes = recipe.validation.num_episodes
    measures = ("loss", *algorithm.scores)
    names = (*(f"{name}_before" for name in measures), *measures)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    num_steps = recipe.adaptation.num_steps
    source = episode_source(recipe, job.data, "validation", seed=recipe.seed, num_steps=num_steps)
    own: list[tuple[str | None, tuple[float, ...]]] = []  # of each episode here: its group, what is measured
    for episodes, curve in measured_episodes(
        job, algorithm.curve, meta, source, num_episodes=num_episodes, num_steps=num_steps, step=step
    ):
        for name in measures:
            sums[f"{name}_before"] += curve[name][:, 0].sum().cpu()
            sums[name] += curve[name][:, -1].sum().cpu()
        after = zip(*(curve[name][:, -1].tolist() for name in measures), strict=True)
        own += zip((episode.group for episode in episodes), after, strict=True)
    on_device = {name: value.to(job.place.device) for name, value in sums.items()}
    job.place.points.meet()
    total = sharding.sum_over_ranks(on_device)
    means = {name: float(value) / num_episodes for name, value in total.items()}
    groups, values = zip(*sharding.gather(own), strict=True)
    of_episodes = dict(zip(measures, zip(*values, strict=True), strict=True))
    means |= worst_of_groups(of_episodes, groups)
    return {f"validation_{name}": value for name, value in means.items()}


def _is_best(recipe: Recipe, progress: Progress, validated: Mapping[str, float], *, step: int) -> bool:
    """Takes in one validation; whether it is the best so far.

    Raises:
        RecipeError: what it should be the best by was not measured.
    """
    settings = recipe.validation
    name = f"validation_{settings.best_by}"
    if name not in validated:
        raise RecipeError(
            f"validation.best_by: {settings.best_by}; validations of this run measure "
            f"{', '.join(sorted(key.removeprefix('validation_') for key in validated))}: name one of these."
        )
    min_delta = 0.0 if settings.early_stopping is None else settings.early_stopping.min_delta
    is_higher_better = settings.best_by.endswith("accuracy")
    return progress.take(step, validated[name], is_higher_better=is_higher_better, min_delta=min_delta)


def _checkpoint(job: Job, state: State, metrics: Mapping[str, float]) -> Checkpoint:
    """The run as it is now, and where it comes from: what a new run folder could be made of."""
    recipe = job.recipe
    # All that a stream's position is: the next episode's number, which follows from the step.
    origin = {
        **job.origin,
        "next_episode": state.outer.step * recipe.outer.tasks_per_step,
        "is_finished": _is_over(recipe, state),
    }
    validated = {name: value for name, value in metrics.items() if name.startswith("validation_")}
    return state.checkpoint(origin, validated)


def _first_step(recipe: Recipe, place: Place, resumed: Run | None) -> int:
    """The first step whose metrics this process will write: what is there from it on is dropped."""
    if resumed is not None:
        return resumed.state.outer.step + (resumed.state.unfinished is None)
    if recipe.pretrain is None:
        return 0
    store = CheckpointStore(checkpoint_root(recipe, place.folder, "pretrain"))
    return max(from_rank_0(store.steps), default=0) - recipe.pretrain.num_steps + 1


def _is_over(recipe: Recipe, state: State) -> bool:
    """Whether all outer steps are done, or validation has stopped the run early."""
    early = recipe.validation.early_stopping
    stops_early = early is not None and state.progress.num_worse >= early.patience
    return stops_early or state.outer.step >= recipe.outer.num_steps


def _is_validated(recipe: Recipe, step: int) -> bool:
    """Whether a validation follows on an outer step."""
    every = recipe.validation.every_steps
    return every is not None and (step % every == 0 or step == recipe.outer.num_steps)


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the progress bar shows of a step's metrics."""
    shown = {name: metrics[f"{name}_after"] for name in ("loss", "accuracy") if f"{name}_after" in metrics}
    if "validation_loss" in metrics:
        shown["validation"] = metrics["validation_loss"]
    return shown


class _Clock:
    """Times of one outer step."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start_step(self) -> None:
        self._start_s = time.monotonic()

    def data_ready(self) -> None:
        self._wait_s = time.monotonic() - self._start_s

    def end_step(self) -> dict[str, float]:
        """Throughput over all ranks, the share of the step spent waiting for data, peak memory."""
        seconds = time.monotonic() - self._start_s
        recipe = self._job.recipe
        metrics = {
            "tasks_per_s": recipe.outer.tasks_per_step / seconds,
            "data_wait_share": self._wait_s / seconds,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        num_tokens = tokens_per_task(recipe)
        if num_tokens is not None:
            metrics["tokens_per_s"] = metrics["tasks_per_s"] * num_tokens
        if self._job.place.device.type == "cuda":
            metrics["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(self._job.place.device) / 2**20
        return metrics


def _say_closing(job: Job, state: State, where: str) -> None:
    folder, outer, progress = job.place.folder.path, state.outer, state.progress
    job.console.note(f"meta-trained for {outer.step} outer steps; the run is in {folder}")
    if progress.best_step is not None:
        best_by = job.recipe.validation.best_by.replace("_", " ")
        job.console.note(
            f"best validation {best_by} {progress.best_value:.4f} at outer step {progress.best_step}"
        )
    job.console.note(f"tracked in {where}")
    job.console.note(f"next: metaloom evaluate {folder}")
