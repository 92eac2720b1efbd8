"""What a recipe leaves to be chosen by measuring: made once, on the first tasks, and kept to."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from metaloom.build import (
    Choices,
    Tasks,
    build_adapter,
    build_unroll,
    initial_meta,
    task_batch,
)
from metaloom.datasets import EpisodeSource, share_of_rank
from metaloom.engine.choice import choose_estimator, fastest, shortened
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll
from metaloom.job import Job
from metaloom.recipe import AutoHypergradient, Recipe
from metaloom.weights import HeldModel

FREE_SHARE = 0.5
TIMED_STEPS = 2
CGROUP = Path("/sys/fs/cgroup")


def choose(job: Job, model: HeldModel, source: EpisodeSource) -> Choices:
    """Measures what the recipe leaves open on the first outer step's tasks, and tells what was chosen.

    Every rank must call, and chooses the same.

    Args:
        source: training episodes.
    """
    # Tasks are drawn only where there is something to measure on them.
    batch = _first_batch(job, source) if _is_open(job.recipe) else None
    choices = Choices(tasks=_tasks(job, model, batch))
    estimator = None if job.recipe.maml is None else job.recipe.maml.hypergradient
    if not isinstance(estimator, AutoHypergradient):
        return choices
    unroll = _unroll(job.recipe, model, choices)
    limit = _free_bytes(job) if estimator.limit_gib is None else int(estimator.limit_gib * 2**30)
    chosen, why = choose_estimator(
        unroll,
        initial_meta(job.recipe, unroll),
        batch,
        memory_limit_bytes=limit,
        sharding=job.sharding,
    )
    job.console.note(f"hypergradient: {why}")
    return Choices(choices.tasks, chosen)


def _is_open(recipe: Recipe) -> bool:
    """Whether a recipe leaves anything to be chosen."""
    if recipe.maml is None:
        return False
    return isinstance(recipe.maml.hypergradient, AutoHypergradient) or len(recipe.task_ways) > 1


def _tasks(job: Job, model: HeldModel, batch: TaskBatch | None) -> Tasks:
    """How tasks are put side by side where every weight is fast."""
    names = job.recipe.task_ways
    if len(names) == 1:
        return names[0]
    estimator = Rematerialized()

    def differentiate(tasks: Tasks) -> None:
        if batch is not None:
            unroll = shortened(_unroll(job.recipe, model, Choices(tasks=tasks)), TIMED_STEPS)
            estimator.meta_gradient(unroll, initial_meta(job.recipe, unroll), batch)

    ways: dict[str, Callable[[], object]] = {name: functools.partial(differentiate, name) for name in names}
    measured = fastest(ways, job.place.device, job.sharding, has_tasks=batch is not None)
    job.console.note(f"tasks side by side: {measured.name} ({measured.in_words()})")
    return next(name for name in names if name == measured.name)


def _unroll(recipe: Recipe, model: HeldModel, choices: Choices) -> Unroll:
    rule = recipe.adaptation.rule
    return build_unroll(recipe, build_adapter(recipe, model, choices), rate=rule.lr, grain=rule.learned)


def _first_batch(job: Job, source: EpisodeSource) -> TaskBatch | None:
    """This rank's first micro-batch; None where there are fewer tasks than ranks."""
    recipe, sharding = job.recipe, job.sharding
    share = share_of_rank(
        recipe.outer.tasks_per_step, sharding.rank, sharding.world_size, is_lockstep=sharding.is_lockstep
    )
    if not share.positions:
        return None
    episodes = [source.episode(number) for number in share.positions[: recipe.outer.side_by_side]]
    return task_batch(recipe, episodes, job.place.device, num_steps=recipe.adaptation.num_steps)


def _free_bytes(job: Job) -> int:
    """Half of the memory that is free now, shared among the ranks that have it in common."""
    device, num_processes = job.place.device, job.recipe.launcher.num_processes
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(FREE_SHARE * free / math.ceil(num_processes / torch.cuda.device_count()))
    return int(FREE_SHARE * min(_available_bytes(), _allowed_bytes()) / num_processes)


def _available_bytes() -> int:
    """Memory that programs can have now. What files take of it as a cache counts, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024


def _allowed_bytes() -> float:
    """What the limit of this container or batch job leaves; infinite where there is none."""
    limit, used = memory_limit()
    return max(0.0, limit - used)


def memory_limit() -> tuple[float, int]:
    """The bytes that this container or batch job may take, infinite where there is no limit, and those that
    it has taken."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            text = (CGROUP / limit).read_text(encoding="ascii").strip()
            used = int((CGROUP / usage).read_text(encoding="ascii"))
        except OSError:
            continue
        return math.inf if text == "max" else int(text), used
    return math.inf, 0
