"""The commands as a newcomer meets them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metaloom.cli import main
from metaloom.recipe import load_recipe
from tests.commands import RECIPES, curve, run, run_well


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["evaluate"],
        ["export"],
        ["adapt"],
        ["check"],
        ["data"],
        ["data", "make"],
        ["data", "pack"],
        ["data", "pack", "images"],
        ["data", "pack", "records"],
        ["data", "pack", "parquet"],
        ["data", "pack", "huggingface"],
        ["data", "inspect"],
        ["data", "verify"],
        ["recipe"],
        ["recipe", "check"],
        ["recipe", "show"],
        ["recipe", "schema"],
    ],
)
def test_help_at_each_level_has_examples_that_begin_with_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert " ".join(["metaloom", *words]) in shown.split("examples:")[1]


def test_unknown_arguments_are_refused_and_overrides_may_stand_anywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "x.yaml", "--rum", "y"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --rum" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["recipe", "schema", "a=b"])
    assert "unrecognized arguments: a=b" in capsys.readouterr().err
    recipe = str(RECIPES / "smoke.yaml")
    assert main(["train", recipe, "--run", str(tmp_path / "run"), "outer.num_stepz=3"]) == 2
    assert "did you mean 'num_steps'" in capsys.readouterr().err


def test_recipe_show_prints_a_recipe_that_loads_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = RECIPES / "glyphs-maml.yaml"
    assert main(["recipe", "show", str(path), "seed=7"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(path, ["seed=7"])


def test_recipe_schema_is_json_that_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "adaptation", "algorithm", "outer", "data", "tracking"} <= schema["properties"].keys()


def test_recipe_check_looks_at_the_data_too(glyphs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "smoke.yaml")
    assert main(["recipe", "check", recipe, f"data.url={glyphs}"]) == 0
    assert "no mistakes found" in capsys.readouterr().out
    assert main(["recipe", "check", recipe, f"data.url={glyphs}", "data.n_way=13"]) == 3


def test_data_make_says_what_is_there_and_does_not_make_it_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "make", "stdlib", str(tmp_path / "stdlib"), "--max-per-split", "3"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "rehearsal" in first
    assert "was already there" not in first
    assert main(words) == 0
    assert "was already there" in capsys.readouterr().out


def test_the_command_line_starts_without_torch() -> None:
    loaded = (
        "import sys, metaloom.cli; print([m for m in ('torch', 'mlflow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_then_evaluate_leaves_a_table_a_page_and_a_tracked_run(tmp_path: Path, glyphs: Path) -> None:
    trained = run_well("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", cwd=tmp_path)
    assert "next: metaloom evaluate runs/smoke" in trained
    assert "\x1b" not in trained  # quiet, line-wise: no terminal here
    run_folder = tmp_path / "runs" / "smoke"
    evaluated = run_well("evaluate", "runs/smoke", "evaluation.num_episodes=6", cwd=tmp_path)
    for method in ("meta-trained", "random init", "ordinary, equal data", "ordinary, equal compute"):
        assert method in evaluated
    assert "report: runs/smoke/report.html" in evaluated
    summary = json.loads((run_folder / "evaluation.json").read_text())
    assert [len(method["mean"]) for method in summary["methods"]] == [2, 2, 2, 2]
    assert (
        "<svg" in (run_folder / "report.html").read_text()
        or "data:image/png" in (run_folder / "report.html").read_text()
    )
    assert (run_folder / "adaptation.png").stat().st_size > 1000
    # A second evaluation finds its baselines trained, and says the same.
    again = run_well("evaluate", "runs/smoke", "evaluation.num_episodes=6", cwd=tmp_path)
    assert "of 4 steps" not in again
    assert json.loads((run_folder / "evaluation.json").read_text()) == summary
    # With other settings the baselines are trained anew.
    anew = run_well("evaluate", "runs/smoke", "evaluation.ordinary.lr=0.01", cwd=tmp_path)
    assert "ordinary, equal data: trained anew" in anew
    assert "of 4 steps" in anew
    assert_tracked(run_folder)
    assert not (tmp_path / "mlruns").exists()


def test_an_evaluation_takes_other_shots_beside_baselines_that_were_not_trained(
    tmp_path: Path, glyphs: Path
) -> None:
    few = ("launcher.num_processes=1", "outer.num_steps=2", "validation.every_steps=null", "tracking=none")
    run_well("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", *few, cwd=tmp_path)
    other = ("evaluate", "runs/smoke", "data.n_shot=3", "data.n_query=1", "evaluation.num_episodes=4")
    refused = run(*other, cwd=tmp_path).errors
    assert "evaluation.baselines: ordinary_equal_data, ordinary_equal_compute; had as much data" in refused
    output = run_well(*other, "evaluation.baselines=[]", cwd=tmp_path)
    told = "Tasks have 3 support and 1 query samples per class; those of training had 1 and 2."
    assert told in output
    assert told not in run_well(*other[:2], *other[4:], "evaluation.baselines=[]", cwd=tmp_path)
    refused = run("evaluate", "runs/smoke", "data.n_way=4", cwd=tmp_path).errors
    assert "an evaluation has no use for another data.n_way" in refused


def assert_tracked(run_folder: Path) -> None:
    """One MLflow run with the recipe as parameters and artifact, the metrics by step, and the versions."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_folder}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "metaloom"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["adaptation.rule.lr"] == "0.1"
    assert {"recipe_digest", "data_digest", "world_size"} <= tracked.data.tags.keys()
    assert any("torch" in name for name in tracked.data.tags)
    history = client.get_metric_history(tracked.info.run_id, "meta_loss")
    steps = {record["step"]: record["meta_loss"] for record in curve(run_folder) if "meta_loss" in record}
    assert {point.step: point.value for point in history} == pytest.approx(steps)
    assert {"tasks_per_s", "peak_memory_mib", "validation_accuracy"} <= tracked.data.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(tracked.info.run_id)}
    assert {"recipe.yaml", "evaluation"} <= artifacts
    client._tracking_client.store._dispose_engine()


def test_the_environment_may_name_the_tracking_store(
    tmp_path: Path, glyphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.commands.ADDED", {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/named.db"})
    output = run_well("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", cwd=tmp_path)
    assert f"tracked in sqlite:///{tmp_path}/named.db (experiment metaloom" in output
    assert (tmp_path / "named.db").exists()
    assert not (tmp_path / "runs" / "smoke" / "mlflow.db").exists()


def test_early_stopping_ends_the_run_and_the_best_step_is_kept(tmp_path: Path, glyphs: Path) -> None:
    # At this rate the loss rises at once, so that the first validation stays the best.
    output = run_well(
        "train",
        RECIPES / "smoke.yaml",
        f"data.url={glyphs}",
        "outer.num_steps=40",
        "outer.optimizer={kind: sgd, lr: 300}",
        "validation={every_steps: 1, num_episodes: 4, early_stopping: {patience: 3}}",
        "launcher.num_processes=1",
        "tracking=none",
        cwd=tmp_path,
    )
    steps = [record["step"] for record in curve(tmp_path / "runs" / "smoke")]
    assert 4 <= len(steps) < 40
    best = re.search(r"best validation loss [0-9.]+ at outer step ([0-9]+)", output)
    assert best is not None
    assert int(best[1]) == len(steps) - 3
    kept = [path.name for path in (tmp_path / "runs" / "smoke" / "checkpoints" / "meta").iterdir()]
    assert f"step-{int(best[1]):08d}" in kept


def test_checkpoints_by_time(tmp_path: Path, glyphs: Path) -> None:
    run_well(
        "train",
        RECIPES / "smoke.yaml",
        f"data.url={glyphs}",
        "checkpoint={every_minutes: 1e-9, keep_last: 9}",
        "validation.every_steps=null",
        "tracking=none",
        cwd=tmp_path,
    )
    assert len(list((tmp_path / "runs" / "smoke" / "checkpoints" / "meta").iterdir())) == 6


def test_a_run_with_bfloat16_and_micro_batches_learns_finite_numbers(tmp_path: Path, glyphs: Path) -> None:
    finished = run(
        "train",
        RECIPES / "smoke.yaml",
        f"data.url={glyphs}",
        "precision.compute=bfloat16",
        "outer.micro_batch=1",
        "tracking=none",
        cwd=tmp_path,
    )
    assert finished.code == 0, finished
    records = curve(tmp_path / "runs" / "smoke")
    assert all(record["skipped"] == 0.0 for record in records)
