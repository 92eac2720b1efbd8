"""One rank of a job: `python -m metaloom.worker train|evaluate|check RUN ...`, started by the agent.

Reads its place from the variables that torch elastic sets, does the job, and ends with an exit
code that says why: 0, the code of a `MetaloomError`, or 1.
"""

from __future__ import annotations

import argparse
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
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from metaloom.check import check
from metaloom.errors import MetaloomError
from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.processes import watch_parent
from metaloom.recipe import Recipe, load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train
from metaloom.whereabouts import END, Failure, FailureKind, Whereabouts

LOST_PARTNER_EXIT_CODE = 90
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
    try:
        recipe = load_recipe(arguments.recipe)
        shutdown = _stop_on_signals()
        device = _join(recipe)
        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or None
        place = Place(RunFolder(arguments.run), device, tracking_uri, shutdown, whereabouts)
        JOBS[arguments.job](recipe, place)
        whereabouts.enter(END)
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
        return 128 + signal.SIGINT
    except Exception as error:
        return _unexpected(whereabouts, error)
    dist.destroy_process_group()
    return 0


def _stop_on_signals() -> Shutdown:
    """SIGINT and SIGTERM end the job by KeyboardInterrupt; what they have said is in the returned state.

    A rank that waits in a collective for one that is gone would not see the interrupt before the
    collective's timeout: on SIGTERM it ends `BLOCKED_S` later, unless it is delivering its last records.
    """
    shutdown = Shutdown()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            shutdown.was_asked = True
        elif shutdown.is_closing:
            return
        raise KeyboardInterrupt

    # Python runs `interrupt` between two of its own steps; the number of the signal is written at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)

    def end_if_blocked() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            continue
        time.sleep(BLOCKED_S)
        if not shutdown.is_closing:
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end_if_blocked, daemon=True).start()
    return shutdown


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
    timeout = datetime.timedelta(seconds=recipe.launcher.timeout_s)
    # The agents' store, which outlives this round of the job: what an earlier round has left there is
    # kept apart.
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    dist.init_process_group(
        backend,
        store=PrefixStore(f"ranks/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )
    # Else DeepSpeed looks for an accelerator of its own, which may be another one.
    os.environ["DS_ACCELERATOR"] = device.type
    return device


def _is_broken_collective(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo raises a plain RuntimeError)."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "NCCL" in text


def _lost_partner(whereabouts: Whereabouts, error: Exception) -> int:
    traceback.print_exc()
    _record(
        whereabouts,
        "lost_partner",
        "a collective failed, since another rank ended, or was silent for longer than launcher.timeout_s: "
        # Gloo puts a line of its sources before what it says, and good wishes after.
        + re.sub(r"^\[\S+:[0-9]+\] | This is typically caused by .*", "", _last_line(error)),
    )
    return LOST_PARTNER_EXIT_CODE


def _unexpected(whereabouts: Whereabouts, error: Exception) -> int:
    traceback.print_exc()
    _record(whereabouts, "defect", f"{type(error).__name__}: {_last_line(error)}")
    return 1


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _record(whereabouts: Whereabouts, kind: FailureKind, text: str) -> None:
    """Leaves the reason of a failure where the agent finds it."""
    print(f"rank {os.environ.get('RANK', '0')} at {whereabouts.text}: {text}", file=sys.stderr)
    whereabouts.record(Failure(kind, text))


if __name__ == "__main__":
    sys.exit(main())
