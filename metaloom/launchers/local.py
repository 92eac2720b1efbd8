"""Processes on this machine, under torch elastic."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

AGENT_STOP_TIMEOUT_S = 40.0  # torch elastic gives workers 30 s to end


def agent_command(worker_args: Sequence[str], *, num_processes: int, log_dir: Path) -> list[str]:
    """The command that runs `num_processes` workers on this machine."""
    return [
        sys.executable,
        "-m",
        "metaloom.agent",
        "--num-processes",
        str(num_processes),
        "--log-dir",
        str(log_dir),
        *worker_args,
    ]


def launch(worker_args: Sequence[str], *, num_processes: int, threads_per_process: int, log_dir: Path) -> int:
    """Runs the workers to their end and returns the job's exit code.

    Ctrl-C, and a SIGTERM or SIGHUP to this process, stop the job: the workers have 30 seconds to end.

    Args:
        worker_args: arguments of `metaloom.worker`.
        num_processes: ranks.
        threads_per_process: threads of each rank's numerical kernels.
        log_dir: where the ranks' standard error goes.
    """
    command = agent_command(worker_args, num_processes=num_processes, log_dir=log_dir)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads_per_process)}
    # In a session of its own, so that Ctrl-C reaches it once: from here.
    with subprocess.Popen(command, env=environment, start_new_session=True) as agent:
        stopping = (signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, _raise_stopped) for number in stopping}
        try:
            return agent.wait()
        except (KeyboardInterrupt, _StoppedError) as stop:
            # SIGINT in both cases: torch elastic sends SIGTERM to ranks whose partner failed.
            agent.send_signal(signal.SIGINT)
            try:
                agent.wait(AGENT_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                agent.kill()
            return 128 + (stop.number if isinstance(stop, _StoppedError) else signal.SIGINT)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _StoppedError(Exception):
    """A signal that ends the job has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _StoppedError(number)
