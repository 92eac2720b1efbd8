"""What keeps training tasks from being learned by heart goes through a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train
from tests.cli.test_every_way_to_learn import SHORT, SMOKE, alone, assert_evaluated
from tests.commands import curve, run_well

__all__ = ["alone"]


def test_a_posterior_of_the_initialisation_is_trained_resumed_and_evaluated(
    tmp_path: Path, glyphs: Path
) -> None:
    drawn = ("regularisation={kind: weights, kinds: [init], beta: 1e-4}", "outer.lr_posterior=0.1")
    run_well("train", SMOKE, f"data.url={glyphs}", *SHORT, *drawn, cwd=tmp_path)
    run_well("evaluate", "runs/smoke", cwd=tmp_path)
    folder = tmp_path / "runs" / "smoke"
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
    place = Place(RunFolder(tmp_path / "run"), torch.device("cpu"), None, Shutdown())
    place.folder.create()
    train(recipe, place)
    evaluate(recipe, place)
    assert_evaluated(place.folder.path)
    assert sum(metric in record for record in curve(place.folder.path)) == 2
