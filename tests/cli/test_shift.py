"""Methods against a shift of the inputs go through whole runs: training, validation, evaluation, streams."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from metaloom.datasets import make_dataset
from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.sources import open_data, require_episodes
from metaloom.train import train
from tests.commands import RECIPES, curve

SHORT = (
    "data.targets.num_classes=4",
    "data.num_support=4",
    "model.width=4",
    "model.num_blocks=2",
    "outer.num_steps=2",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=0",
    "validation.every_steps=2",
    "validation.num_episodes=6",
    "evaluation.num_episodes=6",
    "tracking=none",
)
CML = ("algorithm={kind: arm_cml, num_context: 2, width: 3}",)
METHODS = {
    "erm": ("algorithm=erm",),
    "arm_cml": CML,
    "arm_bn": ("algorithm=arm_bn", "model.norm=batch"),
    "arm_ll": ("algorithm={kind: maml, hypergradient: rematerialized}", "adaptation.learned_loss={width: 4}"),
    "arm_cml, queries of their own": (
        *CML,
        "data.query_is_support=false",
        "data.num_support=3",
        "data.num_query=1",
    ),
    "arm_bn, groups by size": ("algorithm=arm_bn", "model.norm=batch", "data.drawn_by=sample"),
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    make_dataset("glyph-faces", folder, max_per_split=4)
    return folder


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_trained_and_measured_by_group_and_over_streams(
    name: str, faces: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPES / "faces-arm.yaml", (f"data.url={faces}", *SHORT, *METHODS[name]))
    data = open_data(recipe)
    require_episodes(recipe, data)
    data.close()
    place = Place(RunFolder(tmp_path / "run"), torch.device("cpu"), None, Shutdown())
    place.folder.create()
    train(recipe, place)
    validated = [record for record in curve(place.folder.path) if "validation_loss" in record]
    assert len(validated) == 1
    (record,) = validated
    assert record["validation_worst_group_accuracy"] <= record["validation_accuracy"]
    assert record["validation_worst_group_loss"] >= record["validation_loss"]
    evaluate(recipe, place)
    (ours,) = json.loads((place.folder.path / "evaluation.json").read_text())["methods"]
    assert len(ours["groups"]) == 6  # each once
    assert sum(group["mean"] for group in ours["groups"]) / 6 == pytest.approx(ours["mean"][-1])
    assert ours["stream"]["seen"] == [1, 2]
    assert all(math.isfinite(value) for value in ours["stream"]["mean"])
    page = (place.folder.path / "report.html").read_text()
    assert "worst group" in page
    assert "The labels of support data have no part in adaptation." in page
