"""`metaloom checkpoints`: what there is, whether it is whole, and what no rule keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metaloom.checkpoints.retention import Retention
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.cli import main
from tests.commands import RECIPES, run_well


def stored(root: Path, *steps: int) -> None:
    store = CheckpointStore(root / "meta", retention=Retention(last=9))
    for step in steps:
        metrics = {"validation_loss": 1.0 / step}
        store.save(Checkpoint(step, {"a": torch.ones(300)}, {}, metrics))


def test_a_listing_names_what_is_whole_and_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 1, 2, 3)
    (tmp_path / "meta" / "step-00000003" / "manifest.json").unlink()
    next((tmp_path / "meta" / "step-00000002").glob("*.safetensors")).write_bytes(b"")
    assert main(["checkpoints", "list", str(tmp_path), "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)
    assert (first["state"], first["metrics"]) == ("complete", {"validation_loss": 1.0})
    assert "has 0 bytes, the manifest says" in second["state"]
    assert third["state"] == "no manifest: being written, or left by a run that was killed"
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    assert "KiB" in capsys.readouterr().out


def test_verifying_ends_with_code_4_where_one_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 1, 2)
    assert main(["checkpoints", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(", as written\n") == 2
    shard = next((tmp_path / "meta" / "step-00000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert main(["checkpoints", "verify", str(tmp_path)]) == 4
    assert "meta step 2: damaged: " in capsys.readouterr().out
    assert main(["checkpoints", "verify", str(tmp_path), "--step", "1"]) == 0
    capsys.readouterr()
    assert main(["checkpoints", "verify", str(tmp_path), "--step", "7"]) == 4
    assert "holds no complete checkpoint of step 7." in capsys.readouterr().err


def test_pruning_says_what_it_would_do_and_does_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 1, 2, 3, 4)
    words = ["checkpoints", "prune", str(tmp_path), "--keep-last", "1", "--keep-every", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 1, 3; kept 2, 4\n"
    assert main(words) == 0
    assert capsys.readouterr().out == "deleted 1, 3; kept 2, 4\n"
    assert CheckpointStore(tmp_path / "meta").steps() == [2, 4]


def test_pruning_keeps_the_newest_one_that_is_not_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 1, 2, 3)
    # Only who reads its bytes finds this damage.
    shard = next((tmp_path / "meta" / "step-00000003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    words = ["checkpoints", "prune", str(tmp_path), "--keep-last", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 1; kept 2, 3\n"
    assert main(words) == 0
    assert capsys.readouterr().out == "deleted 1; kept 2, 3\n"
    assert CheckpointStore(tmp_path / "meta").catalogue.verify(2).step == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "--keep-last", "0"], "--keep-last is 0; it must be at least 1"),
        (["prune"], "--keep-last is needed where no run's folder"),
    ],
)
def test_a_rule_that_keeps_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    stored(tmp_path, 1)
    assert main(["checkpoints", words[0], str(tmp_path), *words[1:]]) == 4
    assert message in capsys.readouterr().err


def test_a_place_without_checkpoints_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "list", str(tmp_path / "nowhere")]) == 4
    assert "nowhere holds no checkpoints: name a run's folder" in capsys.readouterr().err


def test_a_run_is_pruned_by_its_recipe(tmp_path: Path, glyphs: Path) -> None:
    run = tmp_path / "run"
    words = (f"data.url={glyphs}", "tracking=none", "checkpoint={every_steps: 1, keep_last: 9}")
    run_well("train", RECIPES / "smoke.yaml", *words, "--run", run, cwd=tmp_path)
    pruned = run_well("checkpoints", "prune", run, "--keep-last", "1", cwd=tmp_path)
    assert pruned.startswith("deleted 1")
    assert pruned.endswith("6\n")
