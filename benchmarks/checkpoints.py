"""How long training waits for checkpoints, as they are written by default: prints a table.

    python -m benchmarks.checkpoints                       the built-in recipes; a quarter of an hour
    python -m benchmarks.checkpoints recipes/smoke.yaml    one of them

Every recipe is trained for a few outer steps with its own processes, a checkpoint after every `EVERY`th and
a validation after every `VALIDATED_EVERY`th, which a checkpoint follows where it is the best so far. In one
run are measured: `step`, the median time from one step's record to the next where no checkpoint is begun and
nothing is validated; `waits`, the median of `checkpoint_wait_s`, the time that training waits for one (until
the state is copied); `best`, how many validations had a checkpoint that was not due, of those that might.

`interval` is what the recipe has between two checkpoints: outer steps or `checkpoint.every_minutes`, what
comes first. `validated` is what it has between two validations; each may be the best so far, and is counted
as a checkpoint. `share` is what of the run, but for its validations, is spent waiting for either; the aim is
below 2 %. `state` is what a checkpoint takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.recipe import load_recipe
from metaloom.recipe.tasks import data_urls

EVERY = 5
VALIDATED_EVERY = 8
STEPS = 40


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the recipes that are named, and prints a row for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    # One is for an encoder of the user's.
    own = sorted(str(path) for path in Path("recipes").glob("*.yaml") if path.stem != "encoder-lora")
    built_in = [*own, "recipes/few-shot/maml.yaml"]
    parser.add_argument("recipes", nargs="*", default=built_in, metavar="RECIPE")
    recipes: Sequence[str] = parser.parse_args(argv).recipes
    print(
        f"{'recipe':<26}{'state':>10}{'step':>10}{'waits':>11}{'best':>8}{'interval':>12}{'validated':>12}"
        f"{'share':>9}"
    )
    with tempfile.TemporaryDirectory(prefix="metaloom-checkpoints-") as folder:
        for path in recipes:
            print(row(path, Path(folder)), flush=True)


def row(path: str, folder: Path) -> str:
    """One recipe, measured, as a line of the table."""
    name, run = Path(path).stem, folder / Path(path).stem
    recipe = load_recipe(path)
    words = [
        f"outer.num_steps={STEPS}",
        f"checkpoint={{every_steps: {EVERY}, every_minutes: null}}",
        f"validation.every_steps={VALIDATED_EVERY}",
        "validation.early_stopping=null",
        "tracking=none",
    ]
    if recipe.pretrain is not None:
        words += ["pretrain.num_steps=2", "pretrain.warmup_steps=1"]
    if recipe.outer.schedule.warmup_steps:
        words.append("outer.schedule.warmup_steps=1")
    for key, url in data_urls(recipe).items():
        data = folder / "data" / Path(url).name  # named as the built-in data set
        if not data.exists():
            _metaloom("data", "make", data.name, data)
        words.append(f"{key}={data}")
    _metaloom("train", path, *words, "--run", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"] > 0]
    step_s = statistics.median(
        record["time_s"] - before["time_s"]
        for before, record in itertools.pairwise(steps)
        if "checkpoint_wait_s" not in record and "validation_loss" not in record
    )
    # The first checkpoint makes the group of processes too, which is not done again.
    waits_s = statistics.median([r["checkpoint_wait_s"] for r in steps if "checkpoint_wait_s" in r][1:])
    # Waiting is told in the record of the step after.
    had_one = [
        "checkpoint_wait_s" in after
        for record, after in itertools.pairwise(steps)
        if "validation_loss" in record and record["step"] % EVERY
    ]
    interval_s = _interval_s(recipe.checkpoint.every_steps, recipe.checkpoint.every_minutes, step_s)
    validated_s = _interval_s(recipe.validation.every_steps, None, step_s)
    waiting = waits_s * (1.0 / interval_s + 1.0 / validated_s)  # for a second of training
    catalogue = Catalogue(run / "checkpoints" / "meta")
    state = catalogue.manifest(catalogue.steps()[-1]).num_bytes / 2**20
    return (
        f"{name:<26}{state:>6.2f} MiB{step_s:>8.3f} s{1e3 * waits_s:>8.2f} ms"
        f"{f'{sum(had_one)} of {len(had_one)}':>8}{interval_s:>10.1f} s{validated_s:>10.1f} s"
        f"{100 * waiting / (1.0 + waiting):>7.3f} %"
    )


def _interval_s(every_steps: int | None, every_minutes: float | None, step_s: float) -> float:
    """What comes first of so many steps and so many minutes; infinite where neither is given."""
    by_steps = math.inf if every_steps is None else every_steps * step_s
    return min(by_steps, math.inf if every_minutes is None else 60.0 * every_minutes)


def _metaloom(*words: str | Path) -> None:
    command = [sys.executable, "-m", "metaloom.cli", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
