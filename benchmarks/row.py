"""Measures one contender on one problem, in a process of its own, as `hypergradients.py` asks it to.

The first line of standard input is a `Request` as JSON. The process then makes one hypergradient and
answers with a `First` as JSON on a line; for every further line it makes another and answers with a
`Timing`. It ends with its input.

Memory is the peak of the resident set during the first hypergradient above what was resident before it,
when model and data are there, the hypergradient of a tiny problem and one forward pass have been made, and
a compiler has done its work. Linux resets that peak on request (proc(5), `clear_refs`); where it does not,
the peak above the highest one before is taken, which hides memory that a compiler has needed, too.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np

from benchmarks.measuring import keep_to_one_core, peak_above
from benchmarks.peers import CONTENDERS
from benchmarks.peers.base import Prepared
from benchmarks.workloads import WORKLOADS, Array, DType, Workload, draw, tiny_one_like


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and the file to write the gradient to (.npz)."""

    workload: str
    num_steps: int
    contender: str
    dtype: DType
    gradient: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock time of one hypergradient, and the processor time of all threads."""

    wall_s: float
    cpu_s: float


@dataclasses.dataclass(frozen=True)
class First:
    """The first hypergradient, and what went before it."""

    timing: Timing
    compile_s: float
    peak_mib: float
    peak_was_reset: bool


def main() -> None:
    """Serves one request."""
    answers = _claim_standard_output()
    keep_to_one_core()
    request = Request(**json.loads(sys.stdin.readline()))
    contender = CONTENDERS[request.contender]
    module = importlib.import_module(f"benchmarks.peers.{contender.module}")

    def prepare(workload: Workload, num_steps: int) -> Prepared:
        prepared: Prepared = module.prepare(draw(workload, num_steps, request.dtype), contender.variant)
        prepared.forward()
        return prepared

    workload = WORKLOADS[request.workload]
    # Libraries import parts of themselves and load kernels on first use, which is in no figure.
    prepare(tiny_one_like(workload), 1).hypergradient()
    prepared = prepare(workload, request.num_steps)
    _answer(answers, _first(prepared, Path(request.gradient)))
    for _ in sys.stdin:
        _answer(answers, _timed(prepared))


def _claim_standard_output() -> TextIO:
    """A stream to the old standard output; whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _answer(answers: TextIO, result: First | Timing) -> None:
    print(json.dumps(dataclasses.asdict(result)), file=answers, flush=True)


def _first(prepared: Prepared, gradient_path: Path) -> First:
    def timed() -> tuple[dict[str, Array], Timing]:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        gradient = prepared.hypergradient()
        return gradient, Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s)

    (gradient, timing), above_mib, was_reset = peak_above(timed)
    with gradient_path.open("wb") as file:
        np.savez(file, **gradient)  # type: ignore[arg-type]
    return First(timing, prepared.compile_s, above_mib, was_reset)


def _timed(prepared: Prepared) -> Timing:
    # Freed memory stays with the process, as between the steps of a training.
    gc.collect()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    prepared.hypergradient()
    return Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s)


if __name__ == "__main__":
    main()
