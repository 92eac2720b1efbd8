"""The budgets of ordinary training, against counts by hand."""

import io
import math
from pathlib import Path

import pytest
import torch

from metaloom.broken_record import BrokenRecord
from metaloom.budgets import NUM_SIZED_TASKS, ordinary_budget
from metaloom.build import Choices
from metaloom.disk import Disk
from metaloom.engine.sharding.replicated import Replicated
from metaloom.job import Job, Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.sources import episode_source, open_data
from metaloom.tracking import NullTracker
from metaloom.tracking.console import LineConsole
from tests.commands import RECIPES

IMAGE_BLOCK = 2 * 14 * 14 * 9  # operations of a 3x3 convolution, stride 2, per image and output channel


def job(recipe_name: str, *overrides: str) -> Job:
    recipe = load_recipe(RECIPES / recipe_name, overrides)
    place = Place(RunFolder(Path("unused")), torch.device("cpu"), None, Shutdown())
    console = LineConsole(io.StringIO(), io.StringIO())
    sharding = Replicated()
    disk = Disk()
    broken = BrokenRecord(
        Path("unused"), max_broken=0, sharding=sharding, console=console, disk=disk, first_step=None
    )
    return Job(recipe, place, open_data(recipe), sharding, console, NullTracker(), {}, broken, disk)


def test_equal_data_counts_every_sample_of_every_task_once(glyphs: Path, stdlib: Path) -> None:
    images = job("smoke.yaml", f"data.url={glyphs}", "evaluation.ordinary.batch_size=10")
    # 5 outer steps of 4 tasks of 3 classes with 1 + 2 images: 180 images.
    assert ordinary_budget(images, "ordinary_equal_data", Choices(), num_outer_steps=5) == (180, 18)
    text = job("stdlib-lora.yaml", f"data.url={stdlib}", "evaluation.ordinary.batch_size=7")
    # 5 outer steps of 4 tasks of 8 support, 4 query and 4 rehearsed sequences: 320, in batches of 7.
    assert ordinary_budget(text, "ordinary_equal_data", Choices(), num_outer_steps=5) == (322, 46)


def test_equal_data_of_tasks_that_differ_is_that_of_the_first_ones(glyphs: Path) -> None:
    variable = f"{{kind: classes, url: '{glyphs}', variable: {{min_way: 2, max_way: 4, max_support: 9}}}}"
    differing = job("smoke.yaml", f"data={variable}", "evaluation.ordinary.batch_size=1")
    source = episode_source(
        differing.recipe, differing.data, "train", seed=differing.recipe.seed, num_steps=1
    )
    sizes = [
        len(episode.support["targets"]) + len(episode.query["targets"])
        for episode in map(source.episode, range(NUM_SIZED_TASKS))
    ]
    samples, _ = ordinary_budget(
        differing, "ordinary_equal_data", Choices(), num_outer_steps=NUM_SIZED_TASKS // 4
    )
    assert samples == sum(sizes)


@pytest.mark.parametrize("estimator", ["first_order", "unrolled", "rematerialized"])
def test_equal_compute_equals_a_count_by_hand(estimator: str, glyphs: Path) -> None:
    width, batch_size, num_outer_steps = 8, 16, 50
    small = job(
        "smoke.yaml",
        f"data.url={glyphs}",
        f"algorithm.hypergradient={estimator}",
        "model={kind: conv4, width: 8, num_blocks: 1, norm: none}",
        f"evaluation.ordinary.batch_size={batch_size}",
    )
    conv = IMAGE_BLOCK * width
    head = {classes: 2 * width * classes for classes in (3, 12)}
    # Forward; weight gradients; and the input gradient of the head alone, images need none.
    ordinary = 2 * conv + 3 * head[12]
    first_order = 2 * conv + 3 * head[3]
    num_support, num_query = 3, 6
    # One inner step, and the query loss after it.
    query = num_query * first_order
    step = num_support * first_order
    total = small.recipe.outer.tasks_per_step * num_outer_steps
    samples, steps = ordinary_budget(
        small, "ordinary_equal_compute", Choices(), num_outer_steps=num_outer_steps
    )
    assert samples == steps * batch_size
    if estimator == "first_order":
        # Gradient descent at fixed rates is pulled back without another inner gradient.
        expected = math.ceil(total * (query + step) / (ordinary * batch_size))
        assert steps == pytest.approx(expected, abs=1)
    else:
        # Every product of the inner step is differentiated once more, by one or both of its factors.
        again = step if estimator == "rematerialized" else 0
        low = total * (query + again + 2 * step) / (ordinary * batch_size)
        high = total * (query + again + 4 * step) / (ordinary * batch_size)
        assert low <= steps <= high + 1


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
@pytest.mark.parametrize("memory", ["{recompute_blocks: true}", "{head_chunk: 16}"])
def test_equal_compute_counts_what_is_computed_again(estimator: str, memory: str, stdlib: Path) -> None:
    small = (f"data.url={stdlib}", f"algorithm.hypergradient={estimator}", "model.num_layers=1")
    plain, again = (
        ordinary_budget(
            job("stdlib-lora.yaml", *small, *more), "ordinary_equal_compute", Choices(), num_outer_steps=10**4
        )
        for more in ((), (f"memory={memory}",))
    )
    assert plain[0] < again[0] < 2.5 * plain[0]
