"""Meta-training: the parts of a run, put together, and the outer loop."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
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
from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.checkpoints.store import require_same_tensors
from metaloom.choosing import choose
from metaloom.datasets import Episode, EpisodeSource, EpisodeStream
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.learner import TaskBatch
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero
from metaloom.engine.step import StepTasks, outer_step
from metaloom.files import replace_file
from metaloom.group_measures import worst_of_groups
from metaloom.job import Job, Place, open_job, stored_room
from metaloom.last_good import naming_last_good
from metaloom.left_out_log import LeftOutLog
from metaloom.ordinary import finished_weights, train_ordinary
from metaloom.recipe import Pretrain, Recipe
from metaloom.recipe.tasks import tokens_per_task
from metaloom.sources import episode_source, pretraining_samples
from metaloom.tracking.cosines import CosineRecord, add_cosines
from metaloom.weights import HeldModel


def train(recipe: Recipe, place: Place) -> None:
    """Meta-trains by a recipe, from the newest checkpoint in the run folder or from the start.

    Every rank must call.

    Raises:
        MetaloomError: the data, a checkpoint or the tracking store cannot be used.
    """
    notes: list[str] = []
    sharding = build_sharding(recipe, place.device)
    store = CheckpointStore(
        place.folder.checkpoints("meta"),
        keep_last=recipe.checkpoint.keep_last,
        room=stored_room(sharding),
    )
    newest = store.load_newest(notes.append)
    first_step = _first_step(recipe, place, newest)
    with open_job(recipe, place, sharding, is_training=True, first_step=first_step) as job:
        for note in notes:
            job.console.warn(note)
        job.tracker.artifact(place.folder.recipe)
        model = build_model(recipe, place.device, sharding)
        # Before any training: what is refused must not cost a pre-training.
        if newest is not None:
            choices = Choices.load(newest.scalars["choices"])
        else:
            choices = choose(job, model, _train_source(job))
        algorithm = build_algorithm(recipe, model, choices, place.device, sharding=job.sharding)
        if recipe.pretrain is not None:
            is_resumed = newest is not None
            model.load(_pretrained(job, recipe.pretrain, model, must_be_done=is_resumed))
        outer = OuterOptimizer(
            algorithm.meta_parameters(),
            outer_settings(recipe),
            job.sharding,
            tracked=algorithm.tracked(),
        )
        model.hold_once(outer.meta)
        if isinstance(job.sharding, DeepSpeedZero):
            _tell_of_deepspeed(job, job.sharding)
        combiner = build_combiner(recipe, outer.meta, job.sharding, metric_names=algorithm.metric_names)
        state = State(outer, combiner, LossScaler(Precision(recipe.precision.compute)), Progress(), choices)
        if newest is not None:
            require_same_tensors(outer.stored_meta(), newest.under("meta/"), source=store.root)
            state.load(newest)
            job.console.note(f"resumed after outer step {outer.step} of {recipe.outer.num_steps}")
        _outer_loop(job, algorithm, state, store)
        if job.sharding.rank == 0 and job.place.folder.cosines.exists():
            job.tracker.artifact(job.place.folder.cosines)
        where = job.tracker.describe()
    if job.sharding.rank == 0:
        _say_closing(job, state, where)


@dataclasses.dataclass
class Progress:
    """What decides on the best step and on an early stop; saved with every checkpoint.

    Attributes:
        best_step: the outer step with the lowest validation loss so far, None before the first.
        best_loss: that loss.
        num_worse: validations in a row that did not improve on the best before them by `min_delta`.
    """

    best_step: int | None = None
    best_loss: float | None = None
    num_worse: int = 0

    def take(self, step: int, loss: float, *, min_delta: float) -> bool:
        """Takes in one validation; True if it is the best so far."""
        best = math.inf if self.best_loss is None else self.best_loss
        self.num_worse = 0 if loss < best - min_delta else self.num_worse + 1
        if not loss < best:
            return False
        self.best_step, self.best_loss = step, loss
        return True


@dataclasses.dataclass
class State:
    """What a run is, apart from its recipe: what a checkpoint holds."""

    outer: OuterOptimizer
    combiner: Combiner
    scaler: LossScaler
    progress: Progress
    choices: Choices

    def checkpoint(self) -> Checkpoint:
        """Everything that the next outer step depends on."""
        scalars = self.outer.scalars() | {
            "combiner": self.combiner.scalars(),
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.scalars(),
            "choices": self.choices.scalars(),
        }
        return Checkpoint(self.outer.step, self.outer.tensors(), scalars)

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over what `checkpoint` returned; the choices are made before."""
        self.outer.load(checkpoint.tensors, checkpoint.scalars)
        # Before tasks could be combined otherwise, there was nothing to keep.
        self.combiner.load(checkpoint.scalars.get("combiner", {}))
        self.scaler.load(checkpoint.scalars["scaler"])
        self.progress = Progress(**checkpoint.scalars["progress"])


def _train_source(job: Job) -> EpisodeSource:
    recipe = job.recipe
    num_inner = recipe.adaptation.num_steps
    return episode_source(recipe, job.data, "train", seed=recipe.seed, num_steps=num_inner)


def _pretrained(job: Job, pretrain: Pretrain, model: HeldModel, *, must_be_done: bool) -> dict[str, Tensor]:
    """The weights after the recipe's ordinary training phase, from its checkpoint if it is done."""
    if must_be_done:
        return finished_weights(job, "pretrain", num_steps=pretrain.num_steps)
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
        replace_file(job.place.folder.deepspeed, json.dumps(sharding.config, indent=1))
    job.console.note(sharding.describe())
    job.tracker.artifact(job.place.folder.deepspeed)


def _outer_loop(job: Job, algorithm: Algorithm, state: State, store: CheckpointStore) -> None:
    recipe, sharding = job.recipe, job.sharding
    outer, progress = state.outer, state.progress
    num_inner = recipe.adaptation.num_steps
    validation = episode_source(recipe, job.data, "validation", seed=recipe.seed, num_steps=num_inner)
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
    phases = job.console.phase("meta-train", total=recipe.outer.num_steps, num_done=outer.step)
    with stream, phases as phase:
        while outer.step < recipe.outer.num_steps and not _stops_early(recipe, progress):
            job.place.whereabouts.enter(f"outer step {outer.step + 1}")
            clock.start_step()
            _, episodes = next(stream)
            clock.data_ready()
            met = [broken for episode in episodes for broken in episode.broken]
            job.broken.take(met, step=outer.step + 1)
            tasks = StepTasks(
                _own_tasks(job, episodes, num_dummies=stream.share.num_dummies),
                recipe.outer.tasks_per_step,
                recipe.outer.side_by_side or max(1, len(episodes)),
            )
            metrics = _one_step(job, tasks, algorithm, state, store, left_out)
            metrics |= clock.end_step()
            if job.broken.count:
                metrics["broken_samples"] = job.broken.count
            is_best = False
            if _is_due(outer.step, recipe.validation.every_steps, recipe.outer.num_steps):
                parameters = outer.evaluation_parameters()
                metrics |= validate(job, algorithm, parameters, validation, step=outer.step)
                early = recipe.validation.early_stopping
                min_delta = 0.0 if early is None else early.min_delta
                is_best = progress.take(outer.step, metrics["validation_loss"], min_delta=min_delta)
            job.tracker.log(metrics, outer.step)
            phase.advance(1, **_shown(metrics))
            if "validation_loss" in metrics or outer.step == recipe.outer.num_steps:
                _keep_cosines(job, state)
            is_last = outer.step == recipe.outer.num_steps or _stops_early(recipe, progress)
            if is_best or is_last or clock.is_checkpoint_due(outer.step):
                _save(store, state)
                clock.checkpoint_done()


def _one_step(
    job: Job, tasks: StepTasks, algorithm: Algorithm, state: State, store: CheckpointStore, log: LeftOutLog
) -> dict[str, float]:
    """Makes one outer step, and tells of the tasks that it leaves out; returns what to log of it."""
    number = state.outer.step + 1
    with naming_last_good(store, f"metaloom train --resume {job.place.folder.path}"):
        return outer_step(
            tasks,
            algorithm,
            state.combiner,
            state.outer,
            state.scaler,
            on_left_out=lambda left_out: log.take(left_out, step=number),
        )


def _keep_cosines(job: Job, state: State) -> None:
    """Writes down the cosines of the step that was just done, where they were measured."""
    cosines = state.combiner.cosines
    if cosines is not None and job.sharding.rank == 0:
        record = CosineRecord(state.outer.step, cosines.of, cosines.labels, cosines.values)
        add_cosines(job.place.folder.cosines, record)


def _own_tasks(job: Job, episodes: Sequence[Episode], *, num_dummies: int) -> TaskBatch | None:
    """This rank's tasks of one outer step; None where there are fewer tasks than ranks."""
    if not episodes:
        return None
    num_inner = job.recipe.adaptation.num_steps
    return task_batch(job.recipe, episodes, job.place.device, num_steps=num_inner, num_dummies=num_dummies)


def validate(
    job: Job, algorithm: Algorithm, meta: Mapping[str, Tensor], source: EpisodeSource, *, step: int
) -> dict[str, float]:
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
    total = sharding.sum_over_ranks(on_device)
    means = {name: float(value) / num_episodes for name, value in total.items()}
    groups, values = zip(*sharding.gather(own), strict=True)
    of_episodes = dict(zip(measures, zip(*values, strict=True), strict=True))
    means |= worst_of_groups(of_episodes, groups)
    return {f"validation_{name}": value for name, value in means.items()}


def _save(store: CheckpointStore, state: State) -> None:
    best_step = state.progress.best_step
    store.save(state.checkpoint(), protect=frozenset() if best_step is None else frozenset({best_step}))


def _first_step(recipe: Recipe, place: Place, newest: Checkpoint | None) -> int:
    """The first step whose metrics this process will write: what is there from it on is dropped."""
    if newest is not None:
        return newest.step + 1
    if recipe.pretrain is None:
        return 0
    store = CheckpointStore(place.folder.checkpoints("pretrain"))
    return max(store.steps(), default=0) - recipe.pretrain.num_steps + 1


def _stops_early(recipe: Recipe, progress: Progress) -> bool:
    early = recipe.validation.early_stopping
    return early is not None and progress.num_worse >= early.patience


def _is_due(step: int, every: int | None, last: int) -> bool:
    return every is not None and (step % every == 0 or step == last)


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the progress bar shows of a step's metrics."""
    shown = {name: metrics[f"{name}_after"] for name in ("loss", "accuracy") if f"{name}_after" in metrics}
    if "validation_loss" in metrics:
        shown["validation"] = metrics["validation_loss"]
    return shown


class _Clock:
    """Times of one outer step, and when the next checkpoint is due by time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_checkpoint_s = time.monotonic()

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

    def is_checkpoint_due(self, step: int) -> bool:
        """By steps or by rank 0's clock. Every rank must call."""
        settings = self._job.recipe.checkpoint
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return True
        if settings.every_minutes is None:
            return False
        late = time.monotonic() - self._last_checkpoint_s >= 60.0 * settings.every_minutes
        flag = torch.tensor([int(late)])
        if dist.is_initialized():
            dist.broadcast(flag, src=0)
        return bool(flag.item())

    def checkpoint_done(self) -> None:
        self._last_checkpoint_s = time.monotonic()


def _say_closing(job: Job, state: State, where: str) -> None:
    folder, outer, progress = job.place.folder.path, state.outer, state.progress
    job.console.note(f"meta-trained for {outer.step} outer steps; the run is in {folder}")
    if progress.best_step is not None:
        job.console.note(f"best validation loss {progress.best_loss:.4f} at outer step {progress.best_step}")
    job.console.note(f"tracked in {where}")
    job.console.note(f"next: metaloom evaluate {folder}")
