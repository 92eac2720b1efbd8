"""Memory of the hypergradient of the stdlib recipe at K = 1, 4, 16 and 64 LoRA steps: prints a table.

    python -m benchmarks.long_unrolls [--recipe recipes/stdlib-lora.yaml] [--steps 1 4 16 64] [--json OUT]

The GPT, its LoRA, its tasks and the rehearsal are those of the recipe, in bfloat16, with tokens that are
drawn: memory does not depend on them. The query loss after the last step is what is differentiated, with
respect to where LoRA starts and to the learned rates of every step and matrix.

Rows. Each is a process of its own on one core, which makes the hypergradient once at K = 1, so that what is
loaded and imported on first use is in no figure, and then once at its K.

    unrolled                      keeps the graph of all steps
    rematerialized, mixed_mode    one step's graph at a time; all fast weights are kept
    ... binomial                  9 of the steps' fast weights (memory.snapshots), the others are made again
    ... blocks                    each block's activations are made again, too (memory.recompute_blocks)

Columns: peak of the resident set above what was resident before, MiB; the same over that of the row's K = 1;
seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import keep_to_one_core, peak_above
from metaloom.build import Choices, build_algorithm, build_model
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.replicated import Replicated
from metaloom.recipe import DocumentsData, Recipe, load_recipe
from metaloom.recipe.tasks import vocabulary

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
WAYS: dict[str, tuple[str, ...]] = {
    "unrolled": ("algorithm.hypergradient=unrolled",),
    "rematerialized": ("algorithm.hypergradient=rematerialized",),
    "mixed_mode": ("algorithm.hypergradient=mixed_mode",),
    "rematerialized, binomial": (
        "algorithm.hypergradient=rematerialized",
        "memory.snapshots={kind: binomial, num_slots: 9}",
    ),
    "mixed_mode, binomial": (
        "algorithm.hypergradient=mixed_mode",
        "memory.snapshots={kind: binomial, num_slots: 9}",
    ),
    "rematerialized, blocks": ("algorithm.hypergradient=rematerialized", "memory.recompute_blocks=true"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a row's process tells, in MiB and seconds."""

    peak_mib: float
    seconds: float


def recipe_of(path: Path, way: str, num_steps: int) -> Recipe:
    """The recipe with K steps under one of the ways."""
    words = (
        *WAYS[way],
        f"adaptation.num_steps={num_steps}",
        "algorithm.step_weights=last",
        "precision.compute=bfloat16",
        "pretrain=null",
    )
    return load_recipe(path, words)


def batch_of(recipe: Recipe) -> TaskBatch:
    """Tasks of the recipe's shapes, of drawn tokens."""
    data, rehearsal = recipe.data, recipe.adaptation.rehearsal
    assert isinstance(data, DocumentsData), "a recipe of documents is asked for"
    generator = torch.Generator().manual_seed(0)
    num_tasks = recipe.outer.tasks_per_step
    length, tokens = data.sequence_length, vocabulary(recipe)

    def drawn(count: int) -> dict[str, Tensor]:
        sequences = torch.randint(tokens, (num_tasks, count, length + 1), generator=generator)
        return {"inputs": sequences[..., :-1], "targets": sequences[..., 1:]}

    rehearsed = 0 if rehearsal is None else rehearsal.num_samples * recipe.adaptation.num_steps
    return TaskBatch(
        tuple(range(num_tasks)),
        support=drawn(data.num_support),
        query=drawn(data.num_query),
        rehearsal=drawn(rehearsed) if rehearsed else None,
    )


def hypergradient(recipe: Recipe) -> None:
    """Makes the model, and differentiates one batch."""
    model = build_model(recipe, CPU, Replicated())
    algorithm = build_algorithm(recipe, model, Choices(), CPU)
    meta = algorithm.meta_parameters()
    batch = batch_of(recipe)
    gradient = algorithm.meta_gradient(meta, batch).gradient
    assert all(bool(value.isfinite().all()) for value in gradient.values())


def serve(path: Path, way: str, num_steps: int) -> None:
    """Measures one row."""
    keep_to_one_core()
    hypergradient(recipe_of(path, way, 1))
    recipe = recipe_of(path, way, num_steps)
    started = time.perf_counter()
    _, peak, _ = peak_above(lambda: hypergradient(recipe))
    print(json.dumps(dataclasses.asdict(Measured(peak, time.perf_counter() - started))))


def measure(path: Path, way: str, num_steps: int) -> Measured:
    """One row, in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.long_unrolls", "--recipe", str(path)]
    done = subprocess.run(
        [*words, "--row", way, str(num_steps)], stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measures all rows, or one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_unrolls", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "stdlib-lora.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        serve(arguments.recipe, arguments.row[0], int(arguments.row[1]))
        return
    print(f"{'way':26} {'K':>3} {'peak MiB':>9} {'/ K = 1':>8} {'seconds':>8}")
    figures: list[dict[str, Any]] = []
    for way in arguments.ways:
        first: float | None = None
        for num_steps in arguments.steps:
            found = measure(arguments.recipe.resolve(), way, num_steps)
            first = first or found.peak_mib
            ratio = found.peak_mib / first
            print(
                f"{way:26} {num_steps:3} {found.peak_mib:9.1f} {ratio:8.2f} {found.seconds:8.2f}", flush=True
            )
            figures.append({"way": way, "steps": num_steps, **dataclasses.asdict(found)})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
