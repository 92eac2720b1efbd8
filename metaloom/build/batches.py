"""From episodes to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metaloom.datasets import Episode
from metaloom.datasets.pixels import as_numbers, of_one_form
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Precision
from metaloom.recipe import (
    Recipe,
)
from metaloom.recipe.tasks import num_rehearsed, task_facts


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
        groups=tuple(episode.group for episode in episodes),
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
