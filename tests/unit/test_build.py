"""From recipes to the engine's parts."""

import torch

from metaloom.build import Choices, build_adapter, build_model, build_unroll, initial_meta
from metaloom.engine.losses import LossTensors
from metaloom.engine.sharding.replicated import Replicated
from metaloom.recipe import load_recipe
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
