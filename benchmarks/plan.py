"""What `metaloom plan` says beside what a run takes: prints a table.

    python -m benchmarks.plan --glyphs data/glyphs --stdlib data/stdlib [--json OUT]

Each row is a recipe with some settings. It is planned for this machine (`--hardware here`), and then really
run: a few outer steps of `metaloom train` in processes of its own, as many as the recipe says, with its
pre-training cut to a few steps and without validation.

Columns.

    process        MiB: what a rank's process is planned to take beside its tensors. It is measured, in a
                   process that loads what rank 0 does and runs each kind of kernel once
    planned, ran   MiB of rank 0: planned, and the peak of its resident set, as the run has logged it
    error          planned / ran - 1
    above          the same three of what is above `process`
    step           seconds of an outer step: planned, the median of those after the first that ran, error

Time is the wall clock's: it is worth something on a machine with as many idle cores as the recipe has ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from metaloom.planning.counting import count
from metaloom.planning.estimate import Layout, estimate
from metaloom.planning.hardware import LINKS, Device, Hardware
from metaloom.planning.here import measured_device
from metaloom.planning.sample import calibrated
from metaloom.recipe import Recipe, load_recipe
from metaloom.tracking.jsonl import read_metrics

RECIPES = Path(__file__).parent.parent / "recipes"
MIB = 2.0**20
NUM_STEPS = 6
RUN_TIMEOUT_S = 1800.0
GLYPHS, STDLIB = "glyphs-maml", "stdlib-lora"
REMATERIALIZED = "algorithm.hypergradient=rematerialized"
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (GLYPHS, ()),
    (STDLIB, ()),
    (GLYPHS, ("adaptation.fast.tasks=loop",)),
    (GLYPHS, ("adaptation.fast.tasks=loop", REMATERIALIZED)),
    (GLYPHS, ("adaptation.fast.tasks=loop", "outer.micro_batch=2")),
    (STDLIB, (REMATERIALIZED,)),
    (STDLIB, ("algorithm.hypergradient=mixed_mode",)),
    (STDLIB, (REMATERIALIZED, "memory.recompute_blocks=true")),
    (STDLIB, ("outer.tasks_per_step=16", "outer.micro_batch=2")),
    (STDLIB, ("outer.tasks_per_step=16",)),
    (STDLIB, ("outer.tasks_per_step=16", REMATERIALIZED)),
    (STDLIB, ("model.num_layers=6", "adaptation.num_steps=8", REMATERIALIZED)),
)
HEADER = (
    f"{'recipe':12} {'process':>7} {'planned':>8} {'ran':>8} {'error':>7} {'above':>8} {'ran':>8} "
    f"{'error':>7} {'step':>7} {'ran':>7} {'error':>7}  settings"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe's figures, in bytes and seconds."""

    recipe: str
    settings: tuple[str, ...]
    process: float
    planned: float
    ran: float
    planned_step_s: float
    ran_step_s: float

    def formatted(self) -> str:
        """A line of the table."""

        def three(planned: float, ran: float, unit: float, digits: int, width: int) -> str:
            error = f"{planned / ran - 1:+.0%}" if ran > 0 else "-"
            return f"{planned / unit:{width}.{digits}f} {ran / unit:{width}.{digits}f} {error:>7}"

        return " ".join(
            [
                f"{self.recipe:12} {self.process / MIB:7.0f}",
                three(self.planned, self.ran, MIB, 0, 8),
                three(self.planned - self.process, self.ran - self.process, MIB, 0, 8),
                three(self.planned_step_s, self.ran_step_s, 1.0, 2, 7),
                " " + (" ".join(self.settings) or "(as it is)"),
            ]
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--glyphs", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--stdlib", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first N rows alone")
    parser.add_argument("--ranks", type=int, help="processes, in place of the recipe's")
    parser.add_argument("--json", type=Path, metavar="OUT", help="a file to write all figures to")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = {GLYPHS: settings.glyphs.resolve(), STDLIB: settings.stdlib.resolve()}
    num_ranks = settings.ranks or load_recipe(RECIPES / f"{GLYPHS}.yaml").launcher.num_processes
    device = measured_device("float32", num_local_ranks=num_ranks, is_tracked=True)
    print(HEADER, flush=True)
    rows = []
    for name, changes in ROWS[: settings.rows]:
        given = (f"data.url={data[name]}", f"launcher.num_processes={num_ranks}", *changes)
        row = measured(name, changes, given, device)
        print(row.formatted(), flush=True)
        rows.append(row)
        if settings.json is not None:
            figures = {"torch": torch.__version__, "rows": [dataclasses.asdict(each) for each in rows]}
            settings.json.write_text(json.dumps(figures, indent=1) + "\n")


def measured(name: str, changes: tuple[str, ...], given: tuple[str, ...], device: Device) -> Row:
    """The row of a recipe with some settings."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", given)
    num_ranks = recipe.launcher.num_processes
    facts = count(recipe, with_shards=False, on_gpu=False)
    hardware, _ = calibrated(recipe, facts, Hardware(device, LINKS["ndr"], num_ranks))
    planned = estimate(facts, hardware, Layout("replicated"), num_ranks)
    ran, step_s = run(recipe, name, given)
    return Row(name, changes, device.process_bytes, planned.memory.total, ran, planned.step_s, step_s)


def run(recipe: Recipe, name: str, given: tuple[str, ...]) -> tuple[float, float]:
    """The peak of rank 0's resident set, in bytes, and seconds of an outer step, of a short real run."""
    short = [f"outer.num_steps={NUM_STEPS}", "outer.schedule.warmup_steps=0", "validation.every_steps=null"]
    if recipe.pretrain is not None:
        short += ["pretrain.num_steps=3", "pretrain.warmup_steps=0"]
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        words = ["train", str(RECIPES / f"{name}.yaml"), *given, *short, "--run", str(run_folder)]
        done = subprocess.run(
            [sys.executable, "-m", "metaloom.cli", *words],
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        records = [record for record in read_metrics(run_folder / "metrics.jsonl") if record.step > 0]
    peak = max(record.metrics["peak_memory_mib"] for record in records) * MIB
    times = [recipe.outer.tasks_per_step / record.metrics["tasks_per_s"] for record in records[1:]]
    return peak, statistics.median(times)


if __name__ == "__main__":
    main()
