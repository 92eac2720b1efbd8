"""What a checkpoint is worth to a recipe that computes something else since then, as a user has insisted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from metaloom.checkpoints.store import Checkpoint
from metaloom.recipe import Recipe, plain_recipe

# What validations depend on besides what is trained: with others, the best so far cannot be compared.
MEASURED_BY = (
    "validation.best_by",
    "validation.num_episodes",
    "seed",
    "adaptation.num_steps",
    "outer.ema",
    "data",
)


def fitted(
    checkpoint: Checkpoint, recipe: Recipe, *, data_digest: str | None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of a run, as its recipe can go on from it: what belongs to parts that were exchanged is
    left out, and they begin anew. And a line for each of these. That it is of the same model is checked
    before.

    Args:
        data_digest: of the data that the run goes on with, where that is known.
    """
    origin = checkpoint.scalars["origin"]
    was, now = dict(_leaves(origin["recipe"])), dict(_leaves(plain_recipe(recipe)))
    changed = {path for path, value in was.items() if path in now and now[path] != value}
    tensors, scalars = dict(checkpoint.tensors), dict(checkpoint.scalars)
    told: list[str] = []

    def without(prefix: str) -> dict[str, Any]:
        return {name: value for name, value in tensors.items() if not name.startswith(prefix)}

    path = "outer.optimizer.kind"
    if path in changed:
        kept = without("optimizer/")
        states = sorted({name.rpartition("/")[2] for name in tensors if name not in kept})
        tensors = kept
        told.append(
            f"{path}: {now[path]}; begins without states, since those in the checkpoint are of {was[path]}: "
            f"{', '.join(states) or 'none'}"
        )
    path = "outer.combiner.kind"
    if path in changed:
        scalars["combiner"] = None
        told.append(f"{path}: {now[path]}; begins anew, since the checkpoint has the state of {was[path]}")
    if recipe.precision.compute == "float16" and not scalars["scaler"]:
        told.append("precision.compute: float16; its scales begin anew, since the checkpoint has none")
    averages = [name for name in tensors if name.startswith("average/")]
    if recipe.outer.ema is None and averages:
        tensors = without("average/")
        told.append("outer.ema: null; the moving average in the checkpoint is left out")
    elif recipe.outer.ema is not None and not averages:
        meta = checkpoint.under("meta/")
        tensors |= {f"average/{name}": value for name, value in meta.items()}
        told.append("outer.ema: the moving average begins with the parameters in the checkpoint")
    measured = sorted(path for path in changed if _is_measured_by(path))
    if data_digest is not None and origin["data_digest"] != data_digest:
        measured.append("the data")
    best_step = scalars["progress"]["best_step"]
    if measured and best_step is not None:
        scalars["progress"] = None
        told.append(
            f"{', '.join(measured)}: changed; validations are compared anew, so that the best one so far, of "
            f"outer step {best_step}, counts no more"
        )
    return dataclasses.replace(checkpoint, tensors=tensors, scalars=scalars), told


def _is_measured_by(path: str) -> bool:
    """Whether validations before and after a change cannot be compared; that data lie elsewhere is none."""
    within = any(path == section or path.startswith(f"{section}.") for section in MEASURED_BY)
    return within and not path.endswith(".url")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each under its dotted path. A recipe of another version may
    lack some, and have others."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for row, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{row}")
    else:
        yield path, value
