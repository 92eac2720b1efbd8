"""One rank of a job: `python -m metaloom.worker train|evaluate|check RUN ...`, started by the agent.

Reads its place from the variables that torch elastic sets, does the job, and ends with an exit
code that says why: 0, the code of a `MetaloomError`, or 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from metaloom.agent import LOST_PARTNER_EXIT_CODE
from metaloom.check import check
from metaloom.errors import MetaloomError
from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import Recipe, load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train

JOBS: dict[str, Callable[[Recipe, Place], None]] = {"train": train, "evaluate": evaluate, "check": check}


def main() -> int:
    """Runs one rank of the job named on the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m metaloom.worker")
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--recipe", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe)
        shutdown = _stop_on_signals()
        device = _join(recipe)
        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or None
        JOBS[arguments.job](recipe, Place(RunFolder(arguments.run), device, tracking_uri, shutdown))
    except MetaloomError as error:
        _record(str(error), expected=True)
        return error.exit_code
    except dist.DistError as error:
        return _lost_partner(error)
    except RuntimeError as error:
        if _is_broken_collective(error):
            return _lost_partner(error)
        return _unexpected(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return _unexpected(error)
    dist.destroy_process_group()
    return 0


def _stop_on_signals() -> Shutdown:
    """SIGINT and SIGTERM end the job by KeyboardInterrupt; what they have said is in the returned state."""
    shutdown = Shutdown()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            shutdown.was_asked = True
        elif shutdown.is_closing:
            return
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
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
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(seconds=recipe.launcher.timeout_s),
    )
    # Else DeepSpeed looks for an accelerator of its own, which may be another one.
    os.environ["DS_ACCELERATOR"] = device.type
    return device


def _is_broken_collective(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo raises a plain RuntimeError)."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "NCCL" in text


def _lost_partner(error: Exception) -> int:
    traceback.print_exc()
    _record(
        "a collective failed, since another rank ended, or was silent for longer than launcher.timeout_s: "
        + _last_line(error),
        expected=False,
    )
    return LOST_PARTNER_EXIT_CODE


def _unexpected(error: Exception) -> int:
    traceback.print_exc()
    _record(f"{type(error).__name__}: {_last_line(error)}", expected=False)
    return 1


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _record(text: str, *, expected: bool) -> None:
    """Leaves the reason of a failure where the agent finds it (torch elastic's error file)."""
    rank = os.environ.get("RANK", "0")
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    print(f"rank {rank}: {text}", file=sys.stderr)
    if path is None:
        return
    message = json.dumps({"text": text if expected else f"rank {rank}: {text}", "expected": expected})
    timestamp = str(int(time.time()))
    content = {"message": {"message": message, "extraInfo": {"py_callstack": "", "timestamp": timestamp}}}
    Path(path).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
