"""How much ordinary training has the data, or the compute, of a meta-training."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from metaloom.build import (
    Choices,
    as_tensors,
    build_algorithm,
    build_model,
    model_structure,
    task_batch,
    task_output,
)
from metaloom.datasets import Episode
from metaloom.engine.kernels.linear import product_flops
from metaloom.engine.ordinary import ordinary_gradient
from metaloom.engine.precision import Precision
from metaloom.job import Job
from metaloom.recipe import Precision as PrecisionSection
from metaloom.recipe import Recipe
from metaloom.recipe.tasks import data_sets, num_rehearsed, num_rehearsed_outside, task_facts
from metaloom.sources import episode_source, ordinary_samples

NUM_SIZED_TASKS = 256  # tasks whose samples are counted, where tasks differ
NUM_COUNTED_TASKS = 8  # tasks whose operations are


def ordinary_budget(job: Job, name: str, choices: Choices, *, num_outer_steps: int) -> tuple[int, int]:
    """Samples and steps of an ordinary training that spends what meta-training has spent."""
    recipe = job.recipe
    batch_size = recipe.evaluation.ordinary.batch_size
    num_tasks = num_outer_steps * recipe.outer.tasks_per_step
    if name == "ordinary_equal_data":
        num_steps = num_tasks * _samples_per_task(job) / batch_size
    else:
        # Counts do not depend on the format, and the counter cannot follow dual numbers under autocast.
        in_float32 = recipe.model_copy(update={"precision": PrecisionSection(compute="float32")})
        job = dataclasses.replace(job, recipe=in_float32)
        flops = _flops_per_task(job, choices, num_outer_steps=num_outer_steps)
        num_steps = num_tasks * flops / (_flops_per_sample(job) * batch_size)
    steps = max(1, math.ceil(num_steps))
    return steps * batch_size, steps


def _samples_per_task(job: Job) -> float:
    """Samples that a task shows to meta-training, each counted once; where tasks differ, the mean over the
    first ones."""
    recipe = job.recipe
    rehearsed = num_rehearsed(recipe, recipe.adaptation.num_steps) + num_rehearsed_outside(recipe)
    sizes = [len(e.support["targets"]) + len(e.query["targets"]) for e in _first_tasks(job, NUM_SIZED_TASKS)]
    return statistics.fmean(sizes) + rehearsed


def _first_tasks(job: Job, count: int) -> list[Episode]:
    """The first tasks of the training; one, where all tasks are alike."""
    recipe = job.recipe
    facts = task_facts(recipe)
    are_alike = not facts.is_ragged and len(data_sets(recipe)) == 1
    num_inner = recipe.adaptation.num_steps
    source = episode_source(recipe, job.data, "train", seed=recipe.seed, num_steps=num_inner)
    return [source.episode(number) for number in range(1 if are_alike else count)]


def _flops_per_task(job: Job, choices: Choices, *, num_outer_steps: int) -> float:
    """Floating-point operations of one task's hypergradient (matrix products and convolutions); where tasks
    differ, the mean over the first ones."""
    recipe, device = job.recipe, job.place.device
    num_inner = recipe.adaptation.num_steps
    algorithm = build_algorithm(recipe, build_model(recipe, device, job.sharding), choices, device)
    meta = algorithm.meta_parameters()

    def flops_of(episode: Episode, outer_step: int) -> int:
        batch = task_batch(recipe, [episode], device, num_steps=num_inner)
        return _count_flops(lambda: algorithm.meta_gradient(meta, batch, outer_step=outer_step))

    episodes = _first_tasks(job, NUM_COUNTED_TASKS)
    if len(episodes) == 1 and _changes_in_training(recipe):
        episodes = episodes * NUM_COUNTED_TASKS
    # Spread over the training, where what an outer step computes changes in its course.
    steps = [round((row + 0.5) / len(episodes) * num_outer_steps) for row in range(len(episodes))]
    return statistics.fmean(map(flops_of, episodes, steps))


def _changes_in_training(recipe: Recipe) -> bool:
    """Whether later outer steps compute something else than the first."""
    maml = recipe.maml
    return maml is not None and (maml.step_weights == "annealed" or maml.first_order_steps > 0)


def _flops_per_sample(job: Job) -> int:
    """Floating-point operations of one sample in ordinary training, forward and backward."""
    recipe, device = job.recipe, job.place.device
    samples = ordinary_samples(recipe, job.data, ("train",), purpose="budget")
    model = build_model(recipe, device, job.sharding, num_classes=samples.num_classes)
    batch = as_tensors(samples.batch(0, 2).arrays, device)
    output = task_output(recipe)

    def step() -> None:
        ordinary_gradient(
            model.module,
            model_structure(model.module),
            model.values(),
            batch,
            Precision(recipe.precision.compute),
            draws=None,
            scale=1.0,
            recompute_blocks=recipe.memory.recompute_blocks,
            shards=model.shards,
            criterion=output.criterion,
            head=output.head,
        )

    return _count_flops(step) // 2


def _count_flops(compute: Callable[[], object]) -> int:
    with _FlopCounter() as counter:
        compute()
    total: int = counter.total
    return total


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what torch's formulas, and the kernels' own, say of every operation.

    torch's own counter also follows modules, by hooks that fail inside a backward pass in which a block is
    computed again.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._formulas = dict(flop_registry)
        for op, count in product_flops().items():
            self._formulas[op] = shape_wrapper(count)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result
