"""An export of any format."""

from __future__ import annotations

import json
from pathlib import Path

from metaloom.export import huggingface, peft, plain, served_folder
from metaloom.export.card import CARD, Card
from metaloom.export.folder import new_folder
from metaloom.export.formats import HUGGINGFACE, MLFLOW, PEFT, WHAT
from metaloom.export.trained import Trained
from metaloom.tracking.console import Console


def write_export(
    trained: Trained, card: Card, folder: Path, name: str, *, merge: bool, replace: bool
) -> None:
    """Writes a folder in one of the formats, which was found fit for the recipe.

    Raises:
        CapabilityError: a LoRA initialisation cannot be merged into these weights.
        LaunchError: the folder is taken, or cannot be written.
    """
    with new_folder(folder, replace=replace) as partial:
        if name == PEFT:
            peft.write(trained, card, partial)
        elif name == HUGGINGFACE:
            huggingface.write(trained, card, partial, merge=merge)
        elif name == MLFLOW:
            served_folder.write(trained, card, partial)
        else:
            plain.write(trained, card, partial)


def tell(console: Console, card: Card, folder: Path, name: str) -> None:
    """Says what lies where."""
    average = ", moving average" if card.recipe.outer.ema is not None else ""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    of_task = "" if card.adapted is None else f", adapted to {card.adapted.task}"
    console.note(f"{WHAT[name]} of outer step {card.step}{average}{of_task}: {folder}")
    console.note(f"files: {', '.join(files)}")
    lines = json.loads((folder / CARD).read_text(encoding="utf-8"))["load"]
    shown = [line.replace("FOLDER", repr(str(folder))) for line in lines]
    console.note("\n  ".join(["to load it:", *shown]))
