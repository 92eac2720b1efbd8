"""`card.json`: what an export is of, and how it is loaded. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import metaloom
from metaloom.errors import CheckpointError
from metaloom.files import replace_file
from metaloom.recipe import Recipe, recipe_from_dict
from metaloom.run_folder import RunFolder
from metaloom.tracking import METRICS_FILE, mask_secrets, read_metrics

CARD = "card.json"
FORMAT, VERSION = "metaloom-export", 1
# Of the machine, not of the result.
_OF_THE_MACHINE = ("tasks_per_s", "tokens_per_s", "data_wait_share", "peak_memory_mib", "peak_gpu_memory_mib")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """To which task a result was adapted.

    Attributes:
        task: what the task's files are called.
        num_steps: inner steps that were taken.
        classes: the names of the classes by their numbers; none where there are none.
        measures: what was measured, before and after, by name.
    """

    task: str
    num_steps: int
    classes: tuple[str, ...] = ()
    measures: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Card:
    """What an export is of.

    Attributes:
        recipe: of the run.
        step: the outer step.
        metrics: that were logged at this step; NaN and infinities as text.
        data_digest: of the data that it was trained on; None where the run has none recorded.
        adapted: None for the result as it was meta-trained.
    """

    recipe: Recipe
    step: int
    metrics: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    data_digest: str | None = None
    adapted: Adapted | None = None


def card_of_run(folder: RunFolder, recipe: Recipe, step: int) -> Card:
    """The card of a run's result at a step."""
    metrics: dict[str, float | str] = {}
    if (folder.path / METRICS_FILE).is_file():
        for record in read_metrics(folder.path / METRICS_FILE):
            if record.step == step:
                metrics |= {name: _finite(value) for name, value in record.metrics.items()}
    kept = {name: value for name, value in metrics.items() if name not in _OF_THE_MACHINE}
    return Card(recipe, step, kept, folder.facts().get("data_digest"))


def write_card(card: Card, folder: Path, *, kind: str, loading: Sequence[str]) -> None:
    """Writes `card.json`.

    Args:
        kind: the format of the export.
        loading: the lines of Python that load it.
    """
    values = {
        "format": FORMAT,
        "version": VERSION,
        "metaloom": metaloom.__version__,
        "kind": kind,
        "name": card.recipe.name,
        "step": card.step,
        "parameters": "moving average" if card.recipe.outer.ema is not None else "of the step",
        "metrics": dict(card.metrics),
        "data_digest": card.data_digest,
        "adapted": None if card.adapted is None else dataclasses.asdict(card.adapted),
        "load": list(loading),
        "recipe": _without_secrets(card.recipe),
    }
    replace_file(folder / CARD, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_card(folder: Path, *, kind: str) -> Card:
    """What `write_card` has written.

    Raises:
        CheckpointError: there is none, or it is of another format or version.
    """
    path = folder / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no export of metaloom ({CARD} is missing).") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    found = values.get("format"), values.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: format {found[0]!r} version {found[1]!r} is not known; this release reads {FORMAT} "
            f"version {VERSION}."
        )
    if values["kind"] != kind:
        raise CheckpointError(
            f"{folder} is an export of format {values['kind']}, and {kind} is read here; its card says how "
            "it is loaded."
        )
    adapted = values["adapted"]
    if adapted is not None:
        measures = {name: (before, after) for name, (before, after) in adapted["measures"].items()}
        adapted = Adapted(adapted["task"], adapted["num_steps"], tuple(adapted["classes"]), measures)
    recipe = recipe_from_dict(values["recipe"], source=str(path))
    return Card(recipe, values["step"], values["metrics"], values["data_digest"], adapted)


def _without_secrets(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values, with what may be a secret blotted out, and without where it was tracked."""

    def masked(path: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: masked(f"{path}.{key}", inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [masked(path, inner) for inner in value]
        return mask_secrets({path: value})[path] if isinstance(value, str) else value

    values: dict[str, Any] = masked("", recipe.model_dump(mode="json"))
    return values | {"tracking": {"kind": "none"}}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
