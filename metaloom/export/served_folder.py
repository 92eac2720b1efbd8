"""An MLflow model: the safetensors file with its card, and how MLflow is to ask about it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from metaloom.engine.precision import Precision
from metaloom.export.card import Card, write_card
from metaloom.export.formats import MLFLOW
from metaloom.export.plain import write as write_plain
from metaloom.export.trained import Trained
from metaloom.recipe import Recipe, TextInputs
from metaloom.recipe.tasks import shape_of, task_facts
from metaloom.tracking.mlflow_model import write_model

LOADING = ("import mlflow", "outputs = mlflow.pyfunc.load_model(FOLDER).predict(inputs)")
_NUM_EXAMPLES = 2


def write(trained: Trained, card: Card, folder: Path) -> None:
    """Writes the model with its card."""
    example = _example(trained.recipe)
    with tempfile.TemporaryDirectory(prefix="metaloom-export-") as data:
        own = Path(data) / "trained"
        own.mkdir()
        write_plain(trained, card, own)
        write_model(
            folder,
            own,
            loader="metaloom.export.served",
            example=example.numpy(),
            outputs=trained.outputs(example).numpy(),
            facts={"recipe": card.recipe.name, "step": str(card.step)},
        )
    write_card(card, folder, kind=MLFLOW, loading=LOADING)


def _example(recipe: Recipe) -> Tensor:
    """Inputs `[N, ...]` of the shape that the model is shown."""
    inputs = task_facts(recipe).inputs
    shape = (_NUM_EXAMPLES, *shape_of(inputs))
    if isinstance(inputs, TextInputs):
        return torch.zeros(shape, dtype=torch.int64)
    return torch.zeros(shape, dtype=Precision(recipe.precision.compute).storage_dtype)
