"""Jobs of several hosts as tests use them: the same command on each, its output, and a hold on its steps."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import RECIPES, changed, command, environment, kill_tree, read_records

# Ranks wait before the tasks of a step that lies beyond the one in the file.
HELD = """
import os, time
if "RANK" in os.environ:
    from metaloom.datasets import EpisodeStream
    def wait_and_read(stream, read=EpisodeStream.__next__):
        step, episodes = read(stream)
        while step >= int(open(os.environ["HOLD"]).read()):
            open(f"{os.environ['HOLD']}-{os.environ['RANK']}", "w").write(str(step))
            time.sleep(0.02)
        return step, episodes
    EpisodeStream.__next__ = wait_and_read
"""


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Hold:
    """Lets a job do its outer steps up to one that the test names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.at(0)

    def at(self, step: int) -> None:
        """Ranks stop before the step after this one."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(str(step))
        partial.replace(self._path)

    def wait_for(self, rank: int, step: int, timeout_s: float = 120.0) -> None:
        """Returns once a rank stands before the step after this one."""
        deadline, standing = time.monotonic() + timeout_s, Path(f"{self._path}-{rank}")
        while not (standing.exists() and standing.read_text() == str(step)):
            assert time.monotonic() < deadline, f"rank {rank} did not come to the end of step {step}"
            time.sleep(0.02)


@contextmanager
def held(folder: Path, code: str = "") -> Iterator[Hold]:
    """Commands of a test wait where it wants them to; their processes run `code` too when they start."""
    hold = Hold(folder / "hold")
    with changed(folder, HELD + code, HOLD=str(folder / "hold")):
        yield hold


class Host:
    """One host's command; `within` names what it runs in, such as a network namespace."""

    def __init__(self, folder: Path, name: str, *words: str | Path, within: tuple[str, ...] = ()) -> None:
        self._output = (folder / f"{name}.out").open("w+")
        self._errors = (folder / f"{name}.err").open("w+")
        self.process = subprocess.Popen(
            [*within, *command("train", RECIPES / "smoke.yaml", *words)],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text()

    @property
    def errors(self) -> str:
        return Path(self._errors.name).read_text()

    def wait_for(self, text: str, timeout_s: float = 120.0, *, times: int = 1) -> None:
        """Returns once it has printed a text, so many times."""
        self._wait(lambda: (self.output + self.errors).count(text) >= times, f"{text!r}", timeout_s)

    def wait_for_store(self, run: Path) -> None:
        """Returns once it serves the store where the hosts of a run meet."""
        self._wait(lambda: any((run / "logs").glob("*")), "store", 120.0)

    def wait_for_step(self, metrics: Path, step: int, timeout_s: float = 120.0) -> None:
        """Returns once the job has logged an outer step as its last."""
        self._wait(lambda: metrics.exists() and _last_step(metrics) == step, f"step {step}", timeout_s)

    def end(self, timeout_s: float = 120.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within {timeout_s} s:\n{self.output}\n{self.errors}")

    def kill(self) -> None:
        """Kills all its processes at once."""
        if self.process.poll() is None:
            kill_tree(self.process.pid)
            self.process.wait()

    def close(self) -> None:
        self.kill()
        self._output.close()
        self._errors.close()

    def _wait(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, f"no {what}:\n{self.output}\n{self.errors}"
            assert self.process.poll() is None or is_so(), f"ended:\n{self.output}\n{self.errors}"
            time.sleep(0.02)


def _last_step(metrics: Path) -> float:
    return max((record["step"] for record in read_records(metrics)), default=0)
