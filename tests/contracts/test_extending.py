"""The method that docs/extending.md adds: the file is what the page shows, it runs, and it is right."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from metaloom.engine.adapters.model import Structure
from metaloom.engine.backbone import Backbone
from metaloom.engine.precision import Precision
from tests.commands import RECIPES, run, run_well
from tests.numerics.test_protonet import NUM_TASKS, NUM_WAYS, batch, model

ROOT = RECIPES.parent
EXAMPLE = ROOT / "examples" / "matching_networks.py"
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_shows_the_file() -> None:
    assert blocks("python") == [EXAMPLE.read_text(encoding="utf-8")]


def test_the_recipe_of_the_page_trains_it(tmp_path: Path, glyphs: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    shutil.copy(RECIPES / "smoke.yaml", tmp_path)
    (tmp_path / "matching.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    short = ("evaluation.baselines=[random]", "tracking=none")
    run_well("train", "matching.yaml", f"data.url={glyphs}", *short, cwd=tmp_path)
    assert "meta-trained" in run_well("evaluate", "runs/matching", cwd=tmp_path)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere:build", "algorithm.factory: nowhere:build cannot be imported: No module named 'nowhere'"),
        pytest.param("matching_networks:make", "has no attribute 'make'", marks=pytest.mark.slow),
        pytest.param(
            "matching_networks:softmaxes",
            "returned a list; it has to return a metaloom.engine.algorithms.base",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_factory_that_does_not_work_is_named(
    tmp_path: Path, glyphs: Path, factory: str, message: str
) -> None:
    text = EXAMPLE.read_text(encoding="utf-8") + "\n\ndef softmaxes(parts):\n    return []\n"
    (tmp_path / "matching_networks.py").write_text(text, encoding="utf-8")
    algorithm = f"algorithm={{kind: custom, factory: '{factory}'}}"
    finished = run("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", algorithm, cwd=tmp_path)
    assert finished.code != 0
    assert message in finished.output + finished.errors


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matching_networks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_its_losses_are_those_of_loops_over_examples(example: ModuleType) -> None:
    network, data, temperature = model(), batch(), 0.3
    backbone = Backbone(
        network, Structure(("blocks.0", "blocks.1"), network.heads), "tasks", Precision("float64")
    )
    curve = example.MatchingNetworks(backbone, NUM_WAYS, temperature).curve({}, data, num_steps=0)
    for task in range(NUM_TASKS):
        support, query = data.support["inputs"][task], data.query["inputs"][task]
        hidden = torch.cat([support, query])
        for block in network.blocks:
            hidden = block(hidden)
        features = hidden.mean(dim=(2, 3)).tolist()
        own, asked = features[: len(support)], features[len(support) :]
        losses = []
        for feature, target in zip(asked, data.query["targets"][task].tolist(), strict=True):
            scores = [math.exp(_cosine(feature, other) / temperature) for other in own]
            labels = data.support["targets"][task].tolist()
            right = sum(score for score, label in zip(scores, labels, strict=True) if label == target)
            losses.append(-math.log(right / sum(scores)))
        assert float(curve["loss"][task, 0]) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def _cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
