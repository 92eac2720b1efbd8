"""Training and evaluation as a worker does them, in the process of the tests: quicker than by commands."""

from __future__ import annotations

from pathlib import Path

import torch

from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import Recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train


def trained_and_evaluated(recipe: Recipe, folder: Path) -> Path:
    """The folder of a run; a process group has to be there."""
    place = Place(RunFolder(folder), torch.device("cpu"), None, Shutdown())
    place.folder.create()
    train(recipe, place)
    evaluate(recipe, place)
    return place.folder.path
