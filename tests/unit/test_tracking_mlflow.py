"""Delivery to MLflow: real sqlite stores, a real server that is killed, stores that fail."""

import math
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from metaloom.errors import TrackingError
from metaloom.tracking import MlflowTracker, read_metrics
from metaloom.tracking.mlflow import MAX_KEY_LENGTH, fit_key
from tests.hosts import free_port

Points = Counter[tuple[str, int]]


@pytest.fixture(autouse=True)
def _leaves_no_thread_and_no_environment() -> Iterator[None]:
    environment = dict(os.environ)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "metaloom-mlflow"] == []
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name)
    }
    assert {name for name in changed if not name.startswith("PYTEST_")} == set()


def query(database: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(statement).fetchall()


def points(database: Path) -> Points:
    """How often each (metric, step) is in the store."""
    rows = query(database, "select key, step, count(*) from metrics group by key, step")
    return Counter({(str(key), int(str(step))): int(str(count)) for key, step, count in rows})


def start(
    tracker: MlflowTracker, *, params: Mapping[str, str] | None = None, resume_id: str | None = None
) -> str:
    return tracker.start(run_name="a run", params=params or {}, tags={"kind": "test"}, resume_id=resume_id)


class Server:
    """`mlflow server` on a port of its own, with all its worker processes in one process group."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "server.db"
        self.files = folder / "server-files"
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._log = (folder / "server.log").open("ab")
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        port = self.uri.rpartition(":")[2]
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.database}",
            "--artifacts-destination",
            str(self.files),
        ]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a process less to start
        }
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            cwd=self._folder,
            env=environment,
            start_new_session=True,
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._log.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.launch()
    try:
        server.wait()
        yield server
    finally:
        server.close()


def test_a_server_killed_in_mid_run_neither_loses_nor_doubles_nor_delays_metrics(
    server: Server, tmp_path: Path
) -> None:
    warnings: list[str] = []
    journal = tmp_path / "run" / "metrics.jsonl"
    tracker = MlflowTracker(
        server.uri, "exp", journal_path=journal, warn=warnings.append, finish_timeout_s=40
    )
    start(tracker, params={"lr": "0.1"})
    durations_s: list[float] = []
    num_steps = 0

    def log_for(duration_s: float) -> None:
        nonlocal num_steps
        deadline = time.monotonic() + duration_s
        while time.monotonic() < deadline:
            before = time.monotonic()
            tracker.log({"meta_loss": 1.0 / (num_steps + 1), "accuracy": 0.5}, num_steps)
            durations_s.append(time.monotonic() - before)
            num_steps += 1
            time.sleep(0.004)

    log_for(1.5)
    server.kill()
    log_for(1.5)
    assert not tracker.flush(0.5), "nothing is delivered to a dead server"
    server.launch()
    log_for(1.0)
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"png")
    tracker.artifact(figure, "figures")
    server.wait()
    log_for(0.5)
    tracker.finish("finished")

    assert points(server.database) == Counter(
        {(name, step): 1 for name in ("meta_loss", "accuracy") for step in range(num_steps)}
    )
    assert len(read_metrics(journal)) == num_steps
    # A tracker that waits for a dead server does so for seconds in every call of that time, which is most of
    # the calls then; a busy machine may stall a few.
    assert statistics.median(durations_s) < 0.2
    assert query(server.database, "select status from runs") == [("FINISHED",)]
    assert [path.name for path in server.files.rglob("*.png")] == ["figure.png"]
    assert len(warnings) == 2, warnings
    assert re.search(
        "does not take records: (connection re|remote end closed).*Training goes on", warnings[0]
    )
    assert "is back" in warnings[1]


def test_the_default_store_lies_in_the_run_folder_and_nothing_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere, run = tmp_path / "cwd", tmp_path / "run"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    warnings: list[str] = []
    tracker = MlflowTracker(None, "exp", journal_path=run / "metrics.jsonl", warn=warnings.append)
    run_id = start(tracker, params={"a.b": "1", "hub.token": "hunter2"})
    assert not tracker.flush(0.0), "the making of the store is not waited for"
    for step in range(1200):
        tracker.log({"meta_loss": float(step), "odd name (%)": float("nan")}, step)
    (run / "report.html").write_text("x")
    tracker.artifact(run / "report.html", "report")
    assert tracker.flush(60)
    assert tracker.describe() == f"sqlite:///{run}/mlflow.db (experiment exp, run {run_id})"
    tracker.finish("failed")
    tracker.finish("failed")

    store = run / "mlflow.db"
    assert points(store) == Counter(
        {(name, step): 1 for name in ("meta_loss", "odd name ___") for step in range(1200)}
    )
    assert query(store, "select status, name from runs") == [("FAILED", "a run")]
    assert sorted(query(store, "select key, value from params")) == [("a.b", "1"), ("hub.token", "***")]
    assert ("metaloom.run_id", run_id) in query(store, "select key, value from tags")
    assert [p.parent.name for p in (run / "mlflow").rglob("report.html")] == ["report"]
    assert list(elsewhere.iterdir()) == []
    assert warnings == []
    assert capfd.readouterr() == ("", ""), "MLflow says nothing"


HALF_MADE = """
import pathlib, sys
from metaloom.tracking import MlflowTracker
tracker = MlflowTracker(None, "metaloom", journal_path=pathlib.Path(sys.argv[1]) / "metrics.jsonl")
tracker.start(run_name="a run", params={}, tags={}, resume_id=None)
tracker.log({"loss": 1.0}, 1)
tracker.finish("finished")
"""


def is_half_made(folder: Path) -> bool:
    """Whether a table is just being copied into another form, and would be in the way later."""
    for path in folder.glob("mlflow.db*"):
        try:
            return bool(query(path, "select 1 from sqlite_master where name like '%alembic_tmp%'"))
        except sqlite3.Error:
            continue  # it is being written
    return False


def test_a_store_whose_making_was_killed_is_made_anew_and_gets_everything(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HALF_MADE, tmp_path], stderr=subprocess.DEVNULL)
    try:
        while not is_half_made(tmp_path):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    tracker = MlflowTracker(
        None,
        "metaloom",
        journal_path=tmp_path / "metrics.jsonl",
        first_step=2,
        warn=pytest.fail,
        finish_timeout_s=120.0,
    )
    start(tracker, resume_id="an id")
    tracker.finish("finished")
    assert points(tmp_path / "mlflow.db") == {("loss", 1): 1}
    assert not (tmp_path / "mlflow.db.partial").exists()


def test_a_continued_run_keeps_its_params_and_gets_what_was_lost_but_nothing_twice(tmp_path: Path) -> None:
    journal, store = tmp_path / "metrics.jsonl", tmp_path / "mlflow.db"
    first = MlflowTracker(None, "exp", journal_path=journal)
    run_id = start(first, params={"a": "1", "b": "2"})
    for step in range(5):
        first.log({"meta_loss": float(step)}, step)
    first.finish("killed")
    # What a killed process had written but not delivered, and steps behind its last checkpoint.
    with journal.open("a") as file:
        file.writelines(f'{{"step": {step}, "time_s": 1.0, "meta_loss": 0.5}}\n' for step in range(5, 9))

    second = MlflowTracker(None, "exp", journal_path=journal, first_step=7)
    assert start(second, params={"a": "1", "b": "20", "c": "3"}, resume_id=run_id) == run_id
    for step in range(7, 10):
        second.log({"meta_loss": float(step)}, step)
    second.finish("finished")
    # A third process repeats steps that the store has.
    third = MlflowTracker(None, "exp", journal_path=journal, first_step=8)
    start(third, params={"a": "1", "b": "20", "c": "3"}, resume_id=run_id)
    for step in range(8, 12):
        third.log({"meta_loss": float(step)}, step)
    third.finish("finished")

    assert points(store) == Counter({("meta_loss", step): 1 for step in range(12)})
    assert sorted(query(store, "select key, value from params")) == [("a", "1"), ("b", "2"), ("c", "3")]
    assert query(store, "select value from tags where key = 'changed.b'") == [("20",)]
    assert query(store, "select status from runs") == [("FINISHED",)]


def test_a_run_is_found_again_by_its_id_where_nothing_else_is_left_of_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    for name, first_step, steps in (("first", 0, (0, 1)), ("second", 0, (1, 2))):
        tracker = MlflowTracker(
            uri,
            "exp",
            journal_path=tmp_path / name / "metrics.jsonl",
            first_step=first_step,
            finish_timeout_s=40,
        )
        run_id = tracker.start(run_name="run", params={}, tags={}, resume_id=None, new_id="the-job")
        assert run_id == "the-job"
        for step in steps:
            tracker.log({"loss": step + (0.5 if name == "second" else 0.0)}, step)
        tracker.finish("finished")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("exp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    # The step that was done again is there once, as it was recorded first.
    assert {metric.step: metric.value for metric in history} == {0: 0.0, 1: 1.0, 2: 2.5}
    assert len(history) == 3


def test_an_evaluation_that_is_repeated_is_sent_again_only_where_it_differs(tmp_path: Path) -> None:
    journal, store = tmp_path / "metrics.jsonl", tmp_path / "mlflow.db"
    run_id = None
    for first_step, values in (
        (0, (0.5, math.inf)),
        (sys.maxsize, (0.5, math.inf)),
        (sys.maxsize, (0.6, 0.7)),
    ):
        tracker = MlflowTracker(None, "exp", journal_path=journal, first_step=first_step)
        run_id = start(tracker, resume_id=run_id)
        tracker.log({"pretrain/loss": 1.0}, -5)
        for step, value in enumerate(values):
            tracker.log({"evaluation/loss": value}, step)
        tracker.finish("finished")
    assert points(store) == Counter(
        {("evaluation/loss", 0): 2, ("evaluation/loss", 1): 2, ("pretrain/loss", -5): 1}
    )
    assert query(store, "select value from latest_metrics where key = 'evaluation/loss'") == [(0.7,)]


def test_a_request_whose_answer_was_lost_is_repeated_without_doubling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    real, num_lost = MlflowClient.log_batch, 0

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **rest: Any) -> None:
        nonlocal num_lost
        real(self, run_id, metrics=metrics, **rest)
        if metrics and num_lost < 2:
            num_lost += 1
            raise ConnectionError("https://me:hunter2@host: the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    warnings: list[str] = []
    tracker = MlflowTracker(None, "exp", journal_path=tmp_path / "metrics.jsonl", warn=warnings.append)
    start(tracker)
    for step in range(50):
        tracker.log({"meta_loss": float(step)}, step)
    tracker.finish("finished")
    assert num_lost == 2
    assert points(tmp_path / "mlflow.db") == Counter({("meta_loss", step): 1 for step in range(50)})
    assert len(warnings) == 2
    assert "hunter2" not in " ".join(warnings)


def test_a_refused_request_is_told_and_does_not_hold_up_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    real, refuse = MlflowClient.log_batch, True

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **rest: Any) -> None:
        nonlocal refuse
        if metrics and refuse:
            refuse = False
            raise MlflowException("a number it does not like", error_code=INVALID_PARAMETER_VALUE)
        real(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    warnings: list[str] = []
    tracker = MlflowTracker(None, "exp", journal_path=tmp_path / "metrics.jsonl", warn=warnings.append)
    start(tracker)
    tracker.log({"a": 1.0}, 0)
    assert tracker.flush(60)
    tracker.log({"a": 2.0}, 1)
    tracker.finish("finished")
    assert points(tmp_path / "mlflow.db") == Counter({("a", 1): 1})
    assert len(warnings) == 1
    assert "refused 1 metrics: a number it does not like. They are in" in warnings[0]


def test_a_file_that_is_gone_is_told_and_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = MlflowTracker(None, "exp", journal_path=tmp_path / "metrics.jsonl", warn=warnings.append)
    start(tracker)
    tracker.artifact(tmp_path / "gone.png")
    tracker.finish("finished")
    assert warnings == [f"{tmp_path / 'gone.png'} is no file any more and was not given to the MLflow store."]


def silent_listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    return listener


def test_a_named_server_that_is_down_is_an_error_at_the_start_without_its_password(tmp_path: Path) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    tracker = MlflowTracker(uri, "exp", journal_path=tmp_path / "metrics.jsonl")
    with pytest.raises(
        TrackingError, match=r"cannot be used: connection refused.*start the server"
    ) as caught:
        start(tracker)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in tracker.describe()


def test_a_named_server_that_does_not_answer_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with closing(silent_listener()) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TrackingError, match="cannot be used: timed out"):
            start(MlflowTracker(uri, "exp", journal_path=tmp_path / "metrics.jsonl"))


def test_a_continued_run_does_not_need_its_server_and_finish_says_what_is_left(tmp_path: Path) -> None:
    warnings: list[str] = []
    journal = tmp_path / "metrics.jsonl"
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = MlflowTracker(uri, "exp", journal_path=journal, warn=warnings.append, finish_timeout_s=1.5)
    assert start(tracker, resume_id="abc") == "abc"
    tracker.log({"a": 1.0, "b": 2.0}, 0)
    tracker.finish("finished")
    assert "2 metrics of run abc did not reach" in warnings[-1]
    assert f"All metrics are in {journal}; resuming the run delivers the rest." in warnings[-1]
    assert len(read_metrics(journal)) == 1


@pytest.mark.parametrize("uri", ["file:///somewhere/mlruns", "mlruns"])
def test_a_plain_folder_is_refused_as_a_store(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match=r"given up plain folders .*sqlite:////folder/mlflow\.db"):
        start(MlflowTracker(uri, "exp", journal_path=tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("make", [lambda key: key, lambda key: key + "!" * 300])
def test_names_are_made_to_fit_and_stay_apart(make: Callable[[str], str]) -> None:
    names = [make("adapt/lora.rate" + letter) for letter in "ab"]
    fitted = {fit_key(name) for name in names}
    assert len(fitted) == 2
    assert all(len(name) <= MAX_KEY_LENGTH for name in fitted)


def test_many_and_long_params_are_cut_to_mlflows_limits(tmp_path: Path) -> None:
    params = {f"p{index}": str(index) for index in range(230)} | {"long": "x" * 7000, "k" * 300: "v"}
    tracker = MlflowTracker(None, "exp", journal_path=tmp_path / "metrics.jsonl")
    start(tracker, params=params)
    tracker.finish("finished")
    rows = {
        str(key): str(value) for key, value in query(tmp_path / "mlflow.db", "select key, value from params")
    }
    assert len(rows) == 232
    assert len(rows["long"]) == 6000
    assert rows["long"].endswith("x…")
