"""Adaptation to episodes that are only measured: for validation during training, and for evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from metaloom.build import task_batch
from metaloom.datasets import BrokenSample, Episode, EpisodeSource, drawn_ahead, share_of_rank
from metaloom.engine.evaluation import Curve
from metaloom.engine.losses import bits
from metaloom.job import Job
from metaloom.sources import episode_source


@dataclasses.dataclass(frozen=True)
class EpisodeCurve:
    """What adaptation did on one episode.

    Attributes:
        task: what the episode is clustered by.
        metric: after 0 .. K steps.
        retention: loss on data that was not rehearsed, before and after; None where there is none.
        group: of the episode; None where it has none.
    """

    task: str
    metric: tuple[float, ...]
    retention: tuple[float, float] | None
    group: str | None = None


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
            with job.place.points.waiting():
                episodes = drawn.take(size)
            broken += (each for episode in episodes for each in episode.broken)
            batch = task_batch(recipe, episodes, job.place.device, num_steps=num_steps)
            job.place.points.between_passes()
            measured = curve(meta, batch, num_steps=num_steps)
            count = min(len(episodes), num_real - start)
            if count > 0:
                yield episodes[:count], {name: value[:count] for name, value in measured.items()}
    # One that is to stop does so in its own tasks, where the others would wait for it in what comes next.
    job.place.points.meet()
    job.broken.take(broken, step=step)


def evaluation_source(job: Job, split: str) -> EpisodeSource:
    """The episodes of an evaluation, of the split `validation` to tune by or `test` to judge by."""
    # Another seed than training's and validation's: the tuning must not see the test's draws.
    recipe = job.recipe
    return episode_source(
        recipe, job.data, split, seed=recipe.seed + 1, num_steps=recipe.evaluation_num_steps
    )


def episode_curves(
    job: Job,
    curve: Curve,
    meta: Mapping[str, Tensor],
    source: EpisodeSource,
    num_episodes: int,
    *,
    metric: str,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[EpisodeCurve]:
    """The curves of episodes 0 .. `num_episodes` - 1 of an evaluation, on every rank. Every rank must call.

    Args:
        metric: `accuracy`; else the loss, in bits where its name says so.
        on_done: is told how many episodes were measured, some at a time.
    """
    curves: list[EpisodeCurve] = []
    num_steps = job.recipe.evaluation_num_steps
    for episodes, measured in measured_episodes(
        job, curve, meta, source, num_episodes=num_episodes, num_steps=num_steps, step=None
    ):
        values = measured["accuracy" if metric == "accuracy" else "loss"].tolist()
        retention = measured["retention_loss"].tolist() if "retention_loss" in measured else None
        for row, episode in enumerate(episodes):
            unit = bits if metric.startswith("bits") else float
            pair = None if retention is None else (unit(retention[row][0]), unit(retention[row][1]))
            points = tuple(unit(value) for value in values[row])
            curves.append(EpisodeCurve(episode.task, points, pair, episode.group))
        on_done(len(episodes))
    job.place.points.meet()
    return job.sharding.gather(curves)
