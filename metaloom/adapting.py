"""Adaptation to episodes that are only measured: for validation during training, and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from metaloom.build import task_batch
from metaloom.datasets import BrokenSample, Episode, EpisodeSource, drawn_ahead, share_of_rank
from metaloom.engine.evaluation import Curve
from metaloom.job import Job


def measured_episodes(
    job: Job,
    curve: Curve,
    meta: Mapping[str, Tensor],
    source: EpisodeSource,
    *,
    num_episodes: int,
    num_steps: int,
    step: int | None,
) -> Iterator[tuple[list[Episode], dict[str, Tensor]]]:
    """This rank's share of episodes 0 .. `num_episodes` - 1, some at a time, each with its adaptation curve.

    Every rank must call. Dummies are adapted to as well, so that ranks in lockstep do the same, and dropped.

    Args:
        curve: how a task is adapted to and measured.
        num_steps: inner steps.
        step: of the training that they are measured in; None outside of it.
    """
    recipe, sharding = job.recipe, job.sharding
    share = share_of_rank(num_episodes, sharding.rank, sharding.world_size, is_lockstep=sharding.is_lockstep)
    num_real = len(share.positions) - share.num_dummies
    size = recipe.outer.micro_batch or math.ceil(recipe.outer.tasks_per_step / sharding.world_size)
    # What is adapted to next is drawn in the meantime.
    broken: list[BrokenSample] = []
    num_workers = recipe.loading.num_workers
    with drawn_ahead(source.episode, share.positions, read_ahead=2 * size, num_workers=num_workers) as drawn:
        for start in range(0, len(share.positions), size):
            episodes = drawn.take(size)
            broken += (each for episode in episodes for each in episode.broken)
            batch = task_batch(recipe, episodes, job.place.device, num_steps=num_steps)
            measured = curve(meta, batch, num_steps=num_steps)
            count = min(len(episodes), num_real - start)
            if count > 0:
                yield episodes[:count], {name: value[:count] for name, value in measured.items()}
    job.broken.take(broken, step=step)
