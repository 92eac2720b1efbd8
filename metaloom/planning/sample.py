"""A recipe's own hypergradient on this machine, on real tensors, for a moment: how far rates carry."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

from metaloom.build import Choices, build_algorithm, build_model
from metaloom.engine.choice import EXACT_AND_FLAT, EstimatorChoice
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.planning.counting import batch_like, with_every_state
from metaloom.planning.estimate import compute_s
from metaloom.planning.facts import Facts, Point, Way
from metaloom.planning.hardware import Hardware
from metaloom.recipe import Recipe
from metaloom.recipe.schema import maml_of

NUM_REPEATS = 3
LONGEST_S, LARGEST_SHARE = 5.0, 0.5


def calibrated(recipe: Recipe, facts: Facts, hardware: Hardware) -> tuple[Hardware, str]:
    """The hardware with its rates scaled by what one task of the recipe takes here; and that in words.

    Rates come from large products and long vectors; a recipe's own are smaller. They stay as they are where a
    task would take too long, or too much memory, to be tried.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    way = facts.ways[0]
    amounts = way.amounts.at(Point(1, facts.num_steps, facts.num_blocks))
    expected_s = compute_s(amounts, facts.compute, hardware)
    needed = facts.own.plus(facts.backbone).total + amounts.peak_bytes
    if expected_s > LONGEST_S or needed > LARGEST_SHARE * hardware.device.memory_bytes:
        return hardware, "a task of the recipe is too large to be tried: rates are those of large products"
    seconds = seconds_of_a_task(recipe, way, device)
    slowed = dataclasses.replace(hardware, device=hardware.device.slowed(seconds / expected_s))
    return slowed, f"one task takes {seconds:.3g} s ({way.name}): times of computing are scaled by that"


def seconds_of_a_task(recipe: Recipe, way: Way, device: torch.device) -> float:
    """How long the hypergradient of one task takes by one way, at random initial weights and with every state
    kept, as the way was counted: the median of a few, after one that warms up."""
    recipe = with_every_state(recipe)
    estimator = EstimatorChoice(way.estimator, 0) if way.estimator in EXACT_AND_FLAT else None
    choices = Choices(way.tasks or "loop", estimator)
    unread = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    model = build_model(unread, device, Replicated())
    algorithm = build_algorithm(recipe, model, choices, device)
    meta = algorithm.meta_parameters()
    scales = LossScaler(Precision(recipe.precision.compute)).scales
    batch = _on(batch_like(recipe, 1, recipe.adaptation.num_steps), device)
    outer_step = maml_of(recipe).first_order_steps  # the first that takes second derivatives
    times = []
    for _ in range(1 + NUM_REPEATS):
        _wait(device)
        started = time.perf_counter()
        algorithm.meta_gradient(meta, batch, scales, outer_step=outer_step)
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _on(batch: TaskBatch, device: torch.device) -> TaskBatch:
    return batch.mapped(lambda tensor: tensor.to(device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
