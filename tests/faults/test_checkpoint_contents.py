"""What the checkpoints of a training hold, which of them stay, and that what they hold is enough to go on."""

from __future__ import annotations

import platform
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch

import metaloom
from metaloom.checkpoints.catalogue import Catalogue
from metaloom.recipe import Recipe, load_recipe, plain_recipe
from metaloom.run_folder import RunFolder
from metaloom.sources import open_data
from tests.commands import RECIPES, curve, digests, run_well
from tests.in_process import trained

SMOKE = RECIPES / "smoke.yaml"
EVERY_STEP = "checkpoint={every_steps: 1, keep_last: 99}"


@pytest.fixture(autouse=True)
def _none_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that takes long to be written, as on a machine that is busy, is waited for."""
    monkeypatch.setattr("metaloom.keeping.LATE_S", 60.0)


def smoke(glyphs: Path, *overrides: str) -> Recipe:
    common = (f"data.url={glyphs}", "launcher.num_processes=1", "tracking=none")
    return load_recipe(SMOKE, (*common, *overrides))


def checkpoints(folder: Path) -> Catalogue:
    return Catalogue(folder / "checkpoints" / "meta")


def test_a_float16_run_goes_on_with_the_scales_that_it_had(tmp_path: Path, glyphs: Path) -> None:
    recipe = smoke(glyphs, "precision.compute=float16", "validation.every_steps=null", EVERY_STEP)
    whole = trained(recipe, tmp_path / "whole")
    catalogue = checkpoints(whole)
    scales = {step: catalogue.manifest(step).scalars["scaler"] for step in catalogue.steps()}
    assert list(scales) == [1, 2, 3, 4, 5, 6]
    # The scales fall before and after the step that the run goes on from: started anew, they would be others.
    assert scales[6]["tangent_scale"] < scales[2]["tangent_scale"]
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    for step in (3, 4, 5, 6):
        checkpoints(folder).remove(step)
    trained(recipe, folder)
    assert curve(folder) == curve(whole)
    assert checkpoints(folder).manifest(6).scalars["scaler"] == scales[6]
    assert digests(folder / "checkpoints" / "meta") == digests(whole / "checkpoints" / "meta")


def test_a_checkpoint_says_where_it_comes_from_and_what_was_chosen_and_reached(
    tmp_path: Path, glyphs: Path
) -> None:
    recipe = smoke(glyphs, "outer.num_steps=4", "validation.every_steps=2", EVERY_STEP)
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder(folder).record(run="the run")
    trained(recipe, folder)
    catalogue = checkpoints(folder)
    for step in (1, 2, 3, 4):
        scalars = catalogue.manifest(step).scalars
        origin = scalars["origin"]
        assert origin["recipe"] == plain_recipe(recipe)
        assert origin["run"] == "the run"
        assert origin["tracking_run_id"] == RunFolder(folder).facts()["tracking_run_id"]
        with closing(open_data(recipe)) as data:
            assert origin["data_digest"] == data.digest
        versions = {name: origin["versions"][f"version.{name}"] for name in ("metaloom", "torch", "python")}
        assert versions == {
            "metaloom": metaloom.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        assert (origin["next_episode"], origin["is_finished"]) == (4 * step, step == 4)
        assert scalars["choices"] == {"tasks": "loop", "estimator": None}
        assert (scalars["combiner"], scalars["scaler"], scalars["unfinished"]) == ({}, {}, None)
        validated = {
            record["step"]: record["validation_loss"]
            for record in curve(folder)
            if "validation_loss" in record and record["step"] <= step
        }
        best = min(validated, key=lambda step: validated[step], default=None)
        assert scalars["progress"] == {
            "best_step": best,
            "best_value": None if best is None else validated[best],
            "num_worse": 0 if best is None else len([other for other in validated if other > best]),
        }


def test_of_a_run_the_newest_the_multiples_and_the_best_checkpoints_stay(
    tmp_path: Path, glyphs: Path
) -> None:
    rules = "checkpoint={every_steps: 1, keep_last: 1, keep_every: 4, keep_best: 1}"
    # At such a rate validations get better and worse.
    recipe = smoke(glyphs, "outer.num_steps=9", "validation.every_steps=1", "outer.optimizer.lr=0.3", rules)
    folder = trained(recipe, tmp_path / "run")
    losses = {int(record["step"]): record["validation_loss"] for record in curve(folder)}
    best = min(losses, key=lambda step: (losses[step], step))
    assert best not in {1, 4, 8, 9}, "then the first one stays, or another rule keeps it as well"
    assert checkpoints(folder).steps() == sorted({best, 4, 8, 9})


def test_a_run_whose_folder_is_lost_goes_on_in_the_same_tracked_run(tmp_path: Path, glyphs: Path) -> None:
    database, url = tmp_path / "tracked.db", tmp_path / "store"
    tracking = f"tracking={{kind: mlflow, uri: 'sqlite:///{database}', experiment: lost}}"
    places = f"checkpoint={{url: 'file://{url}', every_steps: 3, keep_last: 9}}"
    recipe = smoke(glyphs, tracking, places, "validation.every_steps=null")
    lost = tmp_path / "lost"
    lost.mkdir()
    # Tracked under another id than the run's: that of the run alone does not lead to it.
    tracked = "0123456789abcdef0123456789abcdef"
    RunFolder(lost).record(run="the run", tracking_run_id=tracked, data_digest=_digest(recipe))
    trained(recipe, lost)
    before = curve(lost)
    shutil.rmtree(lost)
    Catalogue(url / "meta").remove(6)
    found = tmp_path / "found"
    output = run_well("train", "--resume", f"file://{url}", "--run", found, cwd=tmp_path)
    assert "resumed after outer step 3 of 6" in output
    assert RunFolder(found).facts()["tracking_run_id"] == tracked
    assert curve(found) == before[3:]
    with closing(sqlite3.connect(database)) as connection:
        (run,) = connection.execute("select run_uuid, status from runs").fetchall()
        points = connection.execute("select step, value from metrics where key = 'meta_loss'").fetchall()
    assert run[1] == "FINISHED"
    assert Counter(points) == Counter((record["step"], record["meta_loss"]) for record in before)


def _digest(recipe: Recipe) -> str:
    with closing(open_data(recipe)) as data:
        return data.digest
