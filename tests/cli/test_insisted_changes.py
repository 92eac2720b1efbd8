"""A run goes on by a recipe that makes it another one, where its user insists; or it ends in one message."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import metaloom.train_command
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.cli import main
from metaloom.datasets import make_dataset
from metaloom.engine.precision import LossScaler, Precision
from metaloom.errors import MetaloomError
from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import Recipe, load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train
from tests.commands import RECIPES, curve

SMOKE = RECIPES / "smoke.yaml"


def here(job: str, recipe: Recipe, folder: RunFolder, *arguments: object, locks: object) -> int:
    """Trains in this process what the command would start others for."""
    try:
        train(recipe, Place(folder, torch.device("cpu"), None, Shutdown()))
    except MetaloomError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, glyphs: Path, alone: None) -> Path:
    """A run of three outer steps, of tasks of two groups."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    part = f"kind: classes, url: '{glyphs}', n_way: 3, n_shot: 1, n_query: 2"
    words = (
        f"data={{kind: mixture, parts: [{{data: {{{part}}}}}, {{weight: 2.0, data: {{{part}}}}}]}}",
        "outer={num_steps: 3, tasks_per_step: 2, combiner: {kind: group_dro, step_size: 0.5}}",
        "model.width=4",
        "validation={every_steps: 1, num_episodes: 2}",
        "checkpoint={every_steps: 1, keep_last: 9}",
        "launcher.num_processes=1",
        "tracking=none",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metaloom.train_command, "launch_job", here)
        assert main(["train", str(SMOKE), *words, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(metaloom.train_command, "launch_job", here)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(run: Path, *words: str) -> int:
    return main(["train", "--resume", str(run), *words])


def more(run: Path, *words: str) -> int:
    """Three outer steps more, as insisted."""
    return resume(run, "outer.num_steps=6", *words, "--insist")


def newest(run: Path) -> Checkpoint:
    found = CheckpointStore(run / "checkpoints" / "meta").load_newest(pytest.fail)
    assert found is not None
    return found


def insisted(run: Path) -> list[tuple[str, str, str, int | None]]:
    facts = json.loads((run / "run.json").read_text())
    return [tuple(change.values()) for change in facts.get("insisted", [])]


def states(checkpoint: Checkpoint) -> set[str]:
    return {name.rpartition("/")[2] for name in checkpoint.tensors if name.startswith("optimizer/")}


def test_a_change_is_refused_with_the_flag_that_insists(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(run, "outer.optimizer.lr=0.01") == 2
    said = capsys.readouterr().err
    assert "outer.optimizer.lr: 0.001 in the run, 0.01 now" in said
    assert "or insist on them (--insist): then it goes on from its last checkpoint" in said
    assert insisted(run) == []


def test_the_flag_is_for_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(SMOKE), "--run", str(tmp_path / "run"), "--insist"]) == 2
    assert "--insist is for a run that goes on: name it with --resume RUN" in capsys.readouterr().err


def test_rate_and_length_change_as_insisted_and_that_is_kept(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = "evaluation={num_episodes: 2, baselines: [random], tuning: {num_episodes: 2}}"
    assert more(run, "outer.optimizer.lr=0.01", "name=other", quick) == 0
    said = capsys.readouterr().out
    assert "changed, as insisted: outer.num_steps: 3 -> 6\n" in said
    assert "changed, as insisted: outer.optimizer.lr: 0.001 -> 0.01\n" in said
    assert "changed: name: smoke -> other\n" in said
    assert curve(run)[:3] == curve(trained)
    assert [record["step"] for record in curve(run)] == [1, 2, 3, 4, 5, 6]
    assert curve(run)[3]["outer_lr"] > 0.005
    kept = [("outer.num_steps", "3", "6", 3), ("outer.optimizer.lr", "0.001", "0.01", 3)]
    assert insisted(run) == kept
    assert newest(run).scalars["origin"]["insisted"][1]["path"] == "outer.optimizer.lr"
    evaluate(load_recipe(run / "recipe.yaml"), Place(RunFolder(run), torch.device("cpu"), None, Shutdown()))
    page = (run / "report.html").read_text()
    assert "outer.optimizer.lr: 0.001 -&gt; 0.01 after outer step 3" in page
    # Given again, it insists on nothing.
    assert more(run, "outer.optimizer.lr=0.01", "name=other") == 0
    assert insisted(run) == kept


def test_the_command_of_a_cluster_insists_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = json.loads((run / "run.json").read_text())["run"]
    recipe = shutil.copy(run / "recipe.yaml", run.parent / "recipe.yaml")
    words = ("train", str(recipe), "outer.num_steps=4", "--run", str(run), "--run-id", name)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(words) == 2
        assert "insist on them (--insist)" in capsys.readouterr().err
        assert main([*words, "--insist"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert newest(run).step == 4


def test_a_run_whose_folder_is_lost_keeps_what_was_insisted_on(run: Path) -> None:
    assert more(run) == 0
    again = run.parent / "again"
    assert main(["train", "--resume", f"file://{run}/checkpoints", "--run", str(again)]) == 0
    assert insisted(again) == [("outer.num_steps", "3", "6", 3)]


def test_a_run_whose_record_is_lost_goes_on_by_the_command_that_the_message_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").unlink()
    again, words = run.parent / "again", ["train", "--resume", f"{run}/checkpoints", "--run"]
    assert resume(run) == 4
    assert f"metaloom {' '.join(words)} DIR" in capsys.readouterr().err
    with RunFolder(run).locked("train"):
        assert main([*words, str(again)]) == 5
    assert f"{run}: another `metaloom train` works on this run" in capsys.readouterr().err
    assert main([*words, str(again)]) == 0
    assert "resumed after outer step 3 of 3" in capsys.readouterr().out
    # Nor do both train later on.
    with RunFolder(run).locked("train"):
        assert resume(again) == 5
    assert f"{run}: another `metaloom train` works on this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"), [('{"run": ', "Expecting value"), ("[]", "it is no JSON object")]
)
def test_a_damaged_record_of_a_run_is_named_with_the_way_on(
    run: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    (run / "run.json").write_text(content)
    assert resume(run) == 5
    said = capsys.readouterr().err
    assert f"run.json is damaged: {reason}" in said
    assert f"metaloom train --resume {run}/checkpoints --run DIR" in said


def test_a_run_is_shortened_to_what_it_has_done(run: Path) -> None:
    assert resume(run, "outer.num_steps=2", "--insist") == 0
    assert newest(run).step == 3


def test_another_optimizer_begins_without_states(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert more(run, "outer.optimizer={kind: sgd, lr: 0.1, momentum: 0.9}") == 0
    said = capsys.readouterr().out
    assert "outer.optimizer.kind: sgd; begins without states" in said
    assert "those in the checkpoint are of adam: exp_avg, exp_avg_sq, step" in said
    assert states(newest(run)) == {"momentum_buffer"}
    assert resume(run, "outer.optimizer={kind: adam, lr: 0.001}", "outer.num_steps=7", "--insist") == 0
    assert "those in the checkpoint are of sgd: momentum_buffer" in capsys.readouterr().out
    assert states(newest(run)) == {"exp_avg", "exp_avg_sq", "step"}
    assert [change[3] for change in insisted(run)][-1] == 6


@pytest.mark.parametrize("combiner", ["{kind: dwa, num_steps: 1}", "mean", "{kind: mean, log_cosines: true}"])
def test_another_combiner_begins_anew(combiner: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert more(run, f"outer.combiner={combiner}") == 0
    assert "begins anew, since the checkpoint has the state of group_dro" in capsys.readouterr().out
    assert newest(run).step == 6


def test_another_measure_of_the_best_compares_validations_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest(run).scalars["progress"]["best_step"] is not None
    assert more(run, "validation.best_by=accuracy") == 0
    assert "validation.best_by: changed; validations are compared anew" in capsys.readouterr().out
    progress = newest(run).scalars["progress"]
    assert progress["best_step"] > 3
    assert 0.0 <= progress["best_value"] <= 1.0


def test_a_moving_average_begins_and_ends(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert more(run, "outer.ema=0.9") == 0
    assert "the moving average begins with the parameters in the checkpoint" in capsys.readouterr().out
    assert newest(run).under("average/").keys() == newest(run).under("meta/").keys()
    assert resume(run, "outer.ema=null", "outer.num_steps=7", "--insist") == 0
    assert "the moving average in the checkpoint is left out" in capsys.readouterr().out
    assert newest(run).under("average/") == {}


def test_what_is_left_to_be_chosen_is_measured_when_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert more(run, "algorithm.hypergradient=auto", "adaptation.fast.tasks=auto") == 0
    assert "hypergradient: " in capsys.readouterr().out
    assert newest(run).scalars["choices"]["estimator"] is not None


def test_scales_of_half_precision_begin_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert more(run, "precision.compute=float16") == 0
    assert "precision.compute: float16; its scales begin anew" in capsys.readouterr().out
    assert newest(run).scalars["scaler"]["loss_scale"] > 1.0


def test_scales_without_a_state_stay_as_at_the_start() -> None:
    scaler = LossScaler(Precision("float16"))
    before = scaler.scales
    scaler.load({})
    assert scaler.scales == before


def test_another_model_is_refused_with_its_shapes_and_the_run_is_as_it_was(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (run / "recipe.yaml").read_bytes()
    for words in (("model.width=8",), ("precision.compute=float64",)):
        assert resume(run, *words, "--insist") == 4
        said = capsys.readouterr()
        assert "belongs to another model" in said.err
        assert "the recipe is as it was, since the run did not go on with the changes" in said.out
        assert (run / "recipe.yaml").read_bytes() == recipe
        assert insisted(run) == []
    assert resume(run, "model.width=8", "--insist") == 4
    assert "init.head.weight: shape [3, 4] in the checkpoint, [3, 8] in the model" in capsys.readouterr().err
    assert resume(run) == 0


def test_a_run_goes_on_with_other_data_as_insisted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    make_dataset("glyphs", other, max_per_split=9)
    urls = [f"data.parts.{part}.data.url={other}" for part in (0, 1)]
    assert resume(run, *urls) == 3
    assert "start a new run, or insist on it (--insist)." in capsys.readouterr().err
    assert more(run, *urls) == 0
    said = capsys.readouterr().out
    assert "changed, as insisted: the data's digest: " in said
    assert "the data: changed; validations are compared anew" in said
    assert [change[0] for change in insisted(run)] == ["outer.num_steps", "the data's digest"]
    assert resume(run) == 0  # they are the run's data now
