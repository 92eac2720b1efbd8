"""From a recipe to the tasks that are computed, not read."""

from __future__ import annotations

import hashlib
import json

from metaloom.datasets import synthetic
from metaloom.recipe import (
    Equivariant1dTask,
    Equivariant2dTask,
    NonExclusiveSinusoidTask,
    SinusoidTask,
    SyntheticData,
    UnequalScalesTask,
)


def computed_digest(section: SyntheticData) -> str:
    """SHA-256 (hexadecimal) of what synthetic tasks follow from, but for the seed: section and generator."""
    data = section.model_dump(mode="json")
    if section.task_noise is None:
        del data["task_noise"]  # so that data which are the same have the digest that they had before it
    values = {"version": synthetic.GENERATOR_VERSION, "data": data}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def computed_episodes(section: SyntheticData, split: str, *, seed: int) -> synthetic.SyntheticEpisodes:
    """The tasks of a split."""
    num_tasks = {
        "train": section.num_train_tasks,
        "validation": section.num_validation_tasks,
        "test": section.num_test_tasks,
    }
    return synthetic.SyntheticEpisodes(
        _family(section),
        split,
        num_support=section.num_support,
        num_query=section.num_query,
        num_tasks=num_tasks[split],
        seed=seed,
    )


def computed_samples(section: SyntheticData, *, seed: int) -> synthetic.SyntheticSamples:
    """Examples of training tasks."""
    return synthetic.SyntheticSamples(
        _family(section),
        "train",
        num_tasks=section.num_train_tasks,
        num_examples=section.num_support + section.num_query,
        seed=seed,
    )


def _family(section: SyntheticData) -> synthetic.TaskFamily:
    match section.task:
        case SinusoidTask():
            return synthetic.Sinusoids()
        case NonExclusiveSinusoidTask(num_amplitudes=num_amplitudes, noise_std=noise_std):
            return synthetic.NonExclusiveSinusoids(num_amplitudes=num_amplitudes, noise_std=noise_std)
        case Equivariant1dTask(rank=rank, length=length, filter_size=filter_size):
            return synthetic.Equivariant1d(rank=rank, length=length, filter_size=filter_size)
        case Equivariant2dTask() as task:
            return synthetic.Equivariant2d(
                turns=task.turns,
                flips=task.flips,
                size=task.size,
                num_filters=task.num_filters,
                filter_size=task.filter_size,
            )
        case UnequalScalesTask(scales=scales, length=length, num_targets=num_targets):
            return synthetic.UnequalScales(
                scales=dict(zip(section.groups, scales, strict=True)), length=length, num_targets=num_targets
            )
