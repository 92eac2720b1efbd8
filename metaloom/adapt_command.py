"""`metaloom adapt`: checked here, the task's files too; done by a process of its own, which has torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command
from metaloom.errors import CapabilityError, RecipeError
from metaloom.export_command import add_output, require_trained, run_process

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom adapt runs/glyphs-maml my-letters                  my-letters/alpha/1.png: class alpha
  metaloom adapt runs/stdlib-lora module.py --steps 8         a text, for a language model
  metaloom adapt runs/reviews mine.jsonl --input text --target label
  metaloom adapt runs/reviews mine.jsonl --query judged.jsonl --format safetensors

A quarter of each class, or the end of a text, is held out to be judged on, unless the task has a part of its
own for that: TASK/support and TASK/query, or --query. Shapes of records: docs/packing.md.
"""


def add_adapt_command(commands: Commands) -> None:
    """Declares `metaloom adapt`."""
    adapt = add_command(commands, "adapt", "adapt a run's result to one new task", EXAMPLES)
    adapt.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    adapt.add_argument(
        "task",
        type=Path,
        metavar="TASK",
        help="a folder with a sub-folder of images for each class; CSV, TSV or JSONL records; or texts",
    )
    adapt.add_argument("--query", type=Path, metavar="PATH", help="what is judged on, of the same kind")
    adapt.add_argument(
        "--steps", type=int, metavar="K", help="inner steps (default: those of the run's evaluation)"
    )
    adapt.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="leave out what the recipe mixes into the inner loss, where its data are not at hand",
    )
    add_output(adapt, "RUN/adapted/TASK")
    records = adapt.add_argument_group("records")
    records.add_argument(
        "--input", action="append", metavar="COLUMN", help="what a model sees (default: input)"
    )
    records.add_argument(
        "--target", action="append", metavar="COLUMN", help="the label, or numbers (default: target)"
    )
    records.add_argument("--input-kind", metavar="KIND", help="as for metaloom data pack")
    records.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json that makes tokens of texts")
    adapt.set_defaults(run_command=_adapt)


# Imports stand inside the command, so that `metaloom --help` is quick.


def _adapt(arguments: argparse.Namespace) -> int:
    from metaloom.export.folder import require_free
    from metaloom.export.formats import default_format, require_format
    from metaloom.new_task.request import Request, TaskFiles
    from metaloom.new_task.task import read_task
    from metaloom.recipe import load_recipe
    from metaloom.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    folder.require()
    recipe = load_recipe(folder.recipe)
    if recipe.maml is None:
        raise CapabilityError(
            f"algorithm.kind: {recipe.algorithm.kind} adapts without inner steps, so that no adapted weights "
            "come of it: take its result by `metaloom export`, and a task's support data along with each "
            "query."
        )
    if arguments.steps is not None and arguments.steps < 1:
        raise RecipeError(f"--steps: {arguments.steps}; adaptation takes at least 1.")
    name = arguments.format or default_format(recipe)
    require_format(recipe, name, merge=arguments.merge)
    require_trained(folder, recipe)
    files = TaskFiles(
        task=str(arguments.task),
        query=None if arguments.query is None else str(arguments.query),
        inputs=tuple(arguments.input or ("input",)),
        targets=tuple(arguments.target or ("target",)),
        kind=arguments.input_kind,
        tokenizer=arguments.tokenizer,
    )
    read_task(recipe, files)
    output = arguments.output or folder.path / "adapted" / files.name
    require_free(output, replace=arguments.replace)
    request = Request(
        files=files,
        num_steps=arguments.steps,
        rehearses=not arguments.no_rehearsal,
        run=str(folder.path),
        step=arguments.step,
        format=name,
        output=str(output),
        merge=arguments.merge,
        replace=arguments.replace,
    )
    return run_process("metaloom.new_task", request.to_json())
