"""Ordinary (not meta-) training of a model: before meta-training, and for the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.datasets import Samples, slice_for_rank
from metaloom.engine.learner import cross_entropy
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.replicated import Replicated

OnStep = Callable[[int, Mapping[str, float]], None]
NUM_CHECKPOINTS = 5


def train_ordinary(
    model: nn.Module,
    samples: Samples,
    settings: OuterSettings,
    *,
    batch_size: int,
    precision: Precision,
    sharding: Replicated,
    store: CheckpointStore,
    on_step: OnStep,
) -> dict[str, Tensor]:
    """The model's weights after `settings.num_steps` steps on the mean loss of each batch.

    Goes on from the newest checkpoint in `store`, and leaves five and the last there; so calling it
    again costs nothing. Every rank must call. Each rank takes its share of every batch, so batch
    statistics (of a model that has batch norm) are those of the share.

    Args:
        batch_size: samples per step over all ranks.
        on_step: takes the number of steps done and their `loss` and `accuracy`; called on every rank.
    """
    weights = {name: value.detach() for name, value in model.named_parameters()}
    outer = OuterOptimizer(weights, settings)
    newest = store.load_newest()
    if newest is not None:
        outer.load(newest.tensors, newest.scalars)
        on_step(outer.step, newest.scalars["metrics"])
    rows = slice_for_rank(batch_size, sharding.rank, sharding.world_size)
    while outer.step < settings.num_steps:
        arrays = samples.batch(outer.step, batch_size)
        batch = {name: torch.from_numpy(array[rows.start : rows.stop]) for name, array in arrays.items()}
        gradient, totals = _gradient(model, outer.meta, batch, precision)
        total = sharding.sum_over_ranks(gradient | totals)
        outer.update({name: total[name] / batch_size for name in gradient})
        metrics = {name.removeprefix("metrics/"): float(total[name]) / batch_size for name in totals}
        on_step(outer.step, metrics)
        if (
            outer.step == settings.num_steps
            or outer.step % max(1, settings.num_steps // NUM_CHECKPOINTS) == 0
        ):
            store.save(Checkpoint(outer.step, outer.tensors(), outer.scalars() | {"metrics": metrics}))
    return dict(outer.meta)


def _gradient(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor], precision: Precision
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the summed loss of this rank's samples, and the sums of loss and accuracy."""
    parameters = {name: value.detach().requires_grad_() for name, value in weights.items()}
    device = next(iter(parameters.values())).device
    targets = batch["targets"].to(device)[None]
    inputs = batch["inputs"].to(device)
    inputs = inputs.to(precision.storage_dtype) if inputs.is_floating_point() else inputs
    with precision.autocast(device):
        logits: Tensor = functional_call(model, parameters, (inputs,), tie_weights=True)[None]
    loss = cross_entropy(logits, targets).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    right = (logits.detach().argmax(-1) == targets).view(*targets.shape[:2], -1)  # [1, N, L or 1]
    accuracy = right.double().mean(2).sum()
    totals = {"metrics/loss": loss.detach().double(), "metrics/accuracy": accuracy}
    return dict(zip(parameters, grads, strict=True)), totals
