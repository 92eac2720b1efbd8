"""From recipes to the engine's parts."""

from pathlib import Path

import pytest
import torch

from metaloom.build import (
    Choices,
    build_adapter,
    build_model,
    build_snapshots,
    build_unroll,
    initial_meta,
    task_batch,
)
from metaloom.datasets import Episode
from metaloom.engine.inner_loops.head_first import HeadFirst
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.losses import LossTensors
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.snapshots import HostMemory
from metaloom.errors import CapabilityError
from metaloom.recipe import Recipe, load_recipe
from metaloom.sources import episode_source, open_data
from tests.commands import RECIPES


def test_what_learns_no_loss_adapts_by_the_loss_that_the_recipe_starts_from() -> None:
    # Baselines adapt without any meta-parameters.
    recipe = load_recipe(
        RECIPES / "smoke.yaml", ("adaptation.loss={temperature: 1.5, learned: [temperature]}",)
    )
    adapter = build_adapter(recipe, build_model(recipe, torch.device("cpu"), Replicated()), Choices())
    unroll = build_unroll(recipe, adapter, rate=0.1, grain="none", learns_loss=False)
    assert unroll.learner.support_loss.at({}) == LossTensors(1.5, None)
    learned = build_unroll(recipe, adapter, rate=0.1, grain="none")
    assert "loss.temperature" in initial_meta(recipe, learned)


def test_rates_and_the_heads_own_steps_reach_the_unroll() -> None:
    recipe = load_recipe(
        RECIPES / "smoke.yaml",
        (
            "seed=3",
            "adaptation.num_steps=4",
            "adaptation.rule.learned=per_element",
            "adaptation.rule.rates={scale: linear, spread: [0.005, 0.1]}",
            "adaptation.head.first_steps=2",
        ),
    )
    adapter = build_adapter(recipe, build_model(recipe, torch.device("cpu"), Replicated()), Choices())
    unroll = build_unroll(recipe, adapter, rate=0.1, grain="per_element")
    assert unroll.rates == Rates(0.1, "per_element", 4, scale="linear", spread=(0.005, 0.1), seed=3)
    assert unroll.head_first == HeadFirst(frozenset({"head.weight", "head.bias"}), 2)


def test_snapshots_in_the_hosts_memory_are_refused_where_the_weights_are_there_already() -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml", ("memory.snapshots={kind: host}",))
    with pytest.raises(
        CapabilityError, match=r"memory\.snapshots\.kind: host; has no effect.*all or binomial"
    ):
        build_snapshots(recipe, torch.device("cpu"))
    assert build_snapshots(recipe, torch.device("cuda")) == HostMemory(torch.device("cuda"))


def mixed_episodes(glyphs: Path, *parts: str) -> tuple[Recipe, list[Episode]]:
    """A recipe of glyphs drawn in two ways, and its first episodes."""
    common = f"kind: classes, url: '{glyphs}', n_shot: 1, n_query: 1"
    listed = ", ".join(f"{{data: {{{common}, {part}}}}}" for part in parts)
    recipe = load_recipe(RECIPES / "smoke.yaml", [f"data={{kind: mixture, parts: [{listed}]}}"])
    source = episode_source(recipe, open_data(recipe), "train", seed=0, num_steps=1)
    return recipe, [source.episode(number) for number in range(8)]


def test_tasks_of_a_mixture_keep_their_own_numbers_of_classes(glyphs: Path) -> None:
    recipe, episodes = mixed_episodes(glyphs, "n_way: 5", "n_way: 2")
    batch = task_batch(recipe, episodes, torch.device("cpu"), num_steps=1)
    assert batch.num_ways is not None
    assert batch.num_ways.tolist() == [len(set(e.support["targets"].tolist())) for e in episodes]
    assert set(batch.num_ways.tolist()) == {2, 5}


def test_a_task_is_shown_alike_beside_one_whose_images_are_distorted(glyphs: Path) -> None:
    recipe, episodes = mixed_episodes(glyphs, "n_way: 3, affine: null", "n_way: 3, affine: {shift_px: 1}")
    assert {str(episode.query["inputs"].dtype) for episode in episodes} == {"uint8", "float32"}
    together = task_batch(recipe, episodes, torch.device("cpu"), num_steps=1)
    for row, episode in enumerate(episodes):
        alone = task_batch(recipe, [episode], torch.device("cpu"), num_steps=1)
        assert torch.equal(alone.query["inputs"][0], together.query["inputs"][row])
