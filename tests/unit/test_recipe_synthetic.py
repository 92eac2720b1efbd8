"""Recipes of computed tasks: defaults are the papers', facts are the generator's, broken rules are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from metaloom.errors import RecipeError
from metaloom.recipe import (
    ArrayInputs,
    Recipe,
    SyntheticData,
    dump_recipe,
    json_schema,
    load_recipe,
    recipe_from_dict,
)
from metaloom.recipe.tasks import data_urls, task_facts
from metaloom.sources import data_names, episode_source, open_data, ordinary_samples, require_episodes
from tests.commands import RECIPES

MINIMAL = """\
name: tiny
model: mlp
data: {kind: synthetic, task: sinusoid}
adaptation:
  fast: full
  rule: {kind: sgd, lr: 0.01}
  num_steps: 1
outer: {num_steps: 100, tasks_per_step: 4}
"""
SMALL_1D = "{kind: equivariant_1d, rank: 2, length: 9}"
SMALL_2D = "{kind: equivariant_2d, size: 6, num_filters: 2}"
TASKS = ("sinusoid", "sinusoid_non_exclusive", SMALL_1D, SMALL_2D)


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("task", "numbers"),
    [
        ("sinusoid", (10, 10, None, None, None)),
        ("sinusoid_non_exclusive", (10, 10, None, None, None)),
        ("equivariant_1d", (1, 19, 8000, None, 2000)),
        ("equivariant_2d", (1, 19, 8000, None, 2000)),
        ("{kind: equivariant_2d, flips: true}", (1, 19, 1600, None, 400)),
    ],
)
def test_what_is_left_out_is_as_in_the_paper_and_spelled_out(
    task: str, numbers: tuple[int | None, ...], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, f"data.task={task}")
    shown = yaml.safe_load(dump_recipe(recipe))["data"]
    names = ("num_support", "num_query", "num_train_tasks", "num_validation_tasks", "num_test_tasks")
    assert tuple(shown[name] for name in names) == numbers
    assert recipe_from_dict(yaml.safe_load(dump_recipe(recipe)), source="a dump") == recipe


def test_what_is_given_is_taken(tmp_path: Path) -> None:
    numbers = ["data.num_support=3", "data.num_train_tasks=null", "data.num_test_tasks=7"]
    data = recipe_of(tmp_path, f"data.task={SMALL_1D}", *numbers).data
    assert isinstance(data, SyntheticData)
    assert (data.num_support, data.num_train_tasks, data.num_test_tasks) == (3, None, 7)


@pytest.mark.parametrize("task", TASKS)
def test_facts_of_a_recipe_are_those_of_its_episodes(task: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"data.task={task}", "data.num_support=2", "data.num_query=3")
    data = open_data(recipe)
    require_episodes(recipe, data)
    facts = task_facts(recipe)
    assert facts.objective == "regression"
    assert isinstance(facts.inputs, ArrayInputs)
    episode = episode_source(recipe, data, "train", seed=0, num_steps=1).episode(0)
    batch = ordinary_samples(recipe, data, ("train",), purpose="test").batch(0, 5).arrays
    for part, count in ((episode.support, 2), (episode.query, 3), (batch, 5)):
        assert part["inputs"].shape == (count, *facts.inputs.shape)
        assert part["targets"].shape == (count, facts.num_outputs)
    data.close()


def test_nothing_is_read(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert data_urls(recipe) == {}
    assert open_data(recipe).indices == {}


def test_the_digest_is_that_of_the_section_and_the_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(*overrides: str) -> str:
        return open_data(recipe_of(tmp_path, *overrides)).digest

    plain = digest()
    assert len(plain) == 64
    assert digest("seed=1", "outer.num_steps=7", "data.num_support=10") == plain
    changed = [
        digest("data.num_support=3"),
        digest("data.num_train_tasks=3"),
        digest("data.task=sinusoid_non_exclusive"),
        digest("data.task={kind: sinusoid_non_exclusive, noise_std: 0.0}"),
    ]
    monkeypatch.setattr("metaloom.datasets.synthetic.GENERATOR_VERSION", 2)
    assert len({plain, *changed, digest()}) == 6


def test_finitely_many_tasks_are_those_of_their_split(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, "data.num_train_tasks=2", "data.num_validation_tasks=3", "data.num_test_tasks=4"
    )
    data = open_data(recipe)
    for split, count in (("train", 2), ("validation", 3), ("test", 4)):
        source = episode_source(recipe, data, split, seed=0, num_steps=1)
        assert len({source.episode(number).task for number in range(20)}) == count
    batch = ordinary_samples(recipe, data, ("train",), purpose="test").batch(0, 500).arrays
    assert len(set(batch["inputs"].ravel().tolist())) == 2 * 20


def test_synthetic_tasks_are_parts_of_a_mixture(tmp_path: Path) -> None:
    parts = (
        "{data: {kind: synthetic, task: sinusoid}}, "
        "{weight: 3, data: {kind: synthetic, task: sinusoid, num_train_tasks: 5}}"
    )
    recipe = recipe_of(tmp_path, f"data={{kind: mixture, parts: [{parts}]}}")
    data = open_data(recipe)
    require_episodes(recipe, data)
    assert data_names(recipe, data) == ["sinusoid", "sinusoid"]
    assert sorted(data.computed) == ["data.parts.0.data", "data.parts.1.data"]
    source = episode_source(recipe, data, "train", seed=0, num_steps=1)
    of_second = {f"sinusoid {task}" for task in range(5)}
    # Blocks of 256 episodes of each of 64 virtual streams have their shares.
    tasks = [source.episode(number * 64).task for number in range(256)]
    assert sum(task in of_second for task in tasks) >= 192
    ordinary_samples(recipe, data, ("train",), purpose="test").batch(0, 8)


def test_the_schema_lists_the_tasks_and_describes_each_key() -> None:
    sections: dict[str, Any] = json_schema()["$defs"]
    for name in ("SyntheticData", "SinusoidTask", "NonExclusiveSinusoidTask", "Equivariant2dTask"):
        assert all(field["description"] for field in sections[name]["properties"].values())
    task = sections["SyntheticData"]["properties"]["task"]
    kinds = {"equivariant_1d", "equivariant_2d", "sinusoid", "sinusoid_non_exclusive", "unequal_scales"}
    assert set(task["anyOf"][-1]["enum"]) == kinds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={kind: synthetic}"], r"data\.task: missing; give a section with kind: sinusoid or "),
        (["data.task=sinus"], r"data\.task: 'sinus' is not one of sinusoid, .*; did you mean 'sinusoid'\?"),
        (["data.task.phase=1"], r"data\.task\.phase: unknown key; \(data\.task of kind sinusoid has: kind\)"),
        (["data.num_support=0"], r"data\.num_support: 0; must be at least 1"),
        (["data.num_test_tasks=0"], r"data\.num_test_tasks: 0; must be at least 1 and at most 10000000"),
        (
            ["data.task={kind: sinusoid_non_exclusive, num_amplitudes: 1}"],
            r"data\.task\.num_amplitudes: 1; must be at least 2",
        ),
        (
            ["data.task={kind: sinusoid_non_exclusive, noise_std: -0.1}"],
            r"data\.task\.noise_std: -0\.1; must be at least 0",
        ),
        (
            ["data.task={kind: equivariant_1d, length: 4, filter_size: 5}"],
            r"data\.task\.filter_size: 5; must be at most data\.task\.length = 4",
        ),
        (
            ["data.task={kind: equivariant_2d, size: 4, filter_size: 5}"],
            r"data\.task\.filter_size: 5; must be at most data\.task\.size = 4",
        ),
        (
            ["data.task={kind: equivariant_2d, turns: 8, filter_size: 5}"],
            r"data\.task\.filter_size: 5; must be 3, since data\.task\.turns is 8",
        ),
        (["data.task={kind: equivariant_2d, turns: 6}"], r"data\.task\.turns: 6 is not one of 4, 8"),
        (
            ["model=conv4"],
            r"model\.kind: conv4 reads images, and data \(kind synthetic\) gives arrays; set model\.kind to "
            "mlp",
        ),
        (
            ["loading={max_broken: 3, cache_folder: /tmp/x}"],
            r"loading\.max_broken: 3; has no effect, since synthetic data are computed, and no files are "
            r"read; leave it out\n.*loading\.cache_folder: /tmp/x; has no effect",
        ),
        (
            [
                "data={kind: mixture, parts: [{data: {kind: synthetic, task: sinusoid_non_exclusive}}, "
                "{data: {kind: synthetic, task: sinusoid}}]}"
            ],
            r"data\.parts\.1\.data: its inputs are arrays of shape \[1\], and those of data\.parts\.0\.data "
            r"arrays of shape \[21\]; make them the same",
        ),
    ],
)
def test_a_mistake_is_told(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, *overrides)


def test_reading_has_an_effect_where_another_part_is_read(tmp_path: Path) -> None:
    parts = (
        "{data: {kind: synthetic, task: sinusoid}}, {data: {kind: groups, url: x, targets: number, "
        "inputs: {kind: array, shape: [1]}, num_support: 3, num_query: 3}}"
    )
    recipe_of(tmp_path, f"data={{kind: mixture, parts: [{parts}]}}", "loading.max_broken=3")


def test_the_digest_of_data_stays_while_the_data_do() -> None:
    """That of a recipe from before `task_noise` was there: its runs can still be resumed and evaluated."""
    recipe = load_recipe(RECIPES / "sinusoid-maml.yaml")
    (digest,) = open_data(recipe).computed.values()
    assert digest == "b65c1a2aab34022d09e0716fcff3d848cbb6faecc421bb6370b17e69c93dc793"
    noisy = load_recipe(RECIPES / "sinusoid-maml.yaml", ["data.task_noise=0.1"])
    assert list(open_data(noisy).computed.values()) != [digest]


def test_every_group_of_a_synthetic_task_has_a_task() -> None:
    message = r"data\.num_train_tasks: 1; leaves groups of data\.task without one, which has 2; raise it"
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPES / "unequal-scales.yaml", ["data.num_train_tasks=1"])
