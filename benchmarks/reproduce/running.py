"""Trains and evaluates by the command line, and keeps what comes of it with the commands."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.reproduce.experiments import HERE, Experiment, Training

RESULTS = HERE / "results"
ROOT = HERE.parent.parent


@dataclasses.dataclass(frozen=True)
class Result:
    """One training with one seed.

    Attributes:
        training: its name.
        seed: of the recipe.
        commands: what was run, from the root of the repository.
        revision: of the repository.
        date: when, in UTC.
        seconds: training and evaluation together.
        methods: those of the evaluation, as `evaluation.json` has them.
    """

    training: str
    seed: int
    commands: tuple[str, ...]
    revision: str
    date: str
    seconds: float
    methods: tuple[dict[str, Any], ...]


def read_results(experiment: Experiment, folder: Path = RESULTS) -> list[Result]:
    """What is stored of an experiment; nothing where it was never run."""
    path = folder / f"{experiment.name}.json"
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [
        Result(**values | {"commands": tuple(values["commands"]), "methods": tuple(values["methods"])})
        for values in stored
    ]


def store(experiment: Experiment, result: Result, folder: Path = RESULTS) -> None:
    """Puts a result in the place of an older one of the same training and seed."""
    results = {(old.training, old.seed): old for old in read_results(experiment, folder)}
    results[result.training, result.seed] = result
    order = {training.name: position for position, training in enumerate(experiment.trainings)}
    ordered = sorted(results.values(), key=lambda each: (order.get(each.training, len(order)), each.seed))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([dataclasses.asdict(each) for each in ordered], indent=1)
    (folder / f"{experiment.name}.json").write_text(text + "\n", encoding="utf-8")


def run(experiment: Experiment, training: Training, seed: int, runs: Path) -> Result:
    """Trains and evaluates, in a new folder of `runs`.

    Raises:
        subprocess.CalledProcessError: a command fails.
    """
    if training.program is not None:
        return _run_program(training, training.program, seed)
    folder = runs / experiment.name / f"{training.name.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    train = ["train", training.recipe, *training.overrides, f"seed={seed}"]
    if experiment.data is not None:
        _make_data(experiment.data, runs)
        train.append(f"data.url={runs / 'data' / experiment.data}")
    started = time.monotonic()
    evaluate = ["evaluate", str(folder), *training.evaluated_with]
    for words in ([*train, "tracking=none", "--run", str(folder)], evaluate):
        _metaloom(*words)
    evaluated = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    shown_folder = f"runs/{folder.relative_to(runs)}"
    commands = [
        " ".join(["metaloom", *train, "--run", shown_folder]).replace(f"{runs}/data", "data"),
        " ".join(["metaloom evaluate", shown_folder, *training.evaluated_with]),
    ]
    return _result(training, seed, commands, started, evaluated["methods"])


def _run_program(training: Training, program: str, seed: int) -> Result:
    words = ["-m", program, "--seed", str(seed)]
    print("$ python", *words, flush=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], check=True, cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    return _result(training, seed, [" ".join(["python", *words])], started, json.loads(done.stdout))


def _result(
    training: Training, seed: int, commands: list[str], started: float, methods: list[dict[str, Any]]
) -> Result:
    return Result(
        training=training.name,
        seed=seed,
        commands=tuple(commands),
        revision=_revision(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        seconds=round(time.monotonic() - started, 1),
        methods=tuple(methods),
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _make_data(name: str, runs: Path) -> None:
    folder = runs / "data" / name
    if not folder.exists():
        _metaloom("data", "make", name, str(folder))


def _metaloom(*words: str) -> None:
    command = [sys.executable, "-m", "metaloom.cli", *words]
    print("$ metaloom", *words, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=_environment())


def _revision() -> str:
    """The commit; with a mark where more than results and their page differs from it."""
    changed = _git("status", "--porcelain", "--", ".", ":!docs", f":!{RESULTS.relative_to(ROOT)}")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], check=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
