"""The trackers without MLflow: JSON lines, none, the factory, facts about the environment."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from metaloom.errors import TrackingError
from metaloom.tracking import (
    JsonlTracker,
    MlflowTracker,
    NullTracker,
    RunTracker,
    environment_facts,
    make_tracker,
    read_metrics,
)
from metaloom.tracking.environment import git_revision
from metaloom.tracking.jsonl import truncate_from


def start(tracker: RunTracker, resume_id: str | None = None) -> str:
    return tracker.start(run_name="a run", params={}, tags={}, resume_id=resume_id)


def logged(path: Path) -> list[tuple[int, dict[str, float]]]:
    return [(record.step, dict(record.metrics)) for record in read_metrics(path)]


def test_importing_tracking_imports_neither_mlflow_nor_torch_nor_matplotlib() -> None:
    program = (
        "import sys, metaloom.tracking, metaloom.tracking.report, metaloom.tracking.console;"
        "print([name for name in ('mlflow', 'torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_jsonl_lines_are_read_back_in_order_with_their_names_and_times(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    start(tracker)
    tracker.log({"meta_loss": 1.5, "validation_accuracy": 0.25}, 0)
    tracker.log({"meta_loss": 1.0}, 1)
    assert logged(path) == [(0, {"meta_loss": 1.5, "validation_accuracy": 0.25}), (1, {"meta_loss": 1.0})]
    times = [record.time_s for record in read_metrics(path)]
    assert times == sorted(times)
    assert tracker.flush(1.0)
    assert tracker.describe() == str(path)
    tracker.finish("finished")


def test_jsonl_writes_strict_json_for_nan_and_infinities(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    start(tracker)
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, 0)
    tracker.finish("finished")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    metrics = read_metrics(path)[0].metrics
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"]) == (math.inf, -math.inf)


def test_a_continued_run_drops_the_steps_that_it_will_log_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path)
    run_id = start(first)
    for step in range(8):
        first.log({"meta_loss": float(step)}, step)
    first.finish("killed")
    second = JsonlTracker(path, first_step=5)
    assert start(second, resume_id=run_id) == run_id
    for step in range(5, 7):
        second.log({"meta_loss": 10.0 * step}, step)
    second.finish("finished")
    assert [step for step, _ in logged(path)] == [0, 1, 2, 3, 4, 5, 6]
    assert logged(path)[5] == (5, {"meta_loss": 50.0})
    assert list(tmp_path.iterdir()) == [path], "the replacement file is gone"


def test_a_new_run_in_an_old_folder_starts_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        tracker = JsonlTracker(path)
        start(tracker)
        tracker.log({"meta_loss": 1.0}, 0)
        tracker.finish("killed")
    assert logged(path) == [(0, {"meta_loss": 1.0})]


def test_a_line_torn_by_a_kill_is_not_read_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "time_s": 1.0, "a": 1.0}\n{"step": 1, "time_s": 2.0, "a"')
    assert logged(path) == [(0, {"a": 1.0})]
    tracker = JsonlTracker(path, first_step=1)
    start(tracker)
    tracker.log({"a": 2.0}, 1)
    tracker.finish("finished")
    assert logged(path) == [(0, {"a": 1.0}), (1, {"a": 2.0})]


def test_truncation_leaves_a_file_alone_that_has_nothing_to_drop(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "time_s": 1.0, "a": 1.0}\n')
    before = path.stat()
    assert truncate_from(path, 1) == 0
    assert path.stat().st_ino == before.st_ino
    assert truncate_from(tmp_path / "missing.jsonl", 0) == 0


def test_a_foreign_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "time_s": 1.0}\n[1, 2]\n')
    with pytest.raises(
        TrackingError, match=r"metrics\.jsonl, line 2: not a metrics record .* remove the line"
    ):
        read_metrics(path)
    with pytest.raises(TrackingError, match="metrics cannot be written there"):
        start(JsonlTracker(path, first_step=3))


def test_a_missing_metrics_file_is_an_error_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"cannot be read .* metrics\.jsonl of a run folder"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="metrics cannot be written there"):
        start(JsonlTracker(tmp_path / "file" / "metrics.jsonl"))


@pytest.mark.parametrize("name", ["step", "time_s"])
def test_a_metric_cannot_take_a_name_of_the_format(tmp_path: Path, name: str) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    start(tracker)
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        tracker.log({name: 1.0}, 0)
    tracker.finish("failed")


def test_artifacts_from_elsewhere_are_copied_and_those_of_the_run_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracker = JsonlTracker(run / "metrics.jsonl")
    start(tracker)
    (run / "report.html").write_text("inside")
    (tmp_path / "figure.png").write_text("outside")
    tracker.artifact(run / "report.html")
    tracker.artifact(tmp_path / "figure.png", "figures")
    tracker.finish("finished")
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert files == ["artifacts/figures/figure.png", "metrics.jsonl", "report.html"]


def test_only_rank_0_records_and_only_when_asked(tmp_path: Path) -> None:
    assert isinstance(make_tracker("none", tmp_path, rank=0), NullTracker)
    assert isinstance(make_tracker("mlflow", tmp_path, rank=1), NullTracker)
    assert isinstance(make_tracker("jsonl", tmp_path, rank=0), JsonlTracker)
    assert isinstance(make_tracker("mlflow", tmp_path, rank=0), MlflowTracker)
    null = make_tracker("jsonl", tmp_path, rank=3)
    assert start(null, resume_id="an-id") == "an-id"
    null.log({"a": 1.0}, 0)
    null.artifact(tmp_path / "missing")
    assert null.flush(0.0)
    null.finish("finished")
    assert list(tmp_path.iterdir()) == []


def test_environment_facts_have_versions_and_no_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_PASSWORD", "hunter2-planted")
    facts = environment_facts()
    assert facts["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {
        "version.metaloom",
        "version.torch",
        "version.numpy",
        "version.mlflow",
        "platform",
    } <= facts.keys()
    text = " ".join(facts.values())
    assert "hunter2-planted" not in text
    assert str(Path.home()) not in text


def test_the_git_revision_says_when_tracked_files_were_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-q", "-m", "first")
    revision = git("rev-parse", "HEAD")
    (tmp_path / "untracked.txt").write_text("")
    assert git_revision(tmp_path) == revision
    (tmp_path / "a.txt").write_text("2")
    assert git_revision(tmp_path) == f"{revision} (dirty)"
