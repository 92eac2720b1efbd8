"""Every mistake ends in one clear message and its exit code: no traceback, no hang, nothing started."""

import shutil
from pathlib import Path

import pytest

from tests.commands import RECIPES, Finished, run, run_well

SMOKE = RECIPES / "smoke.yaml"


def assert_one_message(finished: Finished, code: int, *parts: str) -> None:
    assert finished.code == code, finished
    for part in parts:
        assert part in finished.errors
    assert finished.errors.count("error:") == 1
    assert "Traceback" not in finished.errors + finished.output


@pytest.fixture
def broken_glyphs(glyphs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(glyphs, tmp_path / "glyphs"))


def train(tmp_path: Path, *overrides: str | Path) -> Finished:
    return run("train", SMOKE, *overrides, cwd=tmp_path, timeout_s=60)


def test_a_misspelt_key_and_a_wrong_type_are_told_together(tmp_path: Path) -> None:
    finished = train(tmp_path, "outer.task_per_step=3", "adaptation.rule.lr=fast")
    assert_one_message(
        finished,
        2,
        "2 problems",
        "did you mean 'tasks_per_step'?",
        "adaptation.rule.lr: 'fast' is not a number",
    )
    assert not (tmp_path / "runs").exists()


def test_more_ways_than_classes(tmp_path: Path, glyphs: Path) -> None:
    finished = train(tmp_path, f"data.url={glyphs}", "data.n_way=13")
    assert_one_message(finished, 3, "data.n_way is 13", "has 12 classes", "lower data.n_way to at most 12")
    assert not (tmp_path / "runs").exists()


def test_missing_data(tmp_path: Path) -> None:
    finished = train(tmp_path, f"data.url={tmp_path}/nothing")
    assert_one_message(finished, 3, "holds no index.json", "metaloom data make glyphs")


def test_data_of_another_kind(tmp_path: Path, stdlib: Path) -> None:
    finished = train(tmp_path, f"data.url={stdlib}")
    assert_one_message(finished, 3, "has layout 'documents', and what is drawn here needs 'classes'")


def test_missing_and_truncated_shards_are_all_named(tmp_path: Path, broken_glyphs: Path) -> None:
    first, second, *_ = sorted(broken_glyphs.glob("*.tar"))
    first.unlink()
    with second.open("r+b") as file:
        file.truncate(1000)
    finished = train(tmp_path, f"data.url={broken_glyphs}")
    assert_one_message(finished, 3, f"{first.name}: missing", f"{second.name}: truncated, 1000 bytes")


def test_data_damaged_throughout_end_all_ranks_with_a_name(tmp_path: Path, broken_glyphs: Path) -> None:
    shard = next(iter(sorted(broken_glyphs.glob("train*.tar"))))
    damaged = bytearray(shard.read_bytes())
    damaged[600::700] = bytes(byte ^ 0xFF for byte in damaged[600::700])
    shard.write_bytes(damaged)
    finished = train(tmp_path, f"data.url={broken_glyphs}", "--run", tmp_path / "run")
    assert_one_message(finished, 3, shard.name, "is damaged: bytes", "mend the data")
    assert "restart" not in finished.errors  # it would be as damaged again


def test_an_unwritable_run_folder(tmp_path: Path, glyphs: Path) -> None:
    (tmp_path / "file").touch()
    finished = train(tmp_path, f"data.url={glyphs}", "--run", tmp_path / "file" / "run")
    assert_one_message(finished, 5, "cannot be written", "Name another folder with --run")


def test_a_folder_that_holds_a_run(tmp_path: Path, glyphs: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 0, "loss": 1.0}\n')
    finished = train(tmp_path, f"data.url={glyphs}", "--run", tmp_path)
    assert_one_message(finished, 5, "already holds a run", "--resume")


def test_resume_with_a_changed_model_and_of_nothing(tmp_path: Path, glyphs: Path) -> None:
    run_well(
        "train", SMOKE, f"data.url={glyphs}", "outer.num_steps=2", "--run", tmp_path / "run", cwd=tmp_path
    )
    changed = run("train", "--resume", tmp_path / "run", "model.width=16", cwd=tmp_path)
    assert_one_message(changed, 2, "cannot be resumed", "model.width: 8 in the run, 16 now")
    nothing = run("train", "--resume", tmp_path / "nothing", cwd=tmp_path)
    assert_one_message(nothing, 5, "holds no run")
    # The recipe is as before, but the checkpoint is of another model.
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("width: 8", "width: 4"))
    other = run("train", "--resume", tmp_path / "run", cwd=tmp_path)
    assert_one_message(
        other,
        4,
        "belongs to another model",
        "init.head.weight: shape [3, 8] in the checkpoint, [3, 4] in the model",
    )


def test_other_data_than_a_run_was_trained_on(tmp_path: Path, glyphs: Path) -> None:
    run_well("data", "make", "glyphs", tmp_path / "other", "--max-per-split", "9", cwd=tmp_path)
    run_well("train", SMOKE, f"data.url={glyphs}", "tracking=none", "--run", tmp_path / "run", cwd=tmp_path)
    for words in (["train", "--resume"], ["evaluate"]):
        finished = run(*words, tmp_path / "run", f"data.url={tmp_path}/other", cwd=tmp_path)
        assert_one_message(finished, 3, "holds other data", "start a new run")


def test_a_wrong_lora_target_is_found_before_the_pre_training(tmp_path: Path, stdlib: Path) -> None:
    recipe = RECIPES / "stdlib-lora.yaml"
    finished = run("train", recipe, f"data.url={stdlib}", "adaptation.fast.targets=[qkvv]", cwd=tmp_path)
    assert_one_message(finished, 2, "'qkvv'; matches no linear layer", "qkv, proj, fc_in, fc_out, head")


def test_several_hosts_without_a_folder_that_all_of_them_know(tmp_path: Path, glyphs: Path) -> None:
    finished = train(
        tmp_path, f"data.url={glyphs}", "launcher.hosts={endpoint: 'node-0:29400', num_hosts: 2}"
    )
    assert_one_message(finished, 2, "several hosts work on one run folder; name it with --run DIR")


def test_evaluation_of_what_was_not_trained(tmp_path: Path) -> None:
    assert_one_message(run("evaluate", tmp_path, cwd=tmp_path), 5, "holds no run")


def test_an_unreachable_tracking_server_is_told_at_the_start_without_its_password(
    tmp_path: Path, glyphs: Path
) -> None:
    words = (f"data.url={glyphs}", "--run", tmp_path / "run")
    finished = train(tmp_path, *words, "tracking.uri=http://127.0.0.1:9")
    assert_one_message(finished, 6, "http://127.0.0.1:9", "cannot be used")
    assert train(tmp_path, *words, "tracking=none").code == 0  # the folder is not spoilt
    secret = train(tmp_path, f"data.url={glyphs}", "tracking.uri=http://me:hunter2@127.0.0.1:9")
    assert_one_message(secret, 2, "MLFLOW_TRACKING_USERNAME")
    assert "hunter2" not in secret.errors
