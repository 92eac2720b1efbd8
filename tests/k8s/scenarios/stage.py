"""Where the scenarios of jobs on Kubernetes take place, and commands as a person gives them there."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from metaloom.cli import main
from tests.commands import RECIPES, command, environment, kill_tree
from tests.k8s.fake_api import FakeCluster
from tests.k8s.fake_jobs import Pods

# Tasks are computed: pods need no data.
RECIPE = RECIPES / "sinusoid-maml.yaml"
T = TypeVar("T")
U = TypeVar("U")


class Stage(Protocol):
    """A cluster, and means by which the events of a scenario come about there.

    Most come about by the job that is submitted, where pods are real: it needs more memory than it has, names
    an image that is not there, and so on. A fake cluster is told what happens, by `play`.
    """

    @property
    def options(self) -> tuple[str, ...]:
        """Of every `metaloom submit`: the image, and what the pods need there."""

    @property
    def where(self) -> tuple[str, ...]:
        """Options of every command: the cluster and the namespace."""

    @property
    def missing_image(self) -> str:
        """An image that no registry has."""

    @property
    def pause_s(self) -> float:
        """Between two looks at a job."""

    def checkpoints(self, name: str) -> str:
        """The URL of the checkpoints of a job, as its pods see it."""

    def play(self, act: Callable[[FakeCluster, Pods], object]) -> None:
        """What the pods of the newest job do now, where they are not real."""

    def submitted(self, name: str) -> None:
        """A job of that name was submitted, which is the newest from now on."""

    def evict(self, node: int) -> None:
        """A pod of the newest job is asked to leave its machine, as by a drain."""

    def nobody(self) -> contextlib.AbstractContextManager[None]:
        """Inside, commands are those of a user who may do nothing in the namespace."""


class Terminal:
    """Commands at a stage, and what they print.

    Args:
        limit_s: how long what a scenario waits for may take.
    """

    def __init__(self, stage: Stage, capsys: pytest.CaptureFixture[str], *, limit_s: float) -> None:
        self._stage = stage
        self._capsys = capsys
        self._limit_s = limit_s
        self._names: list[str] = []

    def new_name(self, about: str) -> str:
        """A name that no job has, of this and earlier runs of the tests."""
        return f"scenario-{about}-{secrets.token_hex(3)}"

    def ask(self, *words: str) -> tuple[int, str, str]:
        """The exit code of `metaloom ...`, and what it printed on standard output and on standard error."""
        self._capsys.readouterr()
        code = main([*words, *self._stage.where])
        told = self._capsys.readouterr()
        return code, told.out, told.err

    def submit(
        self,
        name: str,
        *options: str,
        recipe: Path = RECIPE,
        changes: Sequence[str] = (),
        code: int = 0,
    ) -> tuple[str, str]:
        """What `metaloom submit` of two pods of one rank each printed, where it ends with that code."""
        words = ["submit", str(recipe), "--name", name, "--nodes", "2", "--ranks-per-node", "1"]
        words += ["--backend", "job", *self._stage.options, *self._stage.where, *options]
        words += [f"checkpoint.url={self._stage.checkpoints(name)}", "tracking=none", *changes]
        self._capsys.readouterr()
        ended = main(words)
        told = self._capsys.readouterr()
        assert ended == code, told
        if code == 0:
            self._names.append(name)
            self._stage.submitted(name)
        return told.out, told.err

    def jobs(self, *words: str, code: int = 0) -> str:
        """What `metaloom jobs ...` printed on standard output, where it ends with that code."""
        ended, output, errors = self.ask("jobs", *words)
        assert ended == code, f"{output}\n{errors}"
        return output

    def status(self, name: str) -> dict[str, Any]:
        status = json.loads(self.jobs("status", name, "--json"))
        assert isinstance(status, dict)
        return status

    def until(self, name: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The first status of a job of which something holds."""
        return self._until(lambda: self.status(name), lambda status: status if holds(status) else None)

    def until_trained(self, name: str) -> int:
        """A step that a running job has told of."""
        told = self.until(name, lambda status: (status["progress"] or {}).get("step"))
        assert told["state"] == "running", told
        return int(told["progress"]["step"])

    def until_logged(self, name: str, pattern: str) -> re.Match[str]:
        """The first line in the logs of a job that a pattern matches from its beginning."""
        found = re.compile(pattern, re.MULTILINE)
        return self._until(lambda: self.jobs("logs", name), lambda lines: found.search(lines))

    def until_gone(self, name: str) -> None:
        """Waits until there is no job of that name."""
        gone = f"there is no job {name!r}"
        self._until(lambda: self.ask("jobs", "status", name), lambda told: gone in told[2] or None)

    @contextmanager
    def following(self, name: str) -> Iterator[Callable[[], tuple[int, str, str]]]:
        """`metaloom jobs logs NAME --follow` as a process; gives a function that waits for its end."""
        process = subprocess.Popen(
            command("jobs", "logs", name, "--follow", *self._stage.where),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def ended() -> tuple[int, str, str]:
            output, errors = process.communicate(timeout=self._limit_s)
            return process.returncode, output, errors

        with process:
            try:
                yield ended
            finally:
                if process.poll() is None:
                    kill_tree(process.pid)

    def clear(self) -> None:
        """Deletes all jobs that were submitted."""
        for name in dict.fromkeys(self._names):
            self.ask("jobs", "cancel", name, "--finished")
        for name in dict.fromkeys(self._names):
            self.until_gone(name)

    def _until(self, look: Callable[[], T], find: Callable[[T], U | None]) -> U:
        """What is found by looks at a job, which go on until something is."""
        deadline = time.monotonic() + self._limit_s
        while True:
            seen = look()
            found = find(seen)
            if found is not None:
                return found
            if time.monotonic() > deadline:
                pytest.fail(f"did not come true within {self._limit_s:g} s; the last that was seen:\n{seen}")
            time.sleep(self._stage.pause_s)
