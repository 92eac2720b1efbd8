"""Hosts of a DeepSpeed hostfile, over ssh: one `metaloom train` on each, as the agents of its ranks want it.

DeepSpeed's own launcher starts a process for each rank, or one on each host by pdsh, MPI or Slurm, and ends
those that are left by a `pkill` of what their command line looks like. This one keeps a connection to each
host: the commands there end when it does, whatever ends it (`launchers/far_end.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, ClassVar

from metaloom.errors import LaunchError
from metaloom.launchers.base import (
    Launcher,
    Need,
    Submission,
    Submitted,
    check_run,
    host_overrides,
    host_problems,
    metaloom_command,
    recipe_text,
    refuse,
    run_path,
    secrets_in,
    shell_words,
    shown_variables,
    size_problems,
)
from metaloom.launchers.far_end import HERE, SIGNALS
from metaloom.launchers.hostfile import Slots, excluded, included, read_hostfile

if TYPE_CHECKING:
    import argparse

PORT = 29400
# No questions (a password, an unknown host's key) in the middle of many hosts' output; a host that is gone
# is noticed within a minute.
SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)
CUT_OFF = 255  # ssh's own exit code
POLL_S = 0.05
HINT_LINES = 3


@dataclasses.dataclass(frozen=True)
class DeepSpeed(Launcher):
    """`metaloom train` on each host of a hostfile, over ssh; runs the job to its end.

    Attributes:
        hostfile: lines `HOST slots=N`; slots are ranks.
        include: which hosts, and which of their slots: `HOST[:SLOT,SLOT ...][@HOST ...]`.
        exclude: in their place, those to leave out.
        port: of the first host, where the hosts meet.
    """

    name: ClassVar[str] = "deepspeed"
    summary: ClassVar[str] = "the hosts of a DeepSpeed hostfile, over ssh, while the command runs"
    unused: ClassVar[Mapping[str, str]] = {
        "ranks_per_node": "the slots of the hostfile say how many.",
        "cpus_per_node": "nothing is reserved on the hosts.",
        "memory_per_node": "nothing is reserved on the hosts.",
        "time_limit_s": "stop the command, by Ctrl-C or SIGTERM, and give it again with --resume.",
        "queue": "nothing waits.",
    }

    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    port: int = PORT

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> list[argparse.Action]:
        return [
            group.add_argument(
                "--hostfile", type=Path, metavar="FILE", help="hosts, lines of the form HOST slots=N"
            ),
            group.add_argument(
                "--include", metavar="HOSTS", help="these alone: HOST[:SLOT,SLOT ...][@HOST ...]"
            ),
            group.add_argument("--exclude", metavar="HOSTS", help="all but these, in the same form"),
            group.add_argument(
                "--port", type=int, metavar="N", help=f"of the first host, where all meet (default: {PORT})"
            ),
        ]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> DeepSpeed:
        port = PORT if arguments.port is None else arguments.port
        return cls(arguments.hostfile, arguments.include, arguments.exclude, port)

    @classmethod
    def needs(cls) -> list[Need]:
        return [
            Need(
                "the command ssh",
                shutil.which("ssh") is not None,
                "install OpenSSH's client; every host of the hostfile has to take a key without a password",
            )
        ]

    def plan(self, submission: Submission) -> str:
        """The command of ssh for each host, and what is run there, but for the values of secrets."""
        slots = self._slots(submission)
        words = self._words(submission, slots)
        lines = []
        for host in slots:
            shown = [submission.source if word is None else word for word in words]
            variables = shown_variables(self._environment(submission, slots, host))
            lines += [
                shell_words(_ssh(host, submission.folder)),
                f"    {shell_words([*(['env', *variables] if variables else []), *shown])}",
            ]
        return "\n".join(lines) + "\n"

    def submit(self, submission: Submission) -> Submitted:
        slots = self._slots(submission)
        run = run_path(submission)
        check_run(submission, run)
        (need,) = self.needs()
        if not need.is_there:
            raise LaunchError(f"ssh is not on the PATH here: {need.advice}.")
        words = self._words(submission, slots)
        requests = {
            host: {
                "words": words,
                "recipe": recipe_text(submission),
                "environment": self._environment(submission, slots, host),
            }
            for host in slots
        }
        hosts = submission.recipe.launcher.hosts
        least = len(slots) if hosts is None or hosts.min_hosts is None else hosts.min_hosts
        code = _run_on_all(requests, submission.folder, min_hosts=least)
        end = {0: "done", 75: "stopped and saved: give the command again with --resume to go on"}
        told = end.get(code, f"ended with code {code}, see above")
        return Submitted(submission.name, (f"{submission.name} {told}; the run's folder is {run}",), code)

    def _slots(self, submission: Submission) -> Slots:
        """The slots that the job takes.

        Raises:
            LaunchError: names all that is wrong with the options, then with the hosts.
        """
        problems = self.unused_options(submission) + size_problems(submission)
        counts = [submission.nodes, submission.gpus_per_node]
        if self.hostfile is None:
            problems.append("--hostfile is not given: it names the hosts, on lines of the form HOST slots=N.")
        if self.include is not None and self.exclude is not None:
            problems.append("--include and --exclude exclude each other: give one of them.")
        elif (self.include is not None or self.exclude is not None) and any(map(_is_given, counts)):
            problems.append("--nodes and --gpus-per-node have no effect beside --include or --exclude.")
        if submission.gpus_per_node == 0:
            problems.append("--gpus-per-node is 0; with a hostfile it is the slots to take of each host.")
        problems += [
            f"--env: {name} reads like a secret, and while this command runs, everyone on this machine can "
            f"read its words: set it in the environment here, and give --env {name} without the value."
            for name in secrets_in(submission.environment)
            if os.environ.get(name) != submission.environment[name]
        ]
        if not 1024 <= self.port < 65536:
            problems.append(f"--port is {self.port}; it must be from 1024 to 65535.")
        refuse(problems)
        assert self.hostfile is not None
        slots = read_hostfile(Path(submission.folder, self.hostfile))
        if self.include is not None:
            slots = included(slots, self.include)
        if self.exclude is not None:
            slots = excluded(slots, self.exclude)
        if submission.nodes is not None:
            if submission.nodes > len(slots):
                problems.append(f"--nodes is {submission.nodes}, but the hostfile has {len(slots)}.")
            slots = dict(list(slots.items())[: submission.nodes])
        asked = submission.gpus_per_node
        if asked is not None:
            short = [f"{host} {len(own)}" for host, own in slots.items() if len(own) < asked]
            if short:
                problems.append(f"--gpus-per-node is {asked}, but there are fewer slots: {', '.join(short)}.")
            slots = {host: own[:asked] for host, own in slots.items()}
        elif len({len(own) for own in slots.values()}) > 1:
            shown = ", ".join(f"{host} {len(own)}" for host, own in slots.items())
            problems.append(
                f"the hosts have different numbers of slots: {shown}. All hosts of a job run as many ranks: "
                "take as many of each with --gpus-per-node, or choose with --include or --exclude."
            )
        refuse(problems + host_problems(submission, len(slots)))
        return slots

    def _words(self, submission: Submission, slots: Slots) -> list[str | None]:
        """The command of every host; None stands for the recipe's file."""
        first = next(iter(slots))
        overrides = host_overrides(
            endpoint=f"{first}:{self.port}", num_hosts=len(slots), num_ranks=len(slots[first])
        )
        named = ["--run", str(run_path(submission)), *submission.train_options]
        return [*metaloom_command(), "train", None, *named, *overrides]

    def _environment(self, submission: Submission, slots: Slots, host: str) -> dict[str, str]:
        """The variables of a host; its ranks see the chosen slots alone where some were left out."""
        variables = dict(submission.environment)
        if self.include is not None or self.exclude is not None or submission.gpus_per_node is not None:
            variables.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, slots[host])))
        return variables


def _is_given(count: int | None) -> bool:
    return count is not None


def _ssh(host: str, folder: str) -> list[str]:
    far_end = shell_words([sys.executable, "-m", "metaloom.launchers.far_end"])
    return [*SSH, host, f"cd {shell_words([folder])} && exec {far_end}"]


class _Connection:
    """One host's ssh, what comes from there, and the way to tell it something."""

    def __init__(self, host: str, folder: str, printing: threading.Lock) -> None:
        self.host = host
        self.is_here = threading.Event()
        self.last: list[str] = []  # what ssh, or the host before its part began, has said
        self._printing = printing
        # In a session of its own: a Ctrl-C goes to the hosts, not to ssh, which would cut them off.
        self._process = subprocess.Popen(
            _ssh(host, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pumps = [
            threading.Thread(target=self._pump, args=(self._process.stdout, sys.stdout)),
            threading.Thread(target=self._pump, args=(self._process.stderr, sys.stderr)),
        ]
        for pump in self._pumps:
            pump.start()

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def tell(self, line: str) -> None:
        """Sends a line; one that has ended does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def close(self, *, kill: bool = False) -> None:
        """Ends its input, upon which the host's command saves and ends, and waits for the end."""
        assert self._process.stdin is not None
        if kill:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        for pump in self._pumps:
            pump.join()

    def _pump(self, source: IO[bytes], target: IO[str]) -> None:
        """Prints lines with the host's name before them."""
        with source:
            for line in source:
                text = line.decode(errors="replace").rstrip("\r\n")
                if line == HERE:
                    self.is_here.set()
                elif self.is_here.is_set():
                    # Where nobody reads any more, the job goes on, and its output is let go.
                    with self._printing, contextlib.suppress(BrokenPipeError):
                        print(f"[{self.host}] {text}", file=target, flush=True)
                elif text.strip():
                    self.last = [*self.last, text.strip()][-HINT_LINES:]


def _run_on_all(requests: Mapping[str, object], folder: str, *, min_hosts: int) -> int:
    """Runs each host's part of a job to its end; returns the job's exit code, which is the first host's.

    Nothing begins before all hosts are there. Ctrl-C, SIGTERM and SIGHUP are passed on to the commands of all
    hosts, a second one too; a third leaves them alone with the end of their connection.

    Raises:
        LaunchError: hosts cannot be reached, or the first one was cut off.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_signals())
        printing = threading.Lock()
        connections: list[_Connection] = []
        has_begun = False
        try:
            connections = [_Connection(host, folder, printing) for host in requests]
            if not _all_here(connections, signals):
                return 128 + SIGNALS[signals[0]]
            has_begun = True
            for connection in connections:
                connection.tell(json.dumps(requests[connection.host]))
            _watch(connections, signals, min_hosts=min_hosts)
        finally:
            for connection in connections:
                connection.close(kill=not has_begun or len(signals) > 2)
    code = connections[0].code()
    assert code is not None
    if code == CUT_OFF:
        raise LaunchError(
            f"{connections[0].host}: the connection to it broke off, and the job cannot go on without the "
            "first host. What runs on the hosts saves and ends; give the command again with --resume."
        )
    return code if code >= 0 else 128 - code


def _all_here(connections: Sequence[_Connection], signals: Sequence[str]) -> bool:
    """Waits until the far ends on all hosts are there; False where a signal came first.

    Raises:
        LaunchError: names all hosts where none will be.
    """
    while any(connection.code() is None and not connection.is_here.is_set() for connection in connections):
        if signals:
            return False
        time.sleep(POLL_S)
    absent = [connection for connection in connections if connection.code() is not None]
    for connection in absent:
        connection.close()
    refuse([_why_absent(connection) for connection in absent])
    return not signals


def _why_absent(connection: _Connection) -> str:
    said = "; ".join(connection.last) or f"exit code {connection.code()}"
    if connection.code() == CUT_OFF:
        return (
            f"{connection.host}: cannot be reached by ssh: {said}. `ssh {connection.host} true` has to work "
            "here without a question: set up a key, and accept the host's key once."
        )
    return (
        f"{connection.host}: metaloom does not start there: {said}. The hosts need {sys.executable} with the "
        "same metaloom, and this folder, at the same paths."
    )


def _watch(connections: Sequence[_Connection], signals: Sequence[str], *, min_hosts: int) -> None:
    """Returns when the commands of all hosts have ended; passes on signals, ends a job that cannot go on."""
    num_passed_on = 0
    is_stopping = False
    lost: set[str] = set()
    while any(connection.code() is None for connection in connections):
        for name in signals[num_passed_on:]:
            num_passed_on += 1
            is_stopping = True
            if num_passed_on > 2:
                return
            for connection in connections:
                connection.tell(name)
        for connection in connections:
            if connection.code() == CUT_OFF and connection.host not in lost:
                lost.add(connection.host)
                is_over = connection is connections[0] or len(connections) - len(lost) < min_hosts
                rest = "the others save and end" if is_over else "the others go on without it"
                print(
                    f"{connection.host}: the connection to it broke off; {rest}", file=sys.stderr, flush=True
                )
                if is_over and not is_stopping:
                    is_stopping = True
                    for other in connections:
                        other.tell("TERM")
        time.sleep(POLL_S)


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of signals that come meanwhile, in their order, in place of what they do otherwise."""
    came: list[str] = []
    names = {int(number): name for name, number in SIGNALS.items()}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(names[number])

    previous = {number: signal.signal(number, note) for number in SIGNALS.values()}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
