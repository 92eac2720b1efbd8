"""What a folder of transformers says of a model beside its weights, taken along with them."""

from __future__ import annotations

from pathlib import Path

from metaloom.export.trained import Trained
from metaloom.files import replace_file
from metaloom.models.as_function import PREPROCESSING_FILE, AsFunction
from metaloom.recipe import HuggingFaceModel, Recipe

FOLDER = "backbone"
MODEL_CONFIG = "config.json"


def write_configuration(trained: Trained, source: HuggingFaceModel, folder: Path) -> None:
    """Writes the network's `config.json`, and how its images are normalised where that is said.

    Args:
        source: names the folder that it is from.
    """
    assert isinstance(trained.module, AsFunction)
    replace_file(folder / MODEL_CONFIG, trained.module.config.to_json_string())
    preprocessing = Path(source.hf, PREPROCESSING_FILE)
    if preprocessing.is_file():
        replace_file(folder / PREPROCESSING_FILE, preprocessing.read_bytes())


def configured_by(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe of a model whose configuration lies in a folder; where there is none there, as it is."""
    if not isinstance(recipe.model, HuggingFaceModel) or not (folder / MODEL_CONFIG).is_file():
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"hf": str(folder)})})
