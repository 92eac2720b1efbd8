"""Adapts a run's result to a new task: a table, and the adapted weights in a folder."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from metaloom.build import task_batch
from metaloom.errors import MetaloomError
from metaloom.export.card import Adapted, card_of_run
from metaloom.export.trained import result_of_run
from metaloom.export.writing import tell, write_export
from metaloom.new_task.adapted import adapted
from metaloom.new_task.rehearsal import rehearsing, without_rehearsal
from metaloom.new_task.request import Request
from metaloom.new_task.table import before_and_after
from metaloom.new_task.task import read_task
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.tracking.console import Console, make_console


def main(request_json: str) -> int:
    """Does what a `Request` in JSON asks for; returns the exit code."""
    try:
        adapt(Request.from_json(request_json), make_console())
    except MetaloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def adapt(request: Request, console: Console) -> None:
    """Adapts, tells how well, and writes the adapted weights.

    Raises:
        MetaloomError: the task cannot be used, or nothing can be written.
    """
    folder, output = RunFolder(Path(request.run)), Path(request.output)
    of_run = load_recipe(folder.recipe)
    torch.set_num_threads(of_run.launcher.threads_per_process)
    recipe = of_run if request.rehearses else without_rehearsal(of_run)
    task = read_task(recipe, request.files)
    num_steps = request.num_steps or recipe.evaluation_num_steps
    episode = rehearsing(recipe, task.episode, num_steps=num_steps)
    trained = result_of_run(folder, recipe, request.step, console.warn)
    batch = task_batch(recipe, [episode], torch.device("cpu"), num_steps=num_steps)
    with console.phase("adapt", total=num_steps, unit="step") as phase:
        outcome = adapted(trained, batch, num_steps=num_steps, on_step=lambda: phase.advance(1))
    for note in task.notes:
        console.note(note)
    parts = {"support": batch.support, "query": batch.query, "retention": batch.retention}
    sizes = {part: data["targets"].shape[1] for part, data in parts.items() if data is not None}
    steps = f"{num_steps} inner step{'' if num_steps == 1 else 's'}"
    title = f"{request.files.name}, before and after {steps} from outer step {trained.step}"
    console.table(title, *before_and_after(recipe, outcome.measures, sizes))
    # Where the head starts is another matter now.
    written = of_run.model_copy(update={"adaptation": outcome.trained.recipe.adaptation})
    told = Adapted(request.files.name, num_steps, task.classes, outcome.measures)
    card = dataclasses.replace(card_of_run(folder, written, trained.step), adapted=told)
    write_export(outcome.trained, card, output, request.format, merge=request.merge, replace=request.replace)
    tell(console, card, output, request.format)
