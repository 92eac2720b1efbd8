"""A safetensors file of all that is evaluated, with its card.

Names are those of the run: `init.*` (where adaptation starts), `backbone.*` (weights that tasks share),
`rates.*` and so on; and `model.*`, weights of the network that were not meta-learned, without which it could
not be run.
"""

from __future__ import annotations

from pathlib import Path

from metaloom.engine.adapters.base import BACKBONE, INIT
from metaloom.export.card import Card, read_card, write_card
from metaloom.export.configuration import FOLDER as CONFIGURATION
from metaloom.export.configuration import configured_by, write_configuration
from metaloom.export.formats import SAFETENSORS
from metaloom.export.tensors import MODEL_FILE, read_tensors, write_tensors
from metaloom.export.trained import MODEL, Trained, rebuilt
from metaloom.recipe import HuggingFaceModel

LOADING = (
    "from metaloom.export import load",
    "trained = load(FOLDER)",
    "outputs = trained.outputs(inputs)",
)


def write(trained: Trained, card: Card, folder: Path) -> None:
    """Writes `model.safetensors` and `card.json`; of a model of transformers also its configuration."""
    others = {
        MODEL + name: value
        for name, value in trained.weights().items()
        if BACKBONE + name not in trained.meta and INIT + name not in trained.meta
    }
    write_tensors(folder / MODEL_FILE, trained.meta | others)
    if isinstance(card.recipe.model, HuggingFaceModel):
        (folder / CONFIGURATION).mkdir()
        write_configuration(trained, card.recipe.model, folder / CONFIGURATION)
    write_card(card, folder, kind=SAFETENSORS, loading=LOADING)


def read(folder: Path) -> Trained:
    """What `write` has written.

    Raises:
        CheckpointError: it is missing, or cannot be read.
    """
    card = read_card(folder, kind=SAFETENSORS)
    tensors = read_tensors(folder / MODEL_FILE)
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    meta = {name: value for name, value in tensors.items() if not name.startswith(MODEL)}
    num_steps = 0 if card.adapted is None else card.adapted.num_steps
    recipe = configured_by(folder / CONFIGURATION, card.recipe)
    return rebuilt(recipe, card.step, weights, meta, num_steps=num_steps)
