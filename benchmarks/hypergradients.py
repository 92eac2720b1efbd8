"""Time and memory of one hypergradient, by metaloom's estimators and by other libraries: prints tables.

    python -m benchmarks.hypergradients [--workload W1 W2] [--steps 1 4] [--contenders jax/mixed_mode]

All contenders have the same model, weights, data and one core. Each row is measured in a process of its
own (see `row.py`); repeats alternate between the rows of a block, so that a noisy machine hits all alike.
A library that is not installed is a row that says so. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import CONTENDERS
from benchmarks.row import First, Request, Timing
from benchmarks.workloads import WORKLOADS, Array, DType

REPOSITORY = Path(__file__).parent.parent
# Before a library is loaded; the row's process keeps itself to one core, too.
ONE_THREAD_OF_A_CPU = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


@dataclasses.dataclass
class Row:
    """What was measured of one contender.

    Attributes:
        first: the first hypergradient, which memory is taken from.
        repeats: further ones, for which it was the warm-up.
        error: distance to the reference's gradient, relative to its norm.
        failure: why there is nothing.
    """

    contender: str
    first: First | None = None
    repeats: list[Timing] = dataclasses.field(default_factory=list)
    error: float | None = None
    failure: str | None = None

    @property
    def timings(self) -> list[Timing]:
        """The hypergradients whose time counts."""
        return self.repeats or ([] if self.first is None else [self.first.timing])

    @property
    def best_s(self) -> float:
        """The shortest wall-clock time; infinite where there is none."""
        return min((timing.wall_s for timing in self.timings), default=float("inf"))


@dataclasses.dataclass(frozen=True)
class Block:
    """The rows of one workload at one number of inner steps, and whose gradient errors are relative to."""

    workload: str
    num_steps: int
    rows: list[Row]
    reference: str | None


class Measuring:
    """The process that measures one row."""

    def __init__(self, row: Row, request: Request) -> None:
        self.row = row
        # A file, since a pipe that nobody reads would block a library that prints a lot.
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.row"],
            cwd=REPOSITORY,
            env=os.environ | ONE_THREAD_OF_A_CPU,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        answer = self._ask(json.dumps(dataclasses.asdict(request)))
        if answer is not None:
            row.first = First(timing=Timing(**answer.pop("timing")), **answer)

    def repeat(self) -> None:
        """Has one more hypergradient made."""
        answer = self._ask("again")
        if answer is not None:
            self.row.repeats.append(Timing(**answer))

    def end(self) -> None:
        """Ends the process, if it has not ended itself."""
        self._process.communicate()
        self._complaints.close()

    def _ask(self, line: str) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.row.failure = self._last_words()
            return None
        found: dict[str, Any] = json.loads(answer)
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines()
        return f"failed ({lines[-1]})" if lines else f"failed (exit code {code})"


def measure_block(
    workload: str, num_steps: int, contenders: Sequence[str], *, dtype: DType, repeats: int, long_s: float
) -> Block:
    """Measures all contenders on one problem.

    Args:
        repeats: of each row after its first hypergradient, which is then the warm-up.
        long_s: a row whose first hypergradient takes longer is repeated once, at once, and its process ends.
            Without any repeat the first one would count, which for JAX can take several times as long.
    """
    block = Block(workload, num_steps, [Row(name) for name in contenders], _reference(contenders))
    gradients: dict[str, dict[str, Array]] = {}
    with tempfile.TemporaryDirectory() as folder:
        running: list[Measuring] = []
        for row in block.rows:
            if not _is_installed(row.contender):
                row.failure = "not installed"
                continue
            path = Path(folder, "gradient.npz")
            measuring = Measuring(row, Request(workload, num_steps, row.contender, dtype, str(path)))
            if row.first is None:
                measuring.end()
                continue
            with np.load(path) as arrays:
                gradients[row.contender] = dict(arrays)
            if row.first.timing.wall_s < long_s:
                running.append(measuring)
            else:
                for _ in range(min(repeats, 1)):
                    measuring.repeat()
                measuring.end()
        for _ in range(repeats):
            for measuring in running:
                measuring.repeat()
        for measuring in running:
            measuring.end()
    if block.reference in gradients:
        for row in block.rows:
            if row.contender in gradients:
                row.error = relative_error(gradients[row.contender], gradients[block.reference])
    return block


def _is_installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in CONTENDERS[name].requires)


def _reference(contenders: Sequence[str]) -> str | None:
    """`metaloom/unrolled` where it takes part, else the first contender that is exact."""
    exact = [name for name in contenders if CONTENDERS[name].exact and _is_installed(name)]
    return min(exact, key=lambda name: name != "metaloom/unrolled", default=None)


def relative_error(found: dict[str, Array], expected: dict[str, Array]) -> float:
    """`|found - expected| / |expected|` over all tensors taken as one vector.

    Raises:
        ValueError: the names or shapes are not the same.
    """
    shapes, expected_shapes = ({name: value.shape for name, value in of.items()} for of in (found, expected))
    if shapes != expected_shapes:
        raise ValueError(f"gradients of other tensors: {shapes} instead of {expected_shapes}")
    difference = sum(
        float(np.square(found[name] - value, dtype=float).sum()) for name, value in expected.items()
    )
    total = sum(float(np.square(value, dtype=float).sum()) for value in expected.values())
    return float(np.sqrt(difference / total))


def table(block: Block) -> str:
    """The block as text. Ratios are to the fastest peer's row."""
    peers = [row for row in block.rows if CONTENDERS[row.contender].is_peer and row.first is not None]
    fastest = min(peers, key=lambda row: row.best_s, default=None)
    lines = [
        f"{block.workload}, K = {block.num_steps}: {WORKLOADS[block.workload].title}",
        f"{'contender':24}{'best s':>9}{'median s':>10}{'/ peer':>8}{'cpu s':>9}"
        f"{'peak MiB':>10}{'/ peer':>8}{'error':>10}",
    ]
    for row in block.rows:
        if row.first is None:
            lines.append(f"{row.contender:24}  {row.failure}")
            continue
        median_s = statistics.median(timing.wall_s for timing in row.timings)
        cpu_s = min(timing.cpu_s for timing in row.timings)
        time_ratio = memory_ratio = "-"
        if fastest is not None and fastest.first is not None:
            time_ratio = f"{row.best_s / fastest.best_s:.2f}"
            memory_ratio = f"{row.first.peak_mib / fastest.first.peak_mib:.2f}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        lines.append(
            f"{row.contender:24}{row.best_s:9.3f}{median_s:10.3f}{time_ratio:>8}{cpu_s:9.3f}"
            f"{row.first.peak_mib:10.0f}{memory_ratio:>8}{error:>10}{_remarks(row, row.first)}"
        )
    return "\n".join(lines)


def _remarks(row: Row, first: First) -> str:
    remarks = []
    if not CONTENDERS[row.contender].exact:
        remarks.append("an approximation")
    if first.compile_s > 0.0:
        remarks.append(f"compiled in {first.compile_s:.0f} s")
    if not row.repeats:
        remarks.append("not warmed up")
    elif len(row.repeats) == 1:
        remarks.append("one repeat")
    if not first.peak_was_reset:
        remarks.append("memory above the peak before")
    if row.failure is not None:
        remarks.append(row.failure)
    return "  " + ", ".join(remarks) if remarks else ""


def environment(contenders: Sequence[str]) -> dict[str, str]:
    """What the figures depend on besides the code: releases, interpreter, processor."""
    distributions = dict.fromkeys(["torch", *(CONTENDERS[name].distribution for name in contenders)])
    releases = {name: _release(name) for name in distributions}
    return releases | {"python": platform.python_version(), "processor": _processor()}


def _release(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    usual = [name for name in WORKLOADS if not name.startswith("tiny")]
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=usual, metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", metavar="K", help="default: the workload's own")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of short rows, after a warm-up")
    parser.add_argument(
        "--long-s", type=float, default=20.0, metavar="S", help="longer rows are repeated once"
    )
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args(arguments)
    about = environment(options.contenders)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    blocks = []
    for workload in options.workload:
        for num_steps in options.steps or WORKLOADS[workload].steps:
            block = measure_block(
                workload,
                num_steps,
                options.contenders,
                dtype=options.dtype,
                repeats=options.repeats,
                long_s=options.long_s,
            )
            print(f"\n{table(block)}", flush=True)
            blocks.append(block)
            if options.json is not None:  # after every block, since a whole run takes long
                found = {"environment": about, "blocks": [dataclasses.asdict(block) for block in blocks]}
                options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
