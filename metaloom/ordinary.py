"""Ordinary (not meta-) training of a model: before meta-training, and for the baselines."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaloom.build import as_tensors, model_structure, task_output
from metaloom.checkpoints.retention import Retention
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.datasets import Samples, drawn_ahead, share_of_rank
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.draws import Draws
from metaloom.engine.hypergradients.base import prefixed, unprefixed
from metaloom.engine.ordinary import ordinary_gradient
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import CheckpointError
from metaloom.job import Job, Place
from metaloom.keeping import Keeper, checkpoint_root, held_rooms
from metaloom.last_good import naming_last_good
from metaloom.recipe import Recipe
from metaloom.weights import HeldModel

NUM_CHECKPOINTS = 5
LOG_EVERY = 10


def train_ordinary(
    job: Job,
    model: HeldModel,
    samples: Samples,
    settings: OuterSettings,
    *,
    batch_size: int,
    phase_name: str,
    shown_name: str,
) -> dict[str, Tensor]:
    """What this rank holds of the model's weights after `settings.num_steps` steps on the mean loss of each
    batch.

    Goes on from the newest checkpoint of the phase if that was made by the same settings, and leaves the
    last one there; so calling it again costs nothing. A training that is stopped is saved first. Every rank
    must call. Each rank takes its share of every batch, so batch statistics (of a model that has batch norm)
    are those of the share, dummies included.

    Loss and accuracy are logged as `<phase>/loss` and `<phase>/accuracy` at steps below 0, so that step 0
    is where meta-training begins.

    Args:
        batch_size: samples per step over all ranks.
        phase_name: names the checkpoints and metrics.
        shown_name: names the progress bar.

    Raises:
        Stopped: the job was asked to stop.
    """
    root = checkpoint_root(job.recipe, job.place.folder, phase_name)
    timeout = datetime.timedelta(seconds=job.recipe.launcher.timeout_s)
    store = CheckpointStore(root, retention=Retention(last=1), lease=job.lease, timeout=timeout)
    store.remove_remains()
    outer = OuterOptimizer(prefixed(BACKBONE, model.values()), settings, job.sharding)
    made_by = dataclasses.asdict(settings) | {"batch_size": batch_size}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.module.modules()):
        # Batch statistics are those of a rank's share: with other shares it is another training.
        made_by["world_size"] = job.sharding.world_size
    made_by["betas"] = list(settings.betas)  # as JSON has it
    newest = store.load_newest(job.console.warn, held_rooms(job.sharding))
    if newest is not None and newest.scalars["made_by"] != made_by:
        job.console.note(f"{shown_name}: trained anew, since its settings or its length have changed")
        store.clear()
        newest = None
    if newest is not None:
        outer.load(newest.tensors, newest.scalars)
    if outer.step == settings.num_steps:
        return unprefixed(BACKBONE, outer.meta)
    precision = Precision(job.recipe.precision.compute)
    scaler = LossScaler(precision)
    if newest is not None:
        scaler.load(newest.scalars["scaler"])
    share = share_of_rank(
        batch_size, job.sharding.rank, job.sharding.world_size, is_lockstep=job.sharding.is_lockstep
    )
    rows = list(share.positions)
    run = job.place.folder.path
    resuming = f"metaloom train --resume {run}" if phase_name == "pretrain" else f"metaloom evaluate {run}"
    checkpoint_every = max(1, settings.num_steps // NUM_CHECKPOINTS)
    ahead = drawn_ahead(
        functools.partial(samples.batch, size=batch_size),
        range(outer.step, settings.num_steps),
        read_ahead=job.recipe.loading.read_ahead,
        num_workers=job.recipe.loading.num_workers,
        noun="batch",
    )
    keeper = Keeper(
        job, store, last_step=None if newest is None else newest.step, noun=f"step {{}} of {shown_name}"
    )

    def checkpoint() -> Checkpoint:
        scalars = outer.scalars() | {"made_by": made_by, "scaler": scaler.scalars()}
        return Checkpoint(outer.step, outer.tensors(), scalars)

    with (
        ahead,
        keeper.saving_when_stopped(checkpoint),
        job.console.phase(shown_name, total=settings.num_steps, num_done=outer.step) as phase,
    ):
        while outer.step < settings.num_steps:
            job.place.whereabouts.enter(f"step {outer.step + 1} of {shown_name}")
            job.place.whereabouts.begin("reading its samples")
            with job.place.points.waiting():
                drawn = next(ahead)
            job.place.points.meet()
            job.broken.take(drawn.broken, step=outer.step + 1 - settings.num_steps)
            arrays = {name: array[rows] for name, array in drawn.arrays.items()}
            job.place.whereabouts.begin("computing its samples")
            batch = as_tensors(arrays, job.place.device)
            draws = Draws(job.recipe.seed, share.positions, outer.step)
            own, totals = _gradient(job, model, outer, batch, draws, scaler.scales.loss, share.num_dummies)
            gradient = job.sharding.sum_gradients(own)
            total = job.sharding.sum_over_ranks(totals)
            mean = {name: value / (batch_size * scaler.scales.loss) for name, value in gradient.items()}
            with naming_last_good(store, resuming):
                updated = outer.update(mean, is_expected=scaler.can_shrink)
            scaler.update(is_finite=updated["skipped"] == 0.0)
            metrics = {name: float(value) / batch_size for name, value in total.items()}
            phase.advance(1, **metrics)
            if outer.step % LOG_EVERY == 0:
                named = {f"{phase_name}/{name}": value for name, value in metrics.items()}
                job.tracker.log(named, outer.step - settings.num_steps)
            if outer.step == settings.num_steps:
                keeper.save_last(checkpoint())
            elif keeper.is_due(outer.step) or outer.step % checkpoint_every == 0:
                keeper.save(checkpoint())
    return unprefixed(BACKBONE, outer.meta)


def finished_weights(
    recipe: Recipe,
    place: Place,
    sharding: Sharding,
    phase_name: str,
    *,
    num_steps: int,
    on_skip: Callable[[str], None],
) -> dict[str, Tensor]:
    """What this rank holds of the weights that `train_ordinary` has left after its last step. Every rank must
    call.

    Args:
        on_skip: called on rank 0 with one line for each checkpoint that was passed over.

    Raises:
        CheckpointError: they are missing, or of an earlier step.
    """
    store = CheckpointStore(checkpoint_root(recipe, place.folder, phase_name))
    newest = store.load_newest(on_skip, held_rooms(sharding))
    if newest is None or newest.step != num_steps:
        raise CheckpointError(
            f"{store.shown} has no valid checkpoint of step {num_steps}, from which this run went on. "
            "Restore that folder, or start a new run."
        )
    return {
        name: sharding.held(value).to(place.device)
        for name, value in newest.under(f"meta/{BACKBONE}").items()
    }


def _gradient(
    job: Job,
    model: HeldModel,
    outer: OuterOptimizer,
    batch: dict[str, Tensor],
    draws: Draws,
    scale: float,
    num_dummies: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of `scale` times the summed loss of this rank's samples, and the sums of loss and
    accuracy.

    Args:
        num_dummies: how many of the last samples do not count.
    """
    if not len(batch["targets"]):  # more ranks than samples
        nothing = torch.zeros((), dtype=torch.float64, device=job.place.device)
        zeros = {name: torch.zeros_like(value) for name, value in outer.meta.items()}
        names = ("loss", *task_output(job.recipe).criterion.scores)
        return zeros, {name: nothing.clone() for name in names}
    output = task_output(job.recipe)
    gradient, totals = ordinary_gradient(
        model.module,
        model_structure(model.module),
        unprefixed(BACKBONE, outer.meta),
        batch,
        Precision(job.recipe.precision.compute),
        draws=draws,
        scale=scale,
        num_dummies=num_dummies,
        recompute_blocks=job.recipe.memory.recompute_blocks,
        shards=model.shards,
        criterion=output.criterion,
        head=output.head,
    )
    return prefixed(BACKBONE, gradient), totals
