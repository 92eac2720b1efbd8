"""Computed tasks go through every command that reads a recipe, without any files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from metaloom.cli import main
from tests.commands import curve, run_well

RECIPE = """\
name: sines
model: {kind: mlp, width: 8, num_layers: 1}
data: {kind: synthetic, task: sinusoid, num_support: 5}
adaptation:
  fast: {kind: full, tasks: loop}
  rule: {kind: sgd, lr: 0.01}
  num_steps: 1
algorithm: {hypergradient: rematerialized}
outer: {num_steps: 4, tasks_per_step: 4}
launcher: {num_processes: 2}
validation: {every_steps: 2, num_episodes: 4}
evaluation: {num_episodes: 6, tuning: {num_episodes: 2, rate_factors: [1.0]}}
tracking: none
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and its run on two processes."""
    folder = tmp_path_factory.mktemp("sines")
    (folder / "recipe.yaml").write_text(RECIPE)
    run_well("train", "recipe.yaml", cwd=folder)
    return folder


def test_a_recipe_is_checked_shown_and_planned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(trained / "recipe.yaml")
    assert main(["recipe", "check", recipe]) == 0
    assert "no mistakes found" in capsys.readouterr().out
    assert main(["recipe", "show", recipe]) == 0
    assert "num_train_tasks: null" in capsys.readouterr().out
    plan = json.loads(run_well("plan", recipe, "--ranks", "2", "--json", cwd=trained))
    assert plan["recipe"] == "sines"


def test_two_processes_train_and_an_evaluation_compares(trained: Path) -> None:
    losses = [record["meta_loss"] for record in curve(trained / "runs" / "sines") if "meta_loss" in record]
    assert len(losses) == 4
    output = run_well("evaluate", "runs/sines", "launcher.num_processes=1", cwd=trained)
    assert "mean squared error after 1 adaptation step on sinusoid (test)" in output
    methods = json.loads((trained / "runs" / "sines" / "evaluation.json").read_text())["methods"]
    names = ["meta-trained", "random init", "ordinary, equal data", "ordinary, equal compute"]
    assert [method["name"] for method in methods] == names
    assert all(math.isfinite(value) for method in methods for value in method["mean"])


def test_one_process_has_the_losses_of_two(trained: Path) -> None:
    words = ("launcher.num_processes=1", "loading.num_workers=1", "--run", "runs/one")
    run_well("train", "recipe.yaml", *words, cwd=trained)
    one, two = (
        [record["meta_loss"] for record in curve(trained / "runs" / name) if "meta_loss" in record]
        for name in ("one", "sines")
    )
    assert one == pytest.approx(two, rel=1e-4)  # float32, and Adam's amplification of its rounding


def test_a_run_whose_tasks_would_be_others_now_is_not_continued(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "runs" / "sines", tmp_path / "old")
    monkeypatch.setattr("metaloom.datasets.synthetic.GENERATOR_VERSION", 2)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "old"]) == 3
    told = capsys.readouterr().err
    assert "this version of metaloom computes other synthetic data (digest " in told
    assert "than old was trained on (digest " in told
    assert "Go on with the version that trained it, start a new run, or insist on it (--insist)." in told
