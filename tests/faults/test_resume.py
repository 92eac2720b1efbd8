"""A run that was killed and resumed is the run that was not."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.checkpoints.store import CheckpointStore
from tests.commands import (
    RECIPES,
    begun,
    curve,
    descendants,
    end,
    rank_of,
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
    # What changes in the course of a run, and what is counted in it.
    "adaptation.num_steps=2",
    "algorithm={hypergradient: rematerialized, step_weights: annealed, first_order_steps: 10}",
    "adaptation.norms={weights: per_step, statistics: per_step}",
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


def kill_at_step(step: int, *words: str | Path, run: Path) -> None:
    """Starts a training, and kills every process of it when it has logged a step."""
    with begun(*words, "--run", run, cwd=run.parent) as process:
        wait_for_step(run / "metrics.jsonl", step, process)


def final_tensors(run: Path, phase: str = "meta") -> dict[str, bytes]:
    newest = CheckpointStore(run / "checkpoints" / phase).load_newest(pytest.fail)
    assert newest is not None
    return {name: value.numpy().tobytes() for name, value in newest.tensors.items()}


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, glyphs: Path) -> None:
    words = ("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", *GLYPHS)
    run_well(*words, "--run", tmp_path / "whole", cwd=tmp_path)
    kill_at_step(14, *words, run=tmp_path / "killed")
    assert len(curve(tmp_path / "killed")) < STEPS
    output = run_well("train", "--resume", tmp_path / "killed", cwd=tmp_path)
    assert "resumed after outer step" in output
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert final_tensors(tmp_path / "killed") == final_tensors(tmp_path / "whole")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, stdlib: Path) -> tuple[tuple[str | Path, ...], Path]:
    """The words of a training that has a pre-training, and a run of it that nothing happens to."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = ("train", RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}", *STDLIB)
    run_well(*words, "--run", folder / "whole", cwd=folder)
    return words, folder / "whole"


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_ended_while_pretraining_and_resumed_equals_uninterrupted(
    tmp_path: Path, pretrained: tuple[tuple[str | Path, ...], Path], sent: signal.Signals
) -> None:
    (words, whole), folder = pretrained, tmp_path / "ended"
    if sent == signal.SIGKILL:
        kill_at_step(-30, *words, run=folder)
    else:
        with begun(*words, "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", -30, process)
            process.terminate()
            finished = end(process)
        assert finished.code == 75, finished
        (step,) = Catalogue(folder / "checkpoints" / "pretrain").steps()
        assert 30 <= step < 60
        assert f"saved after step {step} of pretrain" in finished.output
        assert not (folder / "checkpoints" / "meta").exists()
    run_well("train", "--resume", folder, cwd=tmp_path)
    assert curve(folder) == curve(whole)
    for phase in ("pretrain", "meta"):
        assert final_tensors(folder, phase) == final_tensors(whole, phase)


def test_a_rank_that_is_killed_ends_the_job_with_its_name(tmp_path: Path, glyphs: Path) -> None:
    run = tmp_path / "run"
    words = (f"data.url={glyphs}", "outer.num_steps=5000", "launcher.max_restarts=0")
    with begun("train", RECIPES / "smoke.yaml", *words, "--run", run, cwd=tmp_path) as process:
        wait_for_tracking(run)
        wait_for_step(run / "metrics.jsonl", 3, process)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        finished = end(process)
    assert finished.code == 1
    said = r"error: rank 1 was killed by SIGKILL at outer step [0-9]+; its output is in "
    assert re.search(said, finished.errors)
    assert "Traceback" not in finished.errors
    assert tracked_status(run) == "FAILED"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_command_leaves_no_process_and_a_run_marked_killed(
    tmp_path: Path, glyphs: Path, sent: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    words = ("train", RECIPES / "smoke.yaml", f"data.url={glyphs}", "outer.num_steps=5000", "--run", run)
    with begun(*words, cwd=tmp_path) as process:
        wait_for_tracking(run)
        wait_for_step(run / "metrics.jsonl", 3, process)
        started = descendants(process.pid)
        process.send_signal(sent)
        finished = end(process)
    said = finished.output + finished.errors
    assert finished.code == code
    assert "Traceback" not in said
    deadline = time.monotonic() + 30.0  # a command that was killed is missed by its agent a little later
    while [pid for pid in started if is_running(pid)] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if is_running(pid)]
    assert tracked_status(run) == "KILLED", said[-3000:]


def wait_for_tracking(run: Path) -> None:
    """Returns once the run's store is there. MLflow may take longer for it than a job that ends waits."""
    deadline = time.monotonic() + 120.0
    while not (run / "mlflow.db").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tracked_status(run: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("metaloom")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    client._tracking_client.store._dispose_engine()
    return str(tracked.info.status)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
