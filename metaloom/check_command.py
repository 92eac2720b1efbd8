"""`metaloom check`: a recipe's hypergradient beside the whole graph and differences."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command, add_overrides
from metaloom.errors import RecipeError
from metaloom.run_folder import RunFolder
from metaloom.starting import check_data, launch_job, standing_of, write_recipe

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom check recipes/glyphs-maml.yaml
  metaloom check recipes/stdlib-lora.yaml data.num_query=1 model.num_layers=1    a smaller batch and model
  metaloom check recipes/stdlib-lora.yaml algorithm.hypergradient=mixed_mode
  metaloom check recipes/glyphs-maml.yaml --full

The hypergradient on the recipe's model and two tasks, in float64, is compared with that of the whole graph
and with differences of the meta-loss, and tasks are checked not to reach into each other: a table, and exit
code 2 if terms are lost. For values and data alone, in a moment: metaloom recipe check
"""
CHECKED_STEPS = 3


def add_check_command(commands: Commands) -> None:
    """Adds the command to those of a parser."""
    check = add_command(
        commands, "check", "check a recipe's hypergradient on its own model and data", EXAMPLES
    )
    check.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    add_overrides(check)
    check.add_argument(
        "--full",
        action="store_true",
        help=f"all of the recipe's inner steps (default: at most {CHECKED_STEPS})",
    )
    check.set_defaults(run_command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_data(recipe)
    num_steps = recipe.adaptation.num_steps
    if num_steps > CHECKED_STEPS and not arguments.full:
        shorter = [*arguments.overrides, f"adaptation.num_steps={CHECKED_STEPS}"]
        try:
            recipe = load_recipe(arguments.recipe, shorter)
        except RecipeError:
            print(f"with all {num_steps} inner steps: the recipe does not hold together with fewer")
        else:
            print(f"with {CHECKED_STEPS} of {num_steps} inner steps (--full takes all)")
    # One process, which is not started again: whatever it meets is a finding.
    alone = recipe.launcher.model_copy(update={"num_processes": 1, "max_restarts": 0, "hosts": None})
    recipe = recipe.model_copy(update={"launcher": alone})
    # Nothing is kept but, of a crash, the traceback that its message points to.
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="metaloom-check-")))
    write_recipe(recipe, folder.recipe)
    code = 1
    try:
        code = launch_job("check", recipe, folder, folder.recipe, standing_of(recipe))
    finally:
        if code != 1:
            shutil.rmtree(folder.path, ignore_errors=True)
    return code
