"""Runs what is listed in `experiments.yaml` and not stored yet, and writes the table of docs/algorithms.md.

    python -m benchmarks.reproduce                          # everything: hours
    python -m benchmarks.reproduce --only sinusoid-10-shot  # one experiment, and its table alone
    python -m benchmarks.reproduce --table                  # runs nothing
    python -m benchmarks.reproduce --again --only pcgrad    # also what is stored

What is stored stays when the list or the code changes: `--again` runs it anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.reproduce.drawing import draw
from benchmarks.reproduce.experiments import Experiment, read_experiments
from benchmarks.reproduce.running import ROOT, read_results, run, store
from benchmarks.reproduce.table import as_markdown, write_into

PAGE = ROOT / "docs" / "algorithms.md"
FIGURES = ROOT / "docs" / "images"


def main() -> int:
    """Runs, stores and prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="names of experiments")
    parser.add_argument("--training", nargs="+", metavar="NAME", help="names of trainings in them")
    parser.add_argument("--again", action="store_true", help="run also what is stored")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reproduce", help="folder of the runs")
    arguments = parser.parse_args()
    experiments = read_experiments()
    names = [experiment.name for experiment in experiments]
    unknown = sorted(set(arguments.only or ()) - set(names))
    if unknown:
        print(f"error: no experiment {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    chosen = [each for each in experiments if arguments.only is None or each.name in arguments.only]
    if not arguments.table:
        for experiment in chosen:
            _run_all(experiment, arguments.training, arguments.runs, again=arguments.again)
    for experiment in chosen:
        print(as_markdown(experiment, read_results(experiment)))
    for experiment in experiments:
        draw(experiment, read_results(experiment), FIGURES)
    write_into(PAGE, [as_markdown(each, read_results(each)) for each in experiments])
    return 0


def _run_all(experiment: Experiment, only: list[str] | None, runs: Path, *, again: bool) -> None:
    stored = {(result.training, result.seed) for result in read_results(experiment)}
    for training in experiment.trainings:
        if only is not None and training.name not in only:
            continue
        for seed in training.seeds:
            if again or (training.name, seed) not in stored:
                store(experiment, run(experiment, training, seed, runs.resolve()))


if __name__ == "__main__":
    sys.exit(main())
