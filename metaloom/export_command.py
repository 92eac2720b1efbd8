"""`metaloom export`: checked here, written by a process of its own, which has torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command
from metaloom.errors import LaunchError

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.recipe import Recipe
    from metaloom.run_folder import RunFolder

EXAMPLES = """\
examples:
  metaloom export runs/stdlib-lora                            a PEFT adapter, with its backbone
  metaloom export runs/stdlib-lora --format huggingface --merge
  metaloom export runs/glyphs-maml --step 400 --output step-400

What is written is of the outer step with the best validation, at which adaptation to a task starts; no
data are needed. The formats are peft, huggingface, safetensors and mlflow: docs/operations.md.
"""


def add_export_command(commands: Commands) -> None:
    """Declares `metaloom export`."""
    export = add_command(commands, "export", "write a run's result for use elsewhere", EXAMPLES)
    export.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    add_output(export, "RUN/export/FORMAT")
    export.set_defaults(run_command=_export)


def add_output(parser: argparse.ArgumentParser, place: str) -> None:
    """Declares what is written, and where to.

    Args:
        place: where it goes where nothing is said.
    """
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="peft, huggingface, safetensors or mlflow (default: peft where LoRA matrices are adapted, else "
        "safetensors)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder to write (default: {place})")
    parser.add_argument(
        "--step", type=int, metavar="N", help="outer step (default: the best that was validated, or the last)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="with huggingface: LoRA matrices go into the weights"
    )
    parser.add_argument("--replace", action="store_true", help="write over an export that is there")


# Imports stand inside the command, so that `metaloom --help` is quick.


def _export(arguments: argparse.Namespace) -> int:
    from metaloom.export.folder import require_free
    from metaloom.export.formats import default_format, require_format
    from metaloom.export.request import Request, default_output
    from metaloom.recipe import load_recipe
    from metaloom.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    folder.require()
    recipe = load_recipe(folder.recipe)
    name = arguments.format or default_format(recipe)
    require_format(recipe, name, merge=arguments.merge)
    require_trained(folder, recipe)
    output = arguments.output or default_output(folder.path, name, arguments.step)
    require_free(output, replace=arguments.replace)
    request = Request(
        run=str(folder.path),
        step=arguments.step,
        format=name,
        output=str(output),
        merge=arguments.merge,
        replace=arguments.replace,
    )
    return run_process("metaloom.export", json.dumps(dataclasses.asdict(request)))


def require_trained(folder: RunFolder, recipe: Recipe) -> None:
    """Passes where a run has been trained.

    Raises:
        LaunchError: it has no checkpoint.
    """
    if recipe.checkpoint.url is None and not folder.checkpoints("meta").is_dir():
        raise LaunchError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )


def run_process(module: str, *words: str) -> int:
    """Runs a module as a process; returns its exit code.

    Raises:
        LaunchError: a signal has ended it.
    """
    code = subprocess.run([sys.executable, "-m", module, *words]).returncode
    if code < 0:
        raise LaunchError(f"the process that does it was ended by signal {-code}; start it again.")
    return code
