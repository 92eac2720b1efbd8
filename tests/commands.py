"""The command line as tests use it: real processes, a time limit, everything that every rank printed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from metaloom.checkpoints.catalogue import Catalogue

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "recipes"
ADDED: dict[str, str] = {}  # what a test adds to the environment of its commands
TIMINGS = ("time_s", "tasks_per_s", "tokens_per_s", "data_wait_share", "peak_memory_mib", "checkpoint_wait_s")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str  # standard output
    errors: str  # standard error


def command(*words: str | Path) -> list[str]:
    """`metaloom ...` as this interpreter runs it."""
    return [sys.executable, "-m", "metaloom.cli", *map(str, words)]


def environment() -> dict[str, str]:
    """This process's environment without what would change a run from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | ADDED


def run(*words: str | Path, cwd: Path, timeout_s: float = 300.0) -> Finished:
    """Runs `metaloom ...` to its end, whatever that is; no process outlives it."""
    with begun(*words, cwd=cwd) as process:
        return end(process, timeout_s, folder=cwd)


def run_well(*words: str | Path, cwd: Path, timeout_s: float = 300.0) -> str:
    """What a command printed that must succeed."""
    finished = run(*words, cwd=cwd, timeout_s=timeout_s)
    assert finished.code == 0, f"{finished.output}\n{finished.errors}\n{logs(cwd)}"
    return finished.output


@contextmanager
def changed(folder: Path, code: str, **variables: str) -> Iterator[None]:
    """Commands of a test whose processes run `code` when they start, and find some variables."""
    place = folder / "changed"
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    before = dict(ADDED)
    ADDED.update({"PYTHONPATH": f"{place}:{environment()['PYTHONPATH']}", **variables})
    try:
        yield
    finally:
        ADDED.clear()
        ADDED.update(before)


@contextmanager
def begun(*words: str | Path, cwd: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`metaloom ...`, started; on leaving, it and all that it started are killed."""
    process = subprocess.Popen(
        command(*words),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()


def end(
    process: "subprocess.Popen[bytes]", timeout_s: float = 120.0, *, folder: Path | None = None
) -> Finished:
    """How a command ends that was begun; where it does not, what the ranks printed of the runs under a folder
    is shown."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        output, errors = process.communicate()
        said = f"{output.decode()}\n{errors.decode()}\n{'' if folder is None else logs(folder)}"
        pytest.fail(f"{process.args!r} did not end within {timeout_s} s:\n{said}")
    return Finished(process.returncode, output.decode(), errors.decode())


def logs(folder: Path) -> str:
    """Every rank's standard error of the runs under a folder."""
    files = sorted(folder.glob("**/logs/**/stderr.log"))
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that it started, the agent's own session included."""
    for child in descendants(pid):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def words_of(pid: int) -> bytes:
    """The command line of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_rank(pid: int, rank: int) -> bool:
    """Whether a process is a rank of a job."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"RANK={rank}".encode() in variables and b"metaloom.worker" in words


def rank_of(pid: int, rank: int) -> int:
    """The process of a rank of the command with a process id."""
    (found,) = [child for child in descendants(pid) if is_rank(child, rank)]
    return found


def wait_for_step(
    metrics: Path, step: int, process: "subprocess.Popen[bytes]", timeout_s: float = 180.0
) -> None:
    """Returns once a running job has logged an outer step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if metrics.exists() and any(record["step"] >= step for record in read_records(metrics)):
            return
        assert process.poll() is None, "the job ended before it was to be killed"
        time.sleep(0.005)
    pytest.fail(f"no step {step} in {metrics} within {timeout_s} s")


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Returns once something is so."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_records(metrics: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics file."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def curve(run_folder: Path) -> list[dict[str, float]]:
    """A run's metrics by step, but for what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in read_records(run_folder / "metrics.jsonl")
    ]


def digests(root: str | Path) -> dict[str, list[str]]:
    """Of every tensor of the last of the checkpoints at a place."""
    catalogue = Catalogue(root)
    manifest = catalogue.verify(catalogue.steps()[-1])
    return {name: [chunk.sha256 for chunk in tensor.chunks] for name, tensor in manifest.tensors.items()}


def run_silently(code: str) -> None:
    """Runs a program, with warnings as errors, that has to end well and say nothing."""
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
