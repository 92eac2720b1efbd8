"""One rank of a job: `python -m metaloom.worker train|evaluate|check RUN ...`, started by the agent.

Reads its place from the variables that torch elastic sets, does the job, and ends with an exit
code that says why: 0, the code of a `MetaloomError`, or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from metaloom.check import check
from metaloom.errors import MetaloomError
from metaloom.evaluate import evaluate
from metaloom.faults import NOT_SAVED, START_AGAIN
from metaloom.job import Place, Shutdown
from metaloom.notices import Source, watching
from metaloom.processes import END_NOW, watch_parent
from metaloom.recipe import Recipe, ShardedSharding, load_recipe
from metaloom.run_folder import RunFolder
from metaloom.stopping import Stopped, StopWatch
from metaloom.train import train
from metaloom.whereabouts import END, Failure, FailureKind, Whereabouts

LOST_PARTNER_EXIT_CODE = 90
WAKE = signal.SIGUSR1  # wakes a rank that waits for data when all have agreed to stop
BLOCKED_S = 5.0  # how long a rank may take to notice that it is to end

JOBS: dict[str, Callable[[Recipe, Place], None]] = {"train": train, "evaluate": evaluate, "check": check}


def main() -> int:
    """Runs one rank of the job named on the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m metaloom.worker")
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--whereabouts", type=Path, help="where the rank says where it is, and why it failed")
    arguments = parser.parse_args()
    watch_parent(signal.SIGKILL)
    whereabouts = Whereabouts(arguments.whereabouts)
    signals = Signals()
    try:
        recipe = load_recipe(arguments.recipe)
        device = _join(recipe)
        points = _stop_watch(recipe, whereabouts)
        signals.stop_by(points)
        place = Place(
            RunFolder(arguments.run),
            device,
            os.environ.get("MLFLOW_TRACKING_URI") or None,
            signals.shutdown,
            whereabouts,
            points,
            job_id=os.environ["METALOOM_JOB"],
            round_number=int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        )
        with _notices(recipe, points):
            JOBS[arguments.job](recipe, place)
        whereabouts.enter(END)
    except Stopped:
        return _stopped(whereabouts, points.reason)
    except MetaloomError as error:
        _record(whereabouts, "mistake", str(error))
        return error.exit_code
    except dist.DistError as error:
        return _lost_partner(whereabouts, error)
    except RuntimeError as error:
        if _is_broken_collective(error):
            return _lost_partner(whereabouts, error)
        return _unexpected(whereabouts, error)
    except KeyboardInterrupt:
        if signals.asked_by is not None:
            _record(whereabouts, "stopped", f"stopped by {signals.asked_by.name}, at once")
        return 128 + (signals.asked_by or signal.SIGINT)
    except Exception as error:
        return _unexpected(whereabouts, error)
    points.close()
    dist.destroy_process_group()
    return 0


class Signals:
    """What signals do to this rank.

    SIGINT and SIGTERM ask the job to stop, on all ranks, with what it did saved; the second one ends this
    rank at once, and so does `END_NOW`, by which the agent ends ranks that have lost a partner: by
    KeyboardInterrupt. A rank that waits in a collective for one that is gone would not see that before the
    collective's timeout: it ends `BLOCKED_S` later, unless it is delivering its last records.

    Attributes:
        shutdown: what the job knows of it.
        asked_by: the last signal that asked; None before the first.
    """

    def __init__(self) -> None:
        self.shutdown = Shutdown()
        self._points: StopWatch | None = None
        self.asked_by: signal.Signals | None = None
        # Python runs a handler between two of its own steps; the number of the signal is written at once.
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, END_NOW):
            signal.signal(number, self._take)
        signal.signal(WAKE, signal.SIG_IGN)
        threading.Thread(target=self._end_if_blocked, daemon=True).start()

    def stop_by(self, points: StopWatch) -> None:
        """From now on the job is stopped by these; before, it has nothing to lose, and ends at once."""
        self._points = points
        signal.signal(WAKE, lambda number, frame: points.interrupt())

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_first = self.asked_by is None
        if number == END_NOW:
            if self.shutdown.is_closing:
                return
        else:
            self.shutdown.was_asked = True
            self.asked_by = signal.Signals(number)
            if is_first and self._points is not None:
                self._points.ask(self.asked_by.name)
                return
        raise KeyboardInterrupt

    def _end_if_blocked(self) -> None:
        while os.read(self._reader, 1)[0] != END_NOW:
            continue
        time.sleep(BLOCKED_S)
        if not self.shutdown.is_closing:
            os._exit(128 + signal.SIGTERM)


def _stop_watch(recipe: Recipe, whereabouts: Whereabouts) -> StopWatch:
    """What stops this rank where all others do, and ends it where that takes too long. Every rank must
    call."""
    limit_s = recipe.launcher.stop_within_s

    def end_late() -> None:
        time.sleep(limit_s)
        text = (
            f"stopped by {points.reason}, and {NOT_SAVED} {limit_s:g} s (launcher.stop_within_s): the "
            f"job was at {whereabouts.text}. It goes on from the checkpoint before"
        )
        _record(whereabouts, "stopped", text)
        os._exit(_stop_code(points.reason))

    main_thread = threading.get_ident()
    points = StopWatch(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        is_lockstep=isinstance(recipe.sharding, ShardedSharding),
        whereabouts=whereabouts,
        timeout=datetime.timedelta(seconds=recipe.launcher.timeout_s),
        connect=None if dist.get_world_size() == 1 else lambda: PrefixStore("stop", _store(recipe)),
        on_asked=lambda: threading.Thread(target=end_late, daemon=True).start(),
        wake=lambda: signal.pthread_kill(main_thread, WAKE),
    )
    return points


def _notices(recipe: Recipe, points: StopWatch) -> contextlib.AbstractContextManager[object]:
    """In this context a notice that the host is taken away stops the job; one rank of each host looks."""
    notice = recipe.launcher.notice
    if notice is None or os.environ["LOCAL_RANK"] != "0":
        return contextlib.nullcontext()
    return watching(
        Source(notice.file, notice.url, notice.pattern, notice.header),
        every_s=notice.every_s,
        on_notice=points.ask,
    )


def _stopped(whereabouts: Whereabouts, reason: str) -> int:
    _record(whereabouts, "stopped", f"stopped by {reason}")
    return _stop_code(reason)


def _stop_code(reason: str) -> int:
    """A person who stops a job does not want it back; whatever else stops it does."""
    return 128 + signal.SIGINT if reason == signal.SIGINT.name else START_AGAIN


def _join(recipe: Recipe) -> torch.device:
    """Joins the process group and returns this rank's device."""
    torch.set_num_threads(recipe.launcher.threads_per_process)
    local_rank = int(os.environ["LOCAL_RANK"])
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # NCCL refuses two ranks on one GPU; gloo does not.
        shares_gpus = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
        backend = "gloo" if shares_gpus else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=_store(recipe),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=recipe.launcher.timeout_s),
    )
    # Else DeepSpeed looks for an accelerator of its own, which may be another one.
    os.environ["DS_ACCELERATOR"] = device.type
    return device


def _store(recipe: Recipe) -> Store:
    """A connection to the agents' store, which outlives this round of the job: what an earlier round has left
    there is kept apart."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=recipe.launcher.timeout_s),
    )
    return PrefixStore(f"ranks/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _is_broken_collective(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo raises a plain RuntimeError)."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "NCCL" in text


def _lost_partner(whereabouts: Whereabouts, error: Exception) -> int:
    _print_traceback()
    _record(
        whereabouts,
        "lost_partner",
        "a collective failed, since another rank ended, or was silent for longer than launcher.timeout_s: "
        # Gloo puts a line of its sources before what it says, and good wishes after.
        + re.sub(r"^\[\S+:[0-9]+\] | This is typically caused by .*", "", _last_line(error)),
    )
    return LOST_PARTNER_EXIT_CODE


def _unexpected(whereabouts: Whereabouts, error: Exception) -> int:
    _print_traceback()
    _record(whereabouts, "defect", f"{type(error).__name__}: {_last_line(error)}")
    return 1


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _record(whereabouts: Whereabouts, kind: FailureKind, text: str) -> None:
    """Leaves the reason of a failure where the agent finds it."""
    whereabouts.record(Failure(kind, text))
    with contextlib.suppress(OSError):  # the disk of the logs may be full
        print(f"rank {os.environ.get('RANK', '0')} at {whereabouts.text}: {text}", file=sys.stderr)


def _print_traceback() -> None:
    """Prints the traceback of the error that is handled, where the disk of the logs takes it."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk changes no exit code
            stream.flush()
    # Not by way of the interpreter's end: a thread may be inside a storage that does not answer.
    os._exit(code)
