"""A run that was killed and resumed is the run that was not."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from metaloom.checkpoints import CheckpointStore
from tests.commands import (
    RECIPES,
    command,
    curve,
    descendants,
    environment,
    kill_tree,
    run_well,
    wait_for_step,
)

STEPS = 40
GLYPHS = (
    f"outer.num_steps={STEPS}",
    "outer.ema=0.9",
    "outer.clip_norm=1.0",
    "adaptation.rule.learned=per_tensor_per_step",
    "checkpoint.every_steps=4",
    "validation.every_steps=10",
    "model.width=16",
)
STDLIB = (
    "model.width=16",
    "model.num_heads=2",
    "pretrain={num_steps: 60, batch_size: 8, lr: 1e-3}",
    "outer.num_steps=4",
    "outer.schedule.warmup_steps=1",
    "outer.tasks_per_step=2",
    "validation.every_steps=4",
    "validation.num_episodes=2",
    "launcher.num_processes=1",
    "tracking=none",
)


def kill_at_step(step: int, *words: str | Path, run: Path, cwd: Path) -> None:
    """Starts a training, and kills every process of it when it has logged a step."""
    process = subprocess.Popen(
        command(*words, "--run", run),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_step(run / "metrics.jsonl", step, process)
    finally:
        kill_tree(process.pid)
        process.wait()


def final_tensors(run: Path, phase: str = "meta") -> dict[str, bytes]:
    newest = CheckpointStore(run / "checkpoints" / phase).load_newest()
    assert newest is not None
    return {name: value.numpy().tobytes() for name, value in newest.tensors.items()}


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, glyphs: Path) -> None:
    words = ("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", *GLYPHS)
    run_well(*words, "--run", tmp_path / "whole", cwd=tmp_path)
    kill_at_step(14, *words, run=tmp_path / "killed", cwd=tmp_path)
    assert len(curve(tmp_path / "killed")) < STEPS
    output = run_well("train", "--resume", tmp_path / "killed", cwd=tmp_path)
    assert "resumed after outer step" in output
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert final_tensors(tmp_path / "killed") == final_tensors(tmp_path / "whole")


def test_killed_while_pretraining_and_resumed_equals_uninterrupted(tmp_path: Path, stdlib: Path) -> None:
    words = ("train", RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}", *STDLIB)
    run_well(*words, "--run", tmp_path / "whole", cwd=tmp_path)
    kill_at_step(-30, *words, run=tmp_path / "killed", cwd=tmp_path)
    run_well("train", "--resume", tmp_path / "killed", cwd=tmp_path)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for phase in ("pretrain", "meta"):
        assert final_tensors(tmp_path / "killed", phase) == final_tensors(tmp_path / "whole", phase)


def test_resumed_on_another_number_of_ranks_gives_the_same_losses(tmp_path: Path, glyphs: Path) -> None:
    words = (
        "train",
        RECIPES / "smoke.yaml",
        f"data.url={glyphs}",
        "precision.compute=float64",
        "tracking=none",
    )
    run_well(*words, "--run", tmp_path / "whole", cwd=tmp_path)
    run_well(*words, "--run", tmp_path / "part", cwd=tmp_path)
    last = tmp_path / "part" / "checkpoints" / "meta" / "step-00000006" / "manifest.json"
    last.unlink()  # as if it had been killed while it wrote
    output = run_well("train", "--resume", tmp_path / "part", "launcher.num_processes=1", cwd=tmp_path)
    assert "changed: launcher.num_processes: 2 -> 1" in output
    assert "resumed after outer step 3 of 6" in output
    for ours, theirs in zip(curve(tmp_path / "part"), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)  # sums over tasks are added in another order


def test_a_rank_that_is_killed_ends_the_job_with_its_name(tmp_path: Path, glyphs: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", "outer.num_steps=5000", "--run", run),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_step(run / "metrics.jsonl", 3, process)  # type: ignore[arg-type]
        workers = [pid for pid in descendants(process.pid) if is_rank(pid, 1)]
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    assert process.returncode == 1
    assert "error: rank 1 died (Signal 9 (SIGKILL)" in errors
    assert "Traceback" not in errors


def is_rank(pid: int, rank: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"RANK={rank}".encode() in variables and b"metaloom.worker" in words
