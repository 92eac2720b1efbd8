"""What clusters rely on that start a command again and again: the run's id, and output that tells ranks
apart."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from metaloom.checkpoints.catalogue import Catalogue
from tests.commands import RECIPES, begun, changed, end, run, run_well, wait_for_step, wait_until
from tests.hosts import held

SMOKE = RECIPES / "smoke.yaml"
STEPS = 8
RUN = ("precision.compute=float64", f"outer.num_steps={STEPS}", "checkpoint.every_steps=2")


def test_a_command_with_a_run_id_begins_continues_and_finishes_one_run(tmp_path: Path, glyphs: Path) -> None:
    url = (tmp_path / "checkpoints").as_uri()
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, f"checkpoint.url={url}", "tracking=none")
    named = (*words, "--run-id", "one")
    assert "resumed" not in run_well(*named, "--run", tmp_path / "a", cwd=tmp_path)
    assert f"resumed after outer step {STEPS} of {STEPS}" in run_well(
        *named, "--run", tmp_path / "a", cwd=tmp_path
    )
    # In another folder, as where the first is lost.
    assert "resumed after outer step" in run_well(*named, "--run", tmp_path / "b", cwd=tmp_path)
    # A host that was replaced when the others had ended would wait for them in vain.
    nowhere = (
        "launcher.hosts={endpoint: 'nowhere.invalid:29400', num_hosts: 2, wait_s: 1000, own_folders: true}"
    )
    done = run(*named, nowhere, "--run", tmp_path / "d", cwd=tmp_path)
    assert (done.code, done.output) == (0, "the run one is finished\n")
    other = run(*words, "--run-id", "two", "--run", tmp_path / "a", cwd=tmp_path)
    assert other.code == 5
    assert f"{tmp_path / 'a'} holds another run (id one) than --run-id two" in other.errors
    taken = run(*words, "--run-id", "two", "--run", tmp_path / "c", cwd=tmp_path)
    assert taken.code == 4
    assert "holds checkpoints of another run than the one in" in taken.errors


# Records are delivered when they have to be alone: a store that is slow has them late.
LATE = """
import metaloom.tracking.mlflow
metaloom.tracking.mlflow.DELIVERY_INTERVAL_S = 1000.0
"""


def test_a_run_that_lost_its_folder_when_it_was_killed_goes_on_in_the_same_tracked_run(
    tmp_path: Path, glyphs: Path
) -> None:
    checkpoints, store = tmp_path / "checkpoints", f"sqlite:///{tmp_path}/mlflow.db"
    urls = (f"data.url={glyphs}", f"checkpoint.url={checkpoints.as_uri()}", f"tracking.uri={store}")
    words = ("train", SMOKE, *urls, *RUN, "--run-id", "one")
    with held(tmp_path, LATE) as hold:
        hold.at(5)
        with begun(*words, "--run", tmp_path / "a", cwd=tmp_path) as process:
            wait_for_step(tmp_path / "a" / "metrics.jsonl", 5, process)
            wait_until(lambda: 4 in Catalogue(checkpoints / "meta").steps())
        (before,) = tracked_runs(store)
        shutil.rmtree(tmp_path / "a")
    assert before.steps[:4] == [1, 2, 3, 4]
    assert "resumed after outer step 4 of 8" in run_well(*words, "--run", tmp_path / "b", cwd=tmp_path)
    (after,) = tracked_runs(store)
    assert after == Tracked(before.run_id, "FINISHED", list(range(1, STEPS + 1)))


@dataclasses.dataclass
class Tracked:
    """A run that MLflow has, and the outer steps of its metrics."""

    run_id: str
    status: str
    steps: list[int]


def tracked_runs(store: str) -> list[Tracked]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("metaloom")
    assert experiment is not None
    found = []
    for one in client.search_runs([experiment.experiment_id]):
        points = client.get_metric_history(one.info.run_id, "meta_loss")
        found.append(Tracked(one.info.run_id, one.info.status, sorted(point.step for point in points)))
    client._tracking_client.store._dispose_engine()
    return found


def test_a_host_that_waits_for_others_ends_at_once_when_it_is_asked(tmp_path: Path, glyphs: Path) -> None:
    url = (tmp_path / "checkpoints").as_uri()
    nowhere = (
        "launcher.hosts={endpoint: 'nowhere.invalid:29400', num_hosts: 2, wait_s: 1000, own_folders: true}"
    )
    words = (SMOKE, f"data.url={glyphs}", f"checkpoint.url={url}", nowhere, "--run-id", "one")
    with begun("train", *words, "--run", tmp_path / "run", cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"waiting for the name nowhere.invalid, for up to 1000 s\n"
        process.terminate()
        assert end(process).code == 75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--run-id", "a/b", "--run", "run"), "--run-id 'a/b': at most 63 letters, digits, points"),
        (("--run-id", "one"), "--run-id: name the run's folder too, with --run DIR"),
        (("--run-id", "one", "--resume", "run"), "begins or continues a run by itself: leave out --resume"),
    ],
)
def test_a_run_id_that_cannot_be_used_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, glyphs: Path
) -> None:
    refused = run("train", SMOKE, f"data.url={glyphs}", *words, cwd=tmp_path)
    assert refused.code == 5
    assert message in refused.errors


TALKATIVE = """
import os
if "RANK" in os.environ:
    import sys
    print(f"rank {os.environ['RANK']} says hello", file=sys.stderr)
"""


def test_what_all_ranks_print_is_shown_after_their_names(tmp_path: Path, glyphs: Path) -> None:
    words = (f"data.url={glyphs}", "tracking=none", "launcher.show_all_ranks=true")
    with changed(tmp_path, TALKATIVE):
        finished = run("train", SMOKE, *words, "--run", tmp_path / "run", cwd=tmp_path)
    assert finished.code == 0, finished
    assert "[rank 0] rank 0 says hello\n" in finished.errors
    assert "[rank 1] rank 1 says hello\n" in finished.errors
    lines = finished.output.splitlines()
    assert "[rank 0] meta-train: 6 steps" in lines
    assert all(line.startswith("[rank 0] ") for line in lines)
    assert any(line.startswith("[rank 0] next: metaloom evaluate ") for line in lines)  # to the last line
