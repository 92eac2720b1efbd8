"""Processes on this machine, and on others where the same command is started, under torch elastic."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, NoReturn

from metaloom.errors import LaunchError
from metaloom.launchers.base import (
    Launcher,
    Need,
    Submission,
    check_run,
    metaloom_command,
    refuse,
    run_path,
    shell_words,
    shown_variables,
    size_problems,
)
from metaloom.launchers.network import address_towards, interface_of, is_here, resolve

if TYPE_CHECKING:
    from metaloom.recipe import LocalLauncher

HOST_INDEX = "METALOOM_HOST_INDEX"

# Beside the time that the recipe gives ranks to stop: the agent grants 5 s more, then gives those that are
# left 30 s to end, and other hosts 10 s to hear of it.
AGENT_STOP_MARGIN_S = 50.0


@dataclasses.dataclass(frozen=True)
class Local(Launcher):
    """`metaloom train` on this machine, in the place of the command that submits it."""

    name: ClassVar[str] = "local"
    summary: ClassVar[str] = "this machine, while the command runs"
    unused: ClassVar[Mapping[str, str]] = {
        "nodes": "give the command on each host, with launcher.hosts; or use another launcher.",
        "cpus_per_node": "nothing is reserved here.",
        "memory_per_node": "nothing is reserved here.",
        "time_limit_s": "stop the command, by Ctrl-C or SIGTERM, and go on with --resume.",
        "queue": "nothing waits.",
    }

    @classmethod
    def needs(cls) -> list[Need]:
        return [
            Need(
                "the package torch",
                importlib.util.find_spec("torch") is not None,
                "install metaloom with its dependencies",
            )
        ]

    def plan(self, submission: Submission) -> str:
        """The command, but for the values of secrets."""
        refuse(self.unused_options(submission) + size_problems(submission))
        variables = shown_variables(submission.environment)
        words = [*(["env", *variables] if variables else []), "metaloom", *_train_words(submission)]
        return shell_words(words) + "\n"

    def submit(self, submission: Submission) -> NoReturn:
        """Becomes the command: signals, output and exit code are its own."""
        self.plan(submission)
        check_run(submission, run_path(submission))
        sys.stdout.flush()
        words = [*metaloom_command(), *_train_words(submission)]
        try:
            os.execve(words[0], words, os.environ | submission.environment)
        except OSError as error:
            raise LaunchError(f"{words[0]} cannot be started: {error.strerror or error}.") from error


def _train_words(submission: Submission) -> list[str]:
    """A run that has started is known by its folder; its recipe takes the same changes."""
    run = str(run_path(submission))
    overrides = [*submission.overrides, f"launcher.num_processes={submission.num_ranks}"]
    if submission.is_resumed:
        return ["train", submission.source, "--resume", run, *submission.train_options, *overrides]
    return ["train", submission.source, "--run", run, *overrides]


@dataclasses.dataclass(frozen=True)
class Standing:
    """How this machine stands among the hosts of a job.

    Attributes:
        address: of this machine, for the others.
        is_first: whether it is the one where they meet, and where the run's folder is written.
        endpoint: where they meet; None for a machine alone.
        index: its number among them, as a cluster counts them: ranks follow these.
    """

    address: str
    is_first: bool
    endpoint: str | None = None
    index: int = 0


ALONE = Standing("127.0.0.1", is_first=True)


def standing(launcher: LocalLauncher) -> Standing:
    """How this machine stands among the hosts of a job.

    Raises:
        LaunchError: the place where they meet is not known, or cannot be reached from here.
    """
    if launcher.hosts is None:
        return ALONE
    host = launcher.hosts.endpoint.rpartition(":")[0].strip("[]")
    endpoint = resolve(host, timeout_s=launcher.hosts.wait_s)
    index = _host_index()
    return Standing(
        address_towards(endpoint),
        # Names are found at addresses that hosts had before, for a while after they were replaced.
        is_first=is_here(endpoint) if index is None else index == 0,
        endpoint=launcher.hosts.endpoint,
        index=index or 0,
    )


def _host_index() -> int | None:
    """This machine's number among the hosts, where whoever has started it says so; 0 is the endpoint's."""
    index = os.environ.get(HOST_INDEX)
    if index is None:
        return None
    if not index.isdecimal():
        raise LaunchError(
            f"{HOST_INDEX}={index} in the environment is no number of a host: give 0, 1 ... or leave it out."
        )
    return int(index)


def agent_command(
    worker_args: Sequence[str], launcher: LocalLauncher, standing: Standing, *, log_dir: Path, digest: str
) -> list[str]:
    """The command that runs this machine's ranks of a job.

    Args:
        worker_args: arguments of `metaloom.worker`.
        log_dir: where the ranks' standard error goes.
        digest: of the recipe: agents of another one are refused.
    """
    hosts = launcher.hosts
    options = {
        "--num-processes": launcher.num_processes,
        "--max-restarts": launcher.max_restarts,
        "--log-dir": log_dir,
        "--digest": digest,
        "--address": standing.address,
        "--stop-within-s": launcher.stop_within_s,
    }
    if hosts is not None:
        min_hosts = hosts.num_hosts if hosts.min_hosts is None else hosts.min_hosts
        options |= {
            "--endpoint": hosts.endpoint,
            "--min-hosts": min_hosts,
            "--max-hosts": hosts.num_hosts,
            "--wait-s": hosts.wait_s,
            "--silence-s": hosts.silence_s,
            "--index": standing.index,
        }
    words = [f"{name}={value}" for name, value in options.items()]
    words += ["--may-serve"] if standing.is_first else []
    words += ["--own-folders"] if hosts is not None and hosts.own_folders else []
    words += ["--show-all-ranks"] if launcher.show_all_ranks else []
    return [sys.executable, "-m", "metaloom.agent", *words, *worker_args]


def agent_environment(launcher: LocalLauncher, standing: Standing) -> dict[str, str]:
    """This process's environment, with the ranks' threads and the network interface between them.

    Gloo looks for its interface by the machine's own name, which may be unknown or stand for the loopback.
    Torch warns on standard error when it cannot look up the name of a host that connects.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(launcher.threads_per_process)}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    interface = interface_of(standing.address)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    return environment


def launch(
    worker_args: Sequence[str],
    launcher: LocalLauncher,
    standing: Standing,
    *,
    log_dir: Path,
    digest: str,
    inherited: Sequence[int] = (),
) -> int:
    """Runs this machine's ranks of a job to its end and returns the job's exit code.

    Ctrl-C ends the job, on all hosts. A SIGTERM or SIGHUP to this process ends this machine's part of it.
    What was done is saved first; a second signal ends all at once. The arguments are as for `agent_command`.

    Args:
        inherited: open files that the agent shall have too: locks, which last as long as it does.
    """
    command = agent_command(worker_args, launcher, standing, log_dir=log_dir, digest=digest)
    environment = agent_environment(launcher, standing)
    # In a session of its own, so that Ctrl-C reaches it once: from here.
    with subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=inherited) as agent:
        stopping = (signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, _raise_stopped) for number in stopping}
        previous[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        try:
            return _wait(agent, None, timeout_s=None)
        except (KeyboardInterrupt, _StoppedError) as stop:
            first = _number(stop)
            try:
                return _wait(agent, first, timeout_s=launcher.stop_within_s + AGENT_STOP_MARGIN_S)
            except (KeyboardInterrupt, _StoppedError) as again:
                for each in (*stopping, signal.SIGINT):
                    signal.signal(each, signal.SIG_IGN)
                return _wait(agent, _number(again), timeout_s=AGENT_STOP_MARGIN_S)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _wait(agent: subprocess.Popen[bytes], number: int | None, *, timeout_s: float | None) -> int:
    """The agent's exit code; a signal is passed on to it first, and it is killed where it does not end."""
    if number is not None:
        agent.send_signal(number)
    try:
        code = agent.wait(timeout_s)
    except subprocess.TimeoutExpired:
        agent.kill()
        code = agent.wait()
    # A negative code is a signal's, which a shell shows so.
    return code if code >= 0 else 128 - code


def _number(stop: BaseException) -> int:
    return stop.number if isinstance(stop, _StoppedError) else signal.SIGINT


class _StoppedError(Exception):
    """A signal that ends the job has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _StoppedError(number)
