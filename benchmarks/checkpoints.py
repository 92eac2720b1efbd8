"""How long training waits for checkpoints, as they are written by default: prints a table.

    python -m benchmarks.checkpoints                       the built-in recipes; some five minutes
    python -m benchmarks.checkpoints recipes/smoke.yaml    one of them

Every recipe is trained for a few outer steps with its own processes, a checkpoint after every `EVERY`th. In
one run are measured: `step`, the median time from one step's record to the next where no checkpoint is begun;
`waits`, the median of `checkpoint_wait_s`, the time that training waits for one (until the state is copied).
`interval` is what the recipe has between two checkpoints: outer steps or `checkpoint.every_minutes`, what
comes first. `share` is `waits / (waits + interval)`, what of the run is spent waiting; the aim is below 2 %.
`state` is what a checkpoint takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.recipe import SyntheticData, load_recipe

EVERY = 5
STEPS = 40
RECIPES = tuple(
    f"recipes/{name}.yaml" for name in ("smoke", "glyphs-maml", "stdlib-lora", "sinusoid-maml", "faces-arm")
)
BUILT_IN = {"glyphs-maml": "glyphs", "smoke": "glyphs", "stdlib-lora": "stdlib", "faces-arm": "glyph-faces"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the recipes that are named, and prints a row for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    recipes: Sequence[str] = parser.parse_args(argv).recipes
    print(f"{'recipe':<16}{'state':>10}{'step':>10}{'waits':>11}{'interval':>12}{'share':>9}")
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
        "validation.every_steps=null",
        "validation.early_stopping=null",
        "tracking=none",
    ]
    if recipe.pretrain is not None:
        words += ["pretrain.num_steps=2", "pretrain.warmup_steps=1"]
    if recipe.outer.schedule.warmup_steps:
        words.append("outer.schedule.warmup_steps=1")
    if not isinstance(recipe.data, SyntheticData):
        data = folder / BUILT_IN[name]
        if not data.exists():
            _metaloom("data", "make", BUILT_IN[name], data)
        words.append(f"data.url={data}")
    _metaloom("train", path, *words, "--run", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"] > 0]
    gaps = {
        record["step"]: record["time_s"] - before["time_s"]
        for before, record in itertools.pairwise(steps)
        if "checkpoint_wait_s" not in record
    }
    step_s = statistics.median(gaps.values())
    # The first checkpoint makes the group of processes too, which is not done again.
    waits_s = statistics.median([r["checkpoint_wait_s"] for r in steps if "checkpoint_wait_s" in r][1:])
    settings = recipe.checkpoint
    intervals = [60.0 * settings.every_minutes] if settings.every_minutes is not None else []
    intervals += [settings.every_steps * step_s] if settings.every_steps is not None else []
    interval_s = min(intervals)
    catalogue = Catalogue(run / "checkpoints" / "meta")
    state = catalogue.manifest(catalogue.steps()[-1]).num_bytes / 2**20
    share = waits_s / (waits_s + interval_s)
    return (
        f"{name:<16}{state:>6.2f} MiB{step_s:>8.3f} s{1e3 * waits_s:>8.2f} ms{interval_s:>10.1f} s"
        f"{100 * share:>7.3f} %"
    )


def _metaloom(*words: str | Path) -> None:
    command = [sys.executable, "-m", "metaloom.cli", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
