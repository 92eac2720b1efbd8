"""Ranks that are killed, crash or hang: the job goes on by itself, or ends with the cause."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import (
    RECIPES,
    begun,
    changed,
    curve,
    end,
    logs,
    rank_of,
    run,
    run_well,
    wait_for_step,
)
from tests.hosts import held

SMOKE = RECIPES / "smoke.yaml"
STEPS = 60
LONG = (
    f"outer.num_steps={STEPS}",
    "outer.ema=0.9",
    "checkpoint.every_steps=4",
    "validation.every_steps=20",
    "model.width=16",
)
# What rank 1 does whenever it reads the tasks of the fifth outer step.
FAULTY = """
import os
if os.environ.get("RANK") == "1":
    from metaloom.datasets import EpisodeStream
    read = EpisodeStream.__next__
    def read_and_fail(stream):
        step, episodes = read(stream)
        if step == 4:
            raise ZeroDivisionError("injected")
        return step, episodes
    EpisodeStream.__next__ = read_and_fail
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[None]:
    """Commands whose rank 1 fails in the fifth outer step."""
    with changed(tmp_path, FAULTY):
        yield


def test_killed_ranks_are_started_again_and_change_no_number(tmp_path: Path, glyphs: Path) -> None:
    words = ("train", SMOKE, f"data.url={glyphs}", *LONG)
    run_well(*words, "tracking=none", "--run", tmp_path / "whole", cwd=tmp_path)
    folder = tmp_path / "run"
    with begun(*words, "--run", folder, cwd=tmp_path) as process:
        for step, rank in ((6, 1), (22, 0)):
            wait_for_step(folder / "metrics.jsonl", step, process)
            kill_and_wait_for_restart(rank, process)
        finished = end(process)
    errors = finished.errors
    assert finished.code == 0, errors + logs(tmp_path)
    assert "fault: rank 1 was killed by SIGKILL at outer step " in errors
    assert "fault: rank 0 was killed by SIGKILL at outer step " in errors
    assert "restart 1 of 3, from the last checkpoint" in errors
    assert "restart 2 of 3, from the last checkpoint" in errors
    assert "error:" not in errors
    assert "resumed after outer step" in finished.output
    # Bit for bit, each step once.
    assert curve(folder) == curve(tmp_path / "whole")
    assert tracked_steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_killed_rank_under_deepspeed_is_started_again_from_the_same_checkpoints(
    tmp_path: Path, glyphs: Path
) -> None:
    words = ("train", SMOKE, f"data.url={glyphs}", "tracking=none", "checkpoint.every_steps=2")
    alone = "launcher.num_processes=1"
    run_well(*words, alone, "--run", tmp_path / "whole", cwd=tmp_path)
    folder = tmp_path / "run"
    with held(tmp_path) as hold:
        hold.at(3)
        with begun(*words, "sharding=deepspeed_zero", "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", 3, process)
            kill_and_wait_for_restart(1, process)
            hold.at(6)
            finished = end(process)
    assert finished.code == 0, finished.errors + logs(tmp_path)
    assert "fault: rank 1 was killed by SIGKILL at outer step " in finished.errors
    assert "resumed after outer step 2 of 6" in finished.output
    assert len(curve(folder)) == len(curve(tmp_path / "whole"))
    for ours, theirs in zip(curve(folder), curve(tmp_path / "whole"), strict=True):
        # float32: tasks are summed in another order, and Adam amplifies the rounding of small gradients.
        assert ours == pytest.approx(theirs, rel=1e-4)


def kill_and_wait_for_restart(rank: int, process: "subprocess.Popen[bytes]") -> None:
    """Returns once a rank that was killed is there again, as another process."""
    killed = rank_of(process.pid, rank)
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 180
    while True:
        with contextlib.suppress(ValueError):  # there is none now
            if rank_of(process.pid, rank) != killed:
                return
        assert process.poll() is None, f"the job ended after rank {rank} was killed"
        assert time.monotonic() < deadline, f"rank {rank} was not started again"
        time.sleep(0.01)


def tracked_steps(folder: Path) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("metaloom")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(tracked.info.run_id, "meta_loss")]
    client._tracking_client.store._dispose_engine()
    return sorted(steps)


@pytest.mark.usefixtures("faulty")
def test_a_fault_that_comes_again_at_the_same_step_ends_the_job_with_its_cause(
    tmp_path: Path, glyphs: Path
) -> None:
    finished = run(
        "train", SMOKE, f"data.url={glyphs}", "tracking=none", "--run", tmp_path / "run", cwd=tmp_path
    )
    assert finished.code == 1
    said = "rank 1 at outer step 5: ZeroDivisionError: injected\nThis is a defect or a fault of rank 1; "
    assert f"fault: {said}" in finished.errors
    assert f"error: {said}" in finished.errors
    assert "It is the second fault in a row at outer step 5, so it is not tried again." in finished.errors
    assert "restart 1 of 3" in finished.errors
    assert "restart 2" not in finished.errors
    (where,) = {
        line.partition("traceback is in ")[2] for line in finished.errors.splitlines() if "attempt_1" in line
    }
    assert 'raise ZeroDivisionError("injected")' in (Path(where) / "stderr.log").read_text()


def test_a_rank_that_hangs_is_named_when_the_timeout_has_passed(tmp_path: Path, glyphs: Path) -> None:
    folder = tmp_path / "run"
    limits = ("outer.num_steps=5000", "launcher.timeout_s=3", "launcher.max_restarts=0", "tracking=none")
    with begun("train", SMOKE, f"data.url={glyphs}", *limits, "--run", folder, cwd=tmp_path) as process:
        wait_for_step(folder / "metrics.jsonl", 3, process)
        os.kill(rank_of(process.pid, 1), signal.SIGSTOP)
        finished = end(process)
    errors = finished.errors
    assert finished.code == 1
    assert "error: rank 0 at outer step " in errors
    assert "was silent for longer than launcher.timeout_s: " in errors
    assert re.search(r"\(last seen: rank 0 at outer step \d+, .*; rank 1 at outer step \d+, \w", errors)


def test_a_run_goes_on_with_any_number_of_processes(tmp_path: Path, glyphs: Path) -> None:
    folder = tmp_path / "run"
    run_well(
        "train",
        SMOKE,
        f"data.url={glyphs}",
        "precision.compute=float64",
        "tracking=none",
        "outer.num_steps=12",
        "checkpoint={every_steps: 4, keep_last: 9}",
        "launcher.num_processes=4",
        "--run",
        folder,
        cwd=tmp_path,
    )
    whole = curve(folder)
    assert len(whole) == 12
    for step, num_processes in ((4, 1), (8, 2)):
        for later in (folder / "checkpoints/meta").iterdir():
            if int(later.name.removeprefix("step-")) > step:
                (later / "manifest.json").unlink()  # as if it had been killed before
        output = run_well(
            "train", "--resume", folder, f"launcher.num_processes={num_processes}", cwd=tmp_path
        )
        assert "changed: launcher.num_processes: " in output
        assert f"resumed after outer step {step} of 12" in output
        for ours, theirs in zip(curve(folder), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-7)  # sums over tasks are added in another order
