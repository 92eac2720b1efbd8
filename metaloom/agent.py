"""Starts the worker processes of one host under torch elastic: `python -m metaloom.agent ...`.

torchrun exits with 1 whatever its workers say, and prints their tracebacks. This agent passes the
code of the worker that failed first on, prints that worker's one message, and keeps every rank's
standard error (and the standard output of all but rank 0) in files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# How a rank ends whose partner in a collective died: an effect, never the cause.
LOST_PARTNER_EXIT_CODE = 90
PARENT_CHECK_S = 0.5


def main() -> int:
    """Runs the workers to their end; returns the exit code of the job."""
    parser = argparse.ArgumentParser(prog="python -m metaloom.agent")
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("worker_args", nargs=argparse.REMAINDER, help="arguments of metaloom.worker")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)  # torch elastic tells at length what `_report` tells in a line
    num_processes: int = arguments.num_processes
    quiet_ranks = dict.fromkeys(range(1, num_processes), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(arguments.log_dir), redirects={0: Std.ERR} | quiet_ranks),
    )
    threading.Thread(target=_stop_without_parent, args=(os.getppid(),), daemon=True).start()
    command = ["-m", "metaloom.worker", *arguments.worker_args]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _report(error.failures, arguments.log_dir)
    except SignalException as stopped:
        print(f"stopped by {stopped.sigval.name}", file=sys.stderr)
        return 128 + int(stopped.sigval)
    return 0


def _stop_without_parent(parent: int) -> None:
    """Ends the job when the command that started it is gone, killed for instance: no one watches any more."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os.kill(os.getpid(), signal.SIGINT)


def _report(failures: dict[int, ProcessFailure], log_dir: Path) -> int:
    """Prints why the job failed, once, and returns the exit code that says so."""
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    details = _details(failure)
    if details is None:
        cause = failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"error: rank {rank} died ({cause}); its output is under {log_dir}", file=sys.stderr)
        return 1
    print(f"error: {details['text']}", file=sys.stderr)
    if details["expected"]:
        return failure.exitcode
    print(f"This is a defect or a fault of rank {rank}; the traceback is under {log_dir}", file=sys.stderr)
    return 1


def _order(failure: ProcessFailure) -> tuple[int, int]:
    """Causes before effects: messages, then crashes, then ranks that lost a partner; each by time."""
    if _details(failure) is not None and failure.exitcode != LOST_PARTNER_EXIT_CODE:
        return 0, failure.timestamp
    return (2 if failure.exitcode == LOST_PARTNER_EXIT_CODE else 1), failure.timestamp


def _details(failure: ProcessFailure) -> dict[str, Any] | None:
    """What the worker itself said of its failure (`metaloom.worker` writes it)."""
    try:
        said = json.loads(Path(failure.error_file).read_text(encoding="utf-8"))
        details: dict[str, Any] = json.loads(said["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        # It was killed, or torch elastic wrote the file for it.
        return None
    return details


if __name__ == "__main__":
    sys.exit(main())
