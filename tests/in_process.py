"""Training and evaluation as a worker does them, in the process of the tests: quicker than by commands."""

from __future__ import annotations

from pathlib import Path

import torch

from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import Recipe, dump_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train


def trained(recipe: Recipe, folder: Path) -> Path:
    """The folder of a run that is trained to its end, from its newest checkpoint where it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    train(recipe, _place(folder))
    return folder


def trained_and_evaluated(recipe: Recipe, folder: Path) -> Path:
    """The folder of a run; a process group has to be there."""
    trained(recipe, folder)
    evaluate(recipe, _place(folder))
    return folder


def _place(folder: Path) -> Place:
    return Place(RunFolder(folder), torch.device("cpu"), None, Shutdown())
