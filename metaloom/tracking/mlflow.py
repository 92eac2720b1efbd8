"""MLflow behind a journal: training writes JSON lines, one background thread delivers them.

The journal (metrics.jsonl of the run folder) is the queue. `log` appends a line and returns;
the thread reads on from where it got to and sends up to 1000 metrics per request, since single
requests are a hundred times slower. So a server that is slow or down costs no memory and no
training time, and what a killed process had not delivered is delivered when the run continues.

Nothing is doubled: a repeated request carries the timestamps of the first one, and MLflow keeps one
metric per (name, step, timestamp, value); a continued run first asks what is there, and does not send
again a (name, step) of an earlier process, nor one that it repeats since its last checkpoint.
Run ids are made here and kept as the tag `metaloom.run_id`, so that a run has its id before its
store answers, and a run whose creation was answered too late is found again instead of made twice.

MLflow itself is imported by the thread: it takes seconds, and the first use of an sqlite store
about ten more.
"""

import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.disk import Disk
from metaloom.errors import TrackingError
from metaloom.tracking.base import FinishStatus, MetricRecord, RunTracker
from metaloom.tracking.jsonl import JsonlTracker, decode_line
from metaloom.tracking.redaction import mask_secrets, strip_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUN_ID_TAG = "metaloom.run_id"
DATABASE = "mlflow.db"  # the store in a run folder

# Limits of MLflow's stores.
MAX_KEY_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_METRICS_PER_REQUEST = 1000
MAX_PARAMS_PER_REQUEST = 100

DELIVERY_INTERVAL_S = 2.0
DELIVERY_COUNT = 500
URGENT_INTERVAL_S = 0.05
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
FINISH_BACKOFF_S = 1.0

# MLflow takes its HTTP limits from the environment only, and its defaults (120 s, 7 retries with
# backoff) hold a request for many minutes: no start could report an unreachable server, and no finish
# could be bounded. Retrying is done here. The others keep MLflow from printing and from calling home.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

_FORBIDDEN_IN_KEY = re.compile(r"[^\w\-. :/]")

# Words of network errors, which come at the end of long chains of quoted exceptions.
_KNOWN_CAUSES = re.compile(
    "Connection refused|Connection reset|Remote end closed connection|Name or service not known"
    "|Temporary failure in name resolution|timed out|No route to host|Network is unreachable"
    "|certificate verify failed"
)

# Error codes of requests that will never succeed, however often they are repeated.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"})


def fit_key(key: str) -> str:
    """A name that MLflow accepts: its letters only, at most 250 of them, still unique."""
    fitted = _FORBIDDEN_IN_KEY.sub("_", key)
    if len(fitted) > MAX_KEY_LENGTH:
        fitted = f"{fitted[: MAX_KEY_LENGTH - 9]}-{sha256(key.encode()).hexdigest()[:8]}"
    return fitted


def fit_value(value: str, limit: int) -> str:
    """The value, its end replaced by an ellipsis where it is longer than `limit` characters."""
    return value if len(value) <= limit else value[: limit - 1] + "…"


def is_database(uri: str) -> bool:
    """True for the URI of a database that this process opens itself, without a server between."""
    return uri.split(":", 1)[0].split("+", 1)[0] in ("sqlite", "postgresql", "mysql", "mssql")


def is_folder(uri: str) -> bool:
    """True for a URI that names a plain folder, by a path or by file:."""
    return uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks"))


@dataclass
class _Delivery:
    """What both threads know of each other; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    artifacts: deque[tuple[Path, str]] = field(default_factory=deque)
    num_written: int = 0  # metrics handed over
    num_read: int = 0  # metrics of those that were delivered, refused or known to the store
    is_connected: bool = False
    error: str | None = None  # of the last attempt, without credentials
    is_urgent: bool = False  # flush or finish waits: no dawdling
    status: FinishStatus | None = None
    is_closed: bool = False  # the status has reached the store
    stop: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_connected and self.num_read >= self.num_written and not self.artifacts


class MlflowTracker(RunTracker):
    """One MLflow run, fed from the journal by a background thread.

    Args:
        uri: an MLflow tracking URI: http(s)://, sqlite:///, postgresql:// ...; None for an sqlite
            store in the journal's folder, whose creation is not waited for.
        experiment: its name; made when it is missing.
        journal_path: the JSONL file; it is written too, see `JsonlTracker`.
        first_step: see `JsonlTracker`.
        disk: see `JsonlTracker`.
        warn: shows a warning to people, from any thread.
        start_timeout_s: how long `start` waits for a server that the user named. A database that
            the user named gets eight times that, since its tables may have to be made first.
        finish_timeout_s: how long `finish` goes on delivering.

    A continued run (`resume_id`) does not wait and never raises for a server that is down: it was
    usable once, and whoever restarts a stopped run is often no person who could help.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        *,
        journal_path: Path,
        first_step: int = 0,
        disk: Disk | None = None,
        warn: Callable[[str], None] | None = None,
        start_timeout_s: float = 15.0,
        finish_timeout_s: float = 20.0,
    ) -> None:
        self._folder = journal_path.parent.absolute()
        self._is_named = uri is not None
        self._uri = uri if uri is not None else f"sqlite:///{self._folder / DATABASE}"
        self._experiment = experiment
        self._journal_path = journal_path
        self._first_step = first_step
        self._journal = JsonlTracker(journal_path, first_step=first_step, disk=disk)
        self._warn = warn or logging.getLogger("metaloom.tracking").warning
        self._start_timeout_s = start_timeout_s * (8 if is_database(self._uri) else 1)
        self._finish_timeout_s = finish_timeout_s
        self._run_id = ""
        self._num_logged = 0  # metrics, those of earlier processes included
        self._state = _Delivery()
        self._thread: threading.Thread | None = None
        self._set_variables: list[str] = []

    def start(
        self,
        *,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        resume_id: str | None,
        new_id: str | None = None,
    ) -> str:
        if is_folder(self._uri):
            raise TrackingError(
                f"tracking uri {strip_credentials(self._uri)!r}: MLflow has given up plain folders as "
                "stores. Name a server (http://host:5000) or a database (sqlite:////folder/mlflow.db), "
                "or leave it out for an sqlite store in the run folder."
            )
        self._run_id = self._journal.start(
            run_name=run_name, params=params, tags=tags, resume_id=resume_id or new_id or uuid.uuid4().hex
        )
        # Lines of earlier processes count as handed over: the store may lack some of them.
        offset_of_new = self._journal_path.stat().st_size
        self._num_logged = sum(len(r.metrics) for r, _ in _records(self._journal_path, 0, offset_of_new))
        self._count()
        self._set_environment()
        sender = _Sender(
            uri=self._uri,
            experiment=self._experiment,
            artifact_root=self._artifact_root(),
            own_database=None if self._is_named else self._folder / DATABASE,
            run_id=self._run_id,
            run_name=run_name,
            params=_fit_params(mask_secrets(params)),
            tags=_fit_tags(mask_secrets(tags)),
            is_continued=resume_id is not None,
            journal_path=self._journal_path,
            own_offset=offset_of_new,
            first_step=self._first_step,
            warn=self._warn,
            state=self._state,
        )
        self._thread = threading.Thread(target=sender.run, name="metaloom-mlflow", daemon=True)
        self._thread.start()
        if self._is_named and resume_id is None:
            self._require_connection()
        return self._run_id

    def _require_connection(self) -> None:
        state = self._state
        with state.changed:
            state.changed.wait_for(
                lambda: state.is_connected or state.error is not None, self._start_timeout_s
            )
            if state.is_connected:
                return
            reason = state.error or f"no answer within {self._start_timeout_s:g} s"
        self._close(timeout_s=0.5)
        raise TrackingError(
            f"tracking uri {strip_credentials(self._uri)}: the MLflow store cannot be used: {reason}. "
            "It has to answer when a run starts; start the server, correct the uri, or leave the uri out "
            "for an sqlite store in the run folder."
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._num_logged += len(metrics)
        try:
            self._journal.log(metrics, step)
        finally:
            self._count()
        state = self._state
        with state.changed:
            if state.num_written - state.num_read >= DELIVERY_COUNT:
                state.changed.notify_all()

    def artifact(self, path: Path, folder: str = "") -> None:
        with self._state.changed:
            self._state.artifacts.append((path.absolute(), folder))
            self._state.changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        state = self._state
        with state.changed:
            target = state.num_written
            is_whole = self._num_logged == target  # what the journal lacks does not come by waiting

            def is_delivered() -> bool:
                return state.is_connected and state.num_read >= target and not state.artifacts

            state.is_urgent = True
            state.changed.notify_all()
            state.changed.wait_for(lambda: is_delivered() or state.error is not None, timeout_s)
            state.is_urgent = state.status is not None
            return is_whole and is_delivered()

    def finish(self, status: FinishStatus) -> None:
        if self._thread is None:
            return
        self._count()  # what the journal lacks at its end does not come: its disk tells of it
        state = self._state
        with state.changed:
            state.status, state.is_urgent = status, True
            state.changed.notify_all()
            state.changed.wait_for(lambda: state.is_closed, self._finish_timeout_s)
            num_left, num_files = state.num_written - state.num_read, len(state.artifacts)
            is_closed, reason = state.is_closed, state.error
        self._close(timeout_s=1.0)
        if not is_closed:
            files = f" and {num_files} files" if num_files else ""
            self._warn(
                f"{num_left} metrics{files} of run {self._run_id} did not reach {self.describe()} within "
                f"{self._finish_timeout_s:g} s ({reason or 'the store is slow'}). All metrics are in "
                f"{self._journal_path}; resuming the run delivers the rest."
            )

    def _count(self) -> None:
        """Hands over what is in the journal, which may lack lines while its disk is full."""
        with self._state.changed:
            self._state.num_written = self._num_logged - self._journal.num_waiting

    def _close(self, timeout_s: float) -> None:
        with self._state.changed:
            self._state.stop = True
            self._state.changed.notify_all()
        if self._thread is not None:
            # A thread inside a request ends with it, at the latest after the HTTP timeout.
            self._thread.join(timeout_s)
            self._thread = None
        self._journal.finish("finished")
        for name in self._set_variables:
            os.environ.pop(name, None)
        self._set_variables.clear()

    def describe(self) -> str:
        run = self._run_id or "not started"
        return f"{strip_credentials(self._uri)} (experiment {self._experiment}, run {run})"

    def _artifact_root(self) -> str | None:
        """Where a new experiment keeps its files; None where a server decides.

        MLflow's own choice for a database is ./mlruns of the working directory.
        """
        if not is_database(self._uri):
            return None
        database = self._uri.removeprefix("sqlite:///").split("?")[0]
        is_file = self._uri.startswith("sqlite:///") and database not in ("", ":memory:")
        folder = Path(database).absolute().parent if is_file else self._folder
        return (folder / "mlflow").as_uri()

    def _set_environment(self) -> None:
        for name, value in _ENVIRONMENT.items():
            if name not in os.environ:
                os.environ[name] = value
                self._set_variables.append(name)


def _fit_params(params: Mapping[str, str]) -> dict[str, str]:
    return {fit_key(key): fit_value(value, MAX_PARAM_LENGTH) for key, value in params.items()}


def _fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {fit_key(key): fit_value(value, MAX_TAG_LENGTH) for key, value in tags.items()}


def _records(path: Path, start: int, end: int | None = None) -> Iterator[tuple[MetricRecord, int]]:
    """The complete records of the journal from byte `start` on (to `end`), each with the offset behind it."""
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            offset += len(line)
            if not line.endswith(b"\n") or (end is not None and offset > end):
                return
            yield decode_line(line), offset


@dataclass
class _Sender:
    """The background thread: connects, delivers, waits, and tries again after errors."""

    uri: str
    experiment: str
    artifact_root: str | None
    own_database: Path | None  # the store in the run folder; None for one that was named
    run_id: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    is_continued: bool
    journal_path: Path
    own_offset: int  # lines of the journal from here on are of this process
    first_step: int
    warn: Callable[[str], None]
    state: _Delivery

    client: "MlflowClient | None" = None
    mlflow_run_id: str = ""
    offset: int = 0  # of the journal: everything before it is delivered
    known: dict[str, dict[int, float]] = field(default_factory=dict)  # per metric, what the store had
    num_failures: int = 0

    def run(self) -> None:
        state = self.state
        while not state.stop:
            try:
                if not state.is_connected:
                    self._connect()
                    with state.changed:
                        state.is_connected = True
                        state.changed.notify_all()
                while self._send_metrics() and not state.stop:
                    pass
                self._send_artifacts()
                self._close_run()
            except Exception as error:
                # Whatever MLflow, its database driver or its HTTP client throws, training goes on.
                self._note_failure(error)
            else:
                self._note_success()
            if state.is_closed:
                return
            self._wait()

    def _wait(self) -> None:
        state = self.state
        with state.changed:
            if self.num_failures:
                # Calm enough for a server that is starting up; shorter while somebody waits for the end.
                backoff_s = min(FIRST_BACKOFF_S * 2 ** (self.num_failures - 1), MAX_BACKOFF_S)
                deadline = time.monotonic() + backoff_s
                while not state.stop and (left_s := deadline - time.monotonic()) > 0:
                    if state.is_urgent:
                        left_s = min(left_s, FINISH_BACKOFF_S)
                        deadline = min(deadline, time.monotonic() + left_s)
                    state.changed.wait(left_s)
                return
            if state.is_urgent:
                state.changed.wait(URGENT_INTERVAL_S)
                return
            state.changed.wait_for(
                lambda: (
                    state.stop
                    or state.is_urgent
                    or bool(state.artifacts)
                    or state.num_written - state.num_read >= DELIVERY_COUNT
                ),
                DELIVERY_INTERVAL_S,
            )

    def _note_failure(self, error: Exception) -> None:
        reason = _describe_error(error)
        self.num_failures += 1
        with self.state.changed:
            self.state.error = reason
            self.state.changed.notify_all()
        if self.num_failures == 1 and (self.state.is_connected or self.is_continued or self.artifact_root):
            self.warn(
                f"MLflow store {strip_credentials(self.uri)} does not take records: {reason}. Training "
                f"goes on; they wait in {self.journal_path} and are delivered when the store is back."
            )

    def _note_success(self) -> None:
        if self.num_failures:
            self.warn(
                f"MLflow store {strip_credentials(self.uri)} is back; the waiting records are delivered."
            )
        self.num_failures = 0
        with self.state.changed:
            self.state.error = None
            self.state.changed.notify_all()

    def _connect(self) -> None:
        """Finds or makes the experiment and the run; puts in the params that are not there yet."""
        if self.own_database is not None and not self.own_database.exists():
            _make_database(self.own_database)
        client = _make_client(self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = client.create_experiment(self.experiment, artifact_location=self.artifact_root)
        found = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{self.run_id}'", max_results=1)
        run: Run
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {RUN_ID_TAG: self.run_id, **self.tags}
            run = client.create_run(experiment_id, run_name=self.run_name, tags=tags)
        self._log_params(client, run)
        if found:
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                self.known[name] = {metric.step: metric.value for metric in history}
        self.client, self.mlflow_run_id = client, run.info.run_id

    def _log_params(self, client: "MlflowClient", run: "Run") -> None:
        from mlflow.entities import Param, RunTag

        logged = run.data.params
        new = [Param(key, value) for key, value in self.params.items() if key not in logged]
        # MLflow never lets a param change; what a continued run changed is told by a tag.
        tags = [
            RunTag(fit_key(f"changed.{key}"), fit_value(value, MAX_TAG_LENGTH))
            for key, value in self.params.items()
            if key in logged and logged[key] != value
        ]
        tags += [RunTag(key, value) for key, value in self.tags.items() if run.data.tags.get(key) != value]
        for start in range(0, len(new), MAX_PARAMS_PER_REQUEST):
            client.log_batch(run.info.run_id, params=new[start : start + MAX_PARAMS_PER_REQUEST])
        for start in range(0, len(tags), MAX_PARAMS_PER_REQUEST):
            client.log_batch(run.info.run_id, tags=tags[start : start + MAX_PARAMS_PER_REQUEST])

    def _send_metrics(self) -> bool:
        """Delivers the next request's worth of the journal; True if there may be more."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        num_read, offset = 0, self.offset
        for record, behind in _records(self.journal_path, self.offset):
            if batch and len(batch) + len(record.metrics) > MAX_METRICS_PER_REQUEST:
                break
            for name, value in record.metrics.items():
                key = fit_key(name)
                if not self._is_known(key, value, record.step, is_own=offset >= self.own_offset):
                    batch.append(Metric(key, value, round(record.time_s * 1000), record.step))
            num_read, offset = num_read + len(record.metrics), behind
        if offset == self.offset:
            return False
        for start in range(0, len(batch), MAX_METRICS_PER_REQUEST):
            self._send(batch[start : start + MAX_METRICS_PER_REQUEST])
        self.offset = offset
        with self.state.changed:
            self.state.num_read += num_read
            self.state.changed.notify_all()
        return True

    def _is_known(self, key: str, value: float, step: int, *, is_own: bool) -> bool:
        """True for a metric that the store had when this process started.

        Steps since the last checkpoint are computed again, on another world size with other
        rounding: the first record stands. An evaluation that is repeated is a new fact: it comes
        with steps before `first_step`, and is sent unless it is the same.
        """
        steps = self.known.get(key, {})
        if step not in steps:
            return False
        return not is_own or step >= self.first_step or _as_stored(value) == _as_stored(steps[step])

    def _send(self, batch: "list[Metric]") -> None:
        from mlflow.exceptions import MlflowException

        assert self.client is not None
        try:
            self.client.log_batch(self.mlflow_run_id, metrics=batch)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            # Repeating it would hold up everything behind it.
            self.warn(
                f"MLflow store {strip_credentials(self.uri)} refused {len(batch)} metrics: "
                f"{_describe_error(error)}. They are in {self.journal_path} only."
            )

    def _send_artifacts(self) -> None:
        assert self.client is not None
        state = self.state
        while state.artifacts and not state.stop:
            path, folder = state.artifacts[0]
            if path.is_file():
                self.client.log_artifact(self.mlflow_run_id, str(path), folder or None)
            else:
                self.warn(f"{path} is no file any more and was not given to the MLflow store.")
            with state.changed:
                state.artifacts.popleft()
                state.changed.notify_all()

    def _close_run(self) -> None:
        state = self.state
        if state.status is None or not state.is_done:
            return
        assert self.client is not None
        self.client.set_terminated(self.mlflow_run_id, state.status.upper())
        with state.changed:
            state.is_closed = True
            state.changed.notify_all()


def _as_stored(value: float) -> float | None:
    """The value as MLflow's stores keep it: infinities as the largest number, NaN (here None) apart."""
    return None if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def _make_client(uri: str) -> "MlflowClient":
    """A client of the store, with MLflow's own chatter turned down to errors."""
    from mlflow import MlflowClient

    _quieten()
    return MlflowClient(tracking_uri=uri)


def _make_database(path: Path) -> None:
    """Makes an sqlite store that is whole as soon as it is there.

    MLflow takes seconds for the tables of a new store, and cannot go on with those that a process which
    was killed meanwhile has left.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    _quieten()
    artifact_root = (path.parent / "mlflow").as_uri()
    store = SqlAlchemyStore(f"sqlite:///{partial}", artifact_root)  # type: ignore[no-untyped-call]
    store.engine.dispose()
    partial.replace(path)


def _quieten() -> None:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _describe_error(error: Exception) -> str:
    """One line for people, without credentials."""
    text = strip_credentials(str(error))
    causes = _KNOWN_CAUSES.findall(text)
    if causes:
        return str(causes[-1]).lower()
    text = (text.strip() or type(error).__name__).splitlines()[0]
    return fit_value(text, 300)
