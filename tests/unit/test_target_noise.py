"""Meta-augmentation of regression: one shift for all targets of a training task."""

from __future__ import annotations

import numpy as np
import pytest

from metaloom.datasets import (
    ArrayInputs,
    EpisodeSource,
    GroupEpisodes,
    Index,
    NumberTargets,
    Sample,
    ShiftedTargets,
    SplitSamples,
    write_shards,
)
from metaloom.errors import RecipeError
from metaloom.recipe import load_recipe
from metaloom.sources import Data, episode_source, open_data
from tests.commands import RECIPES
from tests.tiny_sets import npy

NUM_TASKS, STD = 200, 0.5


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Five samples of each of three groups in each of two splits, whose target `[2]` is what is shown."""

    def split(first: int) -> SplitSamples:
        rows = [np.array([first + n, -n], np.float32) for n in range(15)]
        samples = [
            Sample(f"s{n:02}", {"npy": npy(row), "target.npy": npy(row)}, {"group": n % 3})
            for n, row in enumerate(rows)
        ]
        return SplitSamples(samples, groups=["a", "b", "c"])

    folder = tmp_path_factory.mktemp("sensors")
    splits = {"train": split(0), "validation": split(100)}
    return write_shards(folder, splits, dataset="sensors", layout="groups", source={})


def plain(index: Index) -> GroupEpisodes:
    inputs, targets = ArrayInputs((2,)), NumberTargets(2)
    return GroupEpisodes(index, "train", inputs=inputs, targets=targets, num_support=3, num_query=2, seed=0)


def shifts(source: EpisodeSource, number: int) -> np.ndarray:
    """What targets differ by from inputs, `[3 + 2, 2]`, where targets are what is shown."""
    episode = source.episode(number)
    parts = [part["targets"] - part["inputs"] for part in (episode.support, episode.query)]
    assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    return np.concatenate(parts)


def test_all_targets_of_a_task_are_shifted_alike_and_those_of_another_otherwise(sensors: Index) -> None:
    source = ShiftedTargets(plain(sensors), std=STD, seed=0, split="train")
    drawn = []
    for number in range(NUM_TASKS):
        found = shifts(source, number)
        # Sums of numbers up to 15 in float32.
        np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=2e-6)
        np.testing.assert_array_equal(found, shifts(source, number))
        drawn.append(found[0])
    spread = np.stack(drawn)
    assert len(np.unique(spread[:, 0])) == NUM_TASKS
    # Four standard errors of a mean, and of a standard deviation.
    assert np.abs(spread.mean(0)).max() < 4 * STD / NUM_TASKS**0.5
    np.testing.assert_allclose(spread.std(0), STD, rtol=4 / (2 * NUM_TASKS) ** 0.5)
    assert abs(np.corrcoef(spread.T)[0, 1]) < 4 / NUM_TASKS**0.5


def test_inputs_and_the_samples_drawn_stay_as_they_are(sensors: Index) -> None:
    source = ShiftedTargets(plain(sensors), std=STD, seed=0, split="train")
    for number in range(4):
        shifted, before = source.episode(number), plain(sensors).episode(number)
        assert (shifted.task, shifted.group) == (before.task, before.group)
        np.testing.assert_array_equal(shifted.support["inputs"], before.support["inputs"])
        np.testing.assert_array_equal(shifted.query["inputs"], before.query["inputs"])


def recipe_data(noise: str) -> str:
    targets = f"{{kind: number, num_targets: 2, task_noise: {noise}}}"
    return (
        "data={kind: groups, url: sensors, inputs: {kind: array, shape: [2]}, "
        f"targets: {targets}, num_support: 3, num_query: 2}}"
    )


def test_a_recipe_shifts_the_targets_of_training_tasks_alone(sensors: Index) -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml", [recipe_data("0.5"), "model=mlp"])
    data = Data({"data.url": sensors})
    train, validation = (
        episode_source(recipe, data, split, seed=0, num_steps=1) for split in ("train", "validation")
    )
    assert np.abs(shifts(train, 0)).min() > 1e-3
    np.testing.assert_array_equal(shifts(validation, 0), 0.0)


def test_noise_of_no_size_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.targets\.task_noise: 0\.0"):
        load_recipe(RECIPES / "smoke.yaml", [recipe_data("0.0"), "model=mlp"])


def test_computed_training_tasks_are_shifted_too() -> None:
    shifted, plain = (
        load_recipe(RECIPES / "memorised-sinusoid-maml.yaml", [f"data.task_noise={noise}"])
        for noise in ("0.5", "null")
    )
    for split, is_same in (("train", False), ("validation", True), ("test", True)):
        one, other = (
            episode_source(recipe, open_data(recipe), split, seed=0, num_steps=1).episode(3)
            for recipe in (shifted, plain)
        )
        difference = np.concatenate(
            [one.support["targets"] - other.support["targets"], one.query["targets"] - other.query["targets"]]
        )
        assert np.ptp(difference) < 1e-6
        assert (abs(float(difference.mean())) < 1e-6) == is_same
