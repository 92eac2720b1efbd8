"""What keeps training tasks from being learned by heart goes through a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaloom.recipe import load_recipe
from tests.cli.test_every_way_to_learn import SHORT, SMOKE, assert_evaluated
from tests.commands import curve
from tests.in_process import trained_and_evaluated


@pytest.mark.usefixtures("alone")
def test_a_posterior_of_the_initialisation_is_trained_and_evaluated(tmp_path: Path, glyphs: Path) -> None:
    drawn = ("regularisation={kind: weights, kinds: [init], beta: 1e-4}", "outer.lr_posterior=0.1")
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *drawn))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    assert_evaluated(folder)
    prices = [record["kl"] for record in curve(folder) if "kl" in record]
    assert len(prices) == 2
    assert prices[1] < prices[0]  # wider Gaussians cost less
    manifest = json.loads((folder / "checkpoints" / "meta" / "step-00000002" / "manifest.json").read_text())
    assert "meta/posterior.init.head.weight" in json.dumps(manifest["tensors"])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("way", "metric"),
    [
        (("algorithm=protonet", "regularisation=weights"), "kl"),
        (("regularisation={kind: entropy, weight: 0.1}",), "loss_after"),
        (("regularisation={kind: inequality, weight: 0.1, measure: gini}",), "inequality"),
    ],
    ids=["weights", "entropy", "inequality"],
)
def test_each_regularisation_is_trained_and_evaluated(
    way: tuple[str, ...], metric: str, tmp_path: Path, glyphs: Path
) -> None:
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    assert_evaluated(folder)
    assert sum(metric in record for record in curve(folder)) == 2
