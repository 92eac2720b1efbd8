"""Every method of recipes/few-shot is trained and evaluated, made short, in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from metaloom.recipe import load_recipe
from tests.commands import RECIPES
from tests.in_process import trained_and_evaluated

FOLDER = RECIPES / "few-shot"
SHORT = (
    "model.width=4",
    "data.n_query=1",
    "outer.num_steps=2",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=0",
    "validation.every_steps=2",
    "validation.num_episodes=2",
    "evaluation.num_episodes=2",
    "tracking=none",
)
OWN = {
    "maml-plus-plus": ("algorithm.annealing_steps=1", "algorithm.first_order_steps=1"),
    "imaml": ("adaptation.num_steps=2",),
    "reptile": ("adaptation.num_steps=2",),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
@pytest.mark.usefixtures("alone")
def test_a_method_is_trained_and_evaluated(name: str, tmp_path: Path, glyphs: Path) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml", [f"data.url={glyphs}", *SHORT, *OWN.get(name, ())])
    assert recipe.name == f"few-shot-{name}"
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    (ours,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["methods"]
    assert len(ours["mean"]) == recipe.evaluation_num_steps + 1
    assert all(math.isfinite(value) for value in ours["mean"])
