"""What a process takes of its machine: one core, and memory at its peak."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def keep_to_one_core() -> None:
    """One thread at a time, whatever libraries start: XLA has no setting that is enough for it."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, so that none is counted twice or hides what is used next."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_above(make: Callable[[], T]) -> tuple[T, float, bool]:
    """What `make` returns, the peak of the resident set above what was resident before, in MiB, and whether
    that peak was reset: see `reset_peak`."""
    give_back_freed_memory()
    was_reset = reset_peak()
    before_mib = status_mib("VmRSS") if was_reset else peak_mib(was_reset)
    made = make()
    return made, peak_mib(was_reset) - before_mib, was_reset


def reset_peak() -> bool:
    """Has the peak of the resident set start anew (proc(5), `clear_refs`); whether the system does so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib(was_reset: bool) -> float:
    """The peak of the resident set since it was reset, or ever."""
    if was_reset:
        return status_mib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def status_mib(field: str) -> float:
    """A field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
