"""Ordinary (not meta-) training of a model: before meta-training, and for the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.datasets import Samples, slice_for_rank
from metaloom.engine.draws import Draws
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.engine.losses import cross_entropy, example_means, is_right
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.unroll import leaves
from metaloom.errors import CheckpointError
from metaloom.job import Job

NUM_CHECKPOINTS = 5
LOG_EVERY = 10


def train_ordinary(
    job: Job,
    model: nn.Module,
    samples: Samples,
    settings: OuterSettings,
    *,
    batch_size: int,
    phase_name: str,
    shown_name: str,
) -> dict[str, Tensor]:
    """The model's weights after `settings.num_steps` steps on the mean loss of each batch.

    Goes on from the newest checkpoint of the phase if that was made by the same settings, and leaves the
    last one there; so calling it again costs nothing. Every rank must call. Each rank takes its share of
    every batch, so batch statistics (of a model that has batch norm) are those of the share.

    Loss and accuracy are logged as `<phase>/loss` and `<phase>/accuracy` at steps below 0, so that step 0
    is where meta-training begins.

    Args:
        batch_size: samples per step over all ranks.
        phase_name: names the checkpoints and metrics.
        shown_name: names the progress bar.
    """
    store = CheckpointStore(job.place.folder.checkpoints(phase_name), keep_last=1)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    outer = OuterOptimizer(weights, settings, job.sharding)
    made_by = dataclasses.asdict(settings) | {"batch_size": batch_size}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        # Batch statistics are those of a rank's share: with other shares it is another training.
        made_by["world_size"] = job.sharding.world_size
    made_by["betas"] = list(settings.betas)  # as JSON has it
    newest = store.load_newest(job.console.warn)
    if newest is not None and newest.scalars["made_by"] != made_by:
        job.console.note(f"{shown_name}: trained anew, since its settings or its length have changed")
        store.clear()
        newest = None
    if newest is not None:
        outer.load(newest.tensors, newest.scalars)
    if outer.step == settings.num_steps:
        return dict(outer.meta)
    precision = Precision(job.recipe.precision.compute)
    scaler = LossScaler(precision)
    if newest is not None:
        scaler.load(newest.scalars["scaler"])
    rows = slice_for_rank(batch_size, job.sharding.rank, job.sharding.world_size)
    checkpoint_every = max(1, settings.num_steps // NUM_CHECKPOINTS)
    with job.console.phase(shown_name, total=settings.num_steps, num_done=outer.step) as phase:
        while outer.step < settings.num_steps:
            job.place.whereabouts.enter(f"step {outer.step + 1} of {shown_name}")
            arrays = samples.batch(outer.step, batch_size)
            batch = {name: torch.from_numpy(array[rows.start : rows.stop]) for name, array in arrays.items()}
            draws = Draws(job.recipe.seed, tuple(rows), outer.step)
            gradient, totals = _gradient(model, outer.meta, batch, precision, draws, scaler.scales.loss)
            total = job.sharding.sum_over_ranks(gradient | totals)
            mean = {name: total[name] / (batch_size * scaler.scales.loss) for name in gradient}
            updated = outer.update(mean, is_expected=scaler.can_shrink)
            scaler.update(is_finite=updated["skipped"] == 0.0)
            metrics = {name: float(total[f"metrics/{name}"]) / batch_size for name in ("loss", "accuracy")}
            phase.advance(1, **metrics)
            if outer.step % LOG_EVERY == 0:
                named = {f"{phase_name}/{name}": value for name, value in metrics.items()}
                job.tracker.log(named, outer.step - settings.num_steps)
            if outer.step == settings.num_steps or outer.step % checkpoint_every == 0:
                scalars = outer.scalars() | {"made_by": made_by, "scaler": scaler.scalars()}
                store.save(Checkpoint(outer.step, outer.tensors(), scalars))
    return dict(outer.meta)


def finished_weights(job: Job, phase_name: str, *, num_steps: int) -> dict[str, Tensor]:
    """The weights that `train_ordinary` has left after its last step. Every rank must call.

    Raises:
        CheckpointError: they are missing, or of an earlier step.
    """
    store = CheckpointStore(job.place.folder.checkpoints(phase_name))
    newest = store.load_newest(job.console.warn)
    if newest is None or newest.step != num_steps:
        raise CheckpointError(
            f"{store.root} has no valid checkpoint of step {num_steps}, from which this run went on. Restore "
            "that folder, or start a new run."
        )
    return {name: value.to(job.place.device) for name, value in newest.under("meta/").items()}


def _gradient(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    precision: Precision,
    draws: Draws,
    scale: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of `scale` times the summed loss of this rank's samples, and the sums of loss and
    accuracy.

    Args:
        draws: dropout's, one "task" for each sample, so that the world size changes none.
    """
    if not len(batch["targets"]):  # more ranks than samples
        nothing = torch.zeros((), dtype=torch.float64, device=next(iter(weights.values())).device)
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return zeros, {"metrics/loss": nothing, "metrics/accuracy": nothing.clone()}
    parameters = leaves(weights)
    device = next(iter(parameters.values())).device
    targets = batch["targets"].to(device)[None]
    inputs = batch["inputs"].to(device)
    inputs = inputs.to(precision.storage_dtype) if inputs.is_floating_point() else inputs
    with Interception(ForwardPass(precision, device, draws=draws)), precision.autocast(device):
        logits: Tensor = functional_call(model, parameters, (inputs,), tie_weights=True)[None]
    loss = cross_entropy(logits, targets).sum()
    grads = torch.autograd.grad(scale * loss, list(parameters.values()))
    accuracy = example_means(is_right(logits, targets).double()).sum()
    totals = {"metrics/loss": loss.detach().double(), "metrics/accuracy": accuracy}
    return dict(zip(parameters, grads, strict=True)), totals
