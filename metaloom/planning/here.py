"""What this machine reaches: measured in a second or two, for `--hardware here`."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from metaloom.choosing import memory_limit
from metaloom.engine.kernels.linear import linear
from metaloom.engine.precision import HALF, ComputeFormat, Precision
from metaloom.errors import LaunchError
from metaloom.planning.hardware import GPU_RESERVED, GPU_UNUSABLE, LINK_EFFICIENCY, Device

NUM_REPEATS = 5
# glibc's allocator keeps what is freed between tensors that live; and graphs have nodes beside their tensors.
# Both are fitted to the built-in recipes, see docs/scaling.md.
CPU_UNUSABLE, CPU_UNUSABLE_BYTES = 0.45, 30 * 2**20
LOOPBACK_BYTES = 2**24
PROBE_TIMEOUT_S = 120.0


def measured_device(compute: ComputeFormat, *, num_local_ranks: int, is_tracked: bool) -> Device:
    """This machine as a rank's device: a GPU where torch finds one, else a share of the CPU and its memory,
    at as many threads as torch is set to.

    Args:
        compute: the format to multiply matrices in.
        num_local_ranks: ranks that share the machine's memory, where it is the CPU's.
        is_tracked: whether rank 0 loads MLflow.
    """
    if torch.cuda.is_available():
        return _gpu_here(compute, num_local_ranks)
    dtype = HALF.get(compute) or Precision(compute).storage_dtype
    size = 384
    left, right = torch.randn(2, size, size).to(dtype)
    seconds = _timed(lambda: linear(left, right))
    # Larger than caches; each number is read twice and written once.
    numbers = torch.randn(2**22)
    added_s = _timed(lambda: numbers + numbers)
    one = torch.randn(8, requires_grad=True)
    operation_s = _timed(lambda: _many_small(one)) / (2 * SMALL_OPERATIONS)
    process_bytes = _process_bytes(is_tracked=is_tracked)
    num_threads = torch.get_num_threads()
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        name=f"{'a core' if num_threads == 1 else f'{num_threads} cores'} of this machine, {compute}",
        memory_bytes=min(physical_bytes, memory_limit()[0]) / num_local_ranks,
        flops_per_s={compute: 2 * size**3 / seconds},
        bandwidth=3 * numbers.numel() * numbers.element_size() / added_s,
        operation_s=operation_s,
        is_asynchronous=False,
        efficiency=1.0,
        bandwidth_efficiency=1.0,
        process_bytes=process_bytes,
        unusable=CPU_UNUSABLE,
        unusable_bytes=CPU_UNUSABLE_BYTES,
        node_bandwidth=_loopback_bandwidth(),
        node_efficiency=1.0,  # a collective itself has been measured
        has_host_memory=False,
    )


def _gpu_here(compute: ComputeFormat, num_local_ranks: int) -> Device:
    device = torch.device("cuda")
    dtype = HALF.get(compute) or Precision(compute).storage_dtype
    size = 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = _timed(lambda: left @ right)
    numbers = torch.randn(2**28, device=device)
    added_s = _timed(lambda: numbers + numbers)
    one = torch.randn(8, device=device, requires_grad=True)
    operation_s = _timed(lambda: _many_small(one)) / (2 * SMALL_OPERATIONS)
    properties = torch.cuda.get_device_properties(device)
    ranks_per_gpu = -(-num_local_ranks // torch.cuda.device_count())
    other = numbers.to("cuda:1") if torch.cuda.device_count() > 1 else numbers
    copied_s = _timed(lambda: other.copy_(numbers))
    return Device(
        name=properties.name,
        memory_bytes=properties.total_memory / ranks_per_gpu,
        flops_per_s={compute: 2 * size**3 / seconds},
        bandwidth=3 * numbers.numel() * numbers.element_size() / added_s,
        operation_s=operation_s,
        is_asynchronous=True,
        # Of rates that large products and long vectors have reached: those of a model reach less.
        efficiency=0.7,
        bandwidth_efficiency=0.9,
        process_bytes=GPU_RESERVED,
        unusable=GPU_UNUSABLE,
        unusable_bytes=0.0,
        node_bandwidth=numbers.numel() * numbers.element_size() / copied_s,
        node_efficiency=LINK_EFFICIENCY,
        has_host_memory=True,
    )


SMALL_OPERATIONS = 200


def _many_small(one: torch.Tensor) -> None:
    """Operations whose size does not matter, forwards and backwards."""
    value = one
    for _ in range(SMALL_OPERATIONS):
        value = value * 1.0
    value.sum().backward()  # type: ignore[no-untyped-call]


def _timed(run: Callable[[], object]) -> float:
    """The median of a few runs, after one that warms up."""
    times = []
    for _ in range(1 + NUM_REPEATS):
        _wait()
        started = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- processes


def _process_bytes(*, is_tracked: bool) -> float:
    """The resident set of a rank that has loaded what it needs, and run each kind of kernel once."""
    return float(_answer_of("process", *(["--tracked"] if is_tracked else [])))


def _loopback_bandwidth() -> float:
    """Bytes per second that each of two processes of this machine sends in an all-reduce by gloo."""
    return float(_answer_of("loopback"))


def _answer_of(*words: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "metaloom.planning.probe", *words],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise _not_measured(words[0], f"not done after {PROBE_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise _not_measured(words[0], (done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip().splitlines()[-1]


def _not_measured(what: str, why: str) -> LaunchError:
    return LaunchError(
        f"--hardware here: what this machine reaches could not be measured ({what}): {why}. Name hardware of "
        "the table instead."
    )


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not tell."""
    gc.collect()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
