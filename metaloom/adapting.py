"""Adaptation to episodes that are only measured: for validation during training, and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from metaloom.build import task_batch
from metaloom.datasets import Episode, EpisodeSource, slice_for_rank
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.unroll import Unroll
from metaloom.job import Job


def measured_episodes(
    job: Job,
    unroll: Unroll,
    meta: Mapping[str, Tensor],
    source: EpisodeSource,
    *,
    num_episodes: int,
    num_steps: int,
) -> Iterator[tuple[list[Episode], dict[str, Tensor]]]:
    """This rank's share of episodes 0 .. `num_episodes` - 1, some at a time, each with its adaptation curve.

    Args:
        num_steps: inner steps.
    """
    recipe, sharding = job.recipe, job.sharding
    numbers = slice_for_rank(num_episodes, sharding.rank, sharding.world_size)
    size = recipe.outer.micro_batch or math.ceil(recipe.outer.tasks_per_step / sharding.world_size)
    for start in range(0, len(numbers), size):
        episodes = [source.episode(number) for number in numbers[start : start + size]]
        batch = task_batch(recipe, episodes, job.place.device, num_steps=num_steps)
        yield episodes, adaptation_curve(unroll, meta, batch, num_steps=num_steps)
