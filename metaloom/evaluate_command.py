"""`metaloom evaluate`: a run on tasks never seen, beside baselines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command, add_overrides
from metaloom.errors import LaunchError, RecipeError
from metaloom.run_folder import RunFolder
from metaloom.starting import alone, check_data, launch_job, standing_of, write_recipe

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom evaluate runs/glyphs-maml
  metaloom evaluate runs/glyphs-maml evaluation.num_episodes=2000
  metaloom evaluate runs/glyphs-maml 'evaluation.baselines=[random]' data.n_shot=5
"""
# What an evaluation's tasks of classes may differ in from those of training, and beside which baselines.
SHOTS = ("data.n_shot", "data.n_query")
UNTRAINED = ("random", "pretrained")


def add_evaluate_command(commands: Commands) -> None:
    """Adds the command to those of a parser."""
    evaluate = add_command(commands, "evaluate", "evaluate a run on tasks never seen", EXAMPLES)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    add_overrides(evaluate)
    evaluate.set_defaults(run_command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import differences, load_recipe

    folder = RunFolder(arguments.run)
    folder.require()
    old = load_recipe(folder.recipe)
    recipe = load_recipe(folder.recipe, arguments.overrides)
    free = ("evaluation.", "launcher.", "tracking.", "data.url", "outer.micro_batch")
    changed = [change.path for change in differences(old, recipe)]
    others = [path for path in changed if not path.startswith(free) and path not in SHOTS]
    if others:
        raise RecipeError(
            f"an evaluation has no use for another {', '.join(others)}. It takes keys of evaluation, "
            "launcher and tracking, data.url, data.n_shot and data.n_query, and outer.micro_batch."
        )
    trained = [name for name in recipe.baselines if name not in UNTRAINED]
    if trained and any(path in SHOTS for path in changed):
        raise RecipeError(
            f"evaluation.baselines: {', '.join(trained)}; had as much data or compute as meta-training, "
            "which is counted by data.n_shot and data.n_query; leave them out where these are others, for "
            "example evaluation.baselines=[random]."
        )
    check_data(recipe, of_run=folder)
    if recipe.checkpoint.url is None and not folder.checkpoints("meta").is_dir():
        raise LaunchError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )
    hosts = standing_of(recipe)
    with alone(folder, "evaluate", hosts) as lock:
        if lock.is_own:
            write_recipe(recipe, folder.evaluation_recipe)
        return launch_job("evaluate", recipe, folder, folder.evaluation_recipe, hosts, locks=[lock])
