"""A run's result: the checkpoint that it is, and the parameters in it that are evaluated and taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from metaloom.checkpoints.manifest import DamagedError, Manifest
from metaloom.checkpoints.store import (
    Checkpoint,
    CheckpointStore,
    Rooms,
    from_rank_0,
    rooms_by,
    whole_tensor,
)
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.outer import COUNTED
from metaloom.errors import CheckpointError
from metaloom.keeping import checkpoint_root
from metaloom.recipe import Recipe
from metaloom.run_folder import RunFolder


def newest_result(
    store: CheckpointStore, folder: RunFolder, warn: Callable[[str], None], rooms: Rooms
) -> Checkpoint:
    """The newest valid checkpoint of meta-training. Every rank must call.

    Args:
        warn: told of each checkpoint that was passed over.
        rooms: where tensors are read to.

    Raises:
        CheckpointError: there is none.
    """
    newest = store.load_newest(warn, rooms)
    if newest is None:
        raise CheckpointError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )
    return newest


def best_result(
    store: CheckpointStore, newest: Checkpoint, warn: Callable[[str], None], rooms: Rooms
) -> Checkpoint:
    """The checkpoint of the step with the best validation; the newest where nothing was validated, or where
    that of the best step could not be written. Every rank must call; arguments are those of
    `newest_result`.

    Raises:
        CheckpointError: that of the best step is damaged, or cannot be read.
    """
    best_step = newest.scalars["progress"]["best_step"]
    if best_step in (None, newest.step):
        return newest
    if best_step not in from_rank_0(store.steps):
        warn(
            f"the checkpoint of outer step {best_step}, the best one, is not in {store.shown}: that of step "
            f"{newest.step} is taken"
        )
        return newest
    try:
        return store.load(best_step, rooms)
    except DamagedError as error:
        raise CheckpointError(
            f"{error} This is the checkpoint of the best step. Restore it, or remove its folder: then that "
            f"of step {newest.step}, the newest, is taken."
        ) from None


def stored_result(
    recipe: Recipe, folder: RunFolder, step: int | None, warn: Callable[[str], None]
) -> Checkpoint:
    """The checkpoint that is a run's result, with what is taken away of it alone, whole, for one process.

    Args:
        step: another one, which is kept; None for the best that was validated, or the newest.
        warn: as in `newest_result`.

    Raises:
        CheckpointError: it is not there, or not valid.
    """
    store = CheckpointStore(checkpoint_root(recipe, folder, "meta"))
    rooms = _only((_prefix(recipe), COUNTED))
    if step is None:
        return best_result(store, newest_result(store, folder, warn, rooms), warn, rooms)
    steps = store.steps()
    if step not in steps:
        raise CheckpointError(
            f"{store.shown} has no checkpoint of outer step {step}; it has those of "
            f"{', '.join(map(str, steps)) or 'none'} (the section checkpoint says which are kept)."
        )
    return store.load(step, rooms)


def stored_pretraining(
    recipe: Recipe, folder: RunFolder, num_steps: int, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """The whole weights that a run's pre-training has left after its last step, by name, for one process.

    Raises:
        CheckpointError: they are missing, or of an earlier step.
    """
    store = CheckpointStore(checkpoint_root(recipe, folder, "pretrain"))
    prefix = f"meta/{BACKBONE}"
    newest = store.load_newest(warn, _only((prefix,)))
    if newest is None or newest.step != num_steps:
        raise CheckpointError(
            f"{store.shown} has no valid checkpoint of step {num_steps}, from which this run went on. "
            "Restore that folder."
        )
    return newest.under(prefix)


def result_parameters(
    recipe: Recipe, algorithm: Algorithm, tensors: Mapping[str, Tensor], hold: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What is evaluated and taken away, by name: the meta-parameters, their moving average where there is
    one, and what was counted beside them.

    Args:
        tensors: of a checkpoint of `OuterOptimizer`.
        hold: makes what this rank computes with of a stored tensor.
    """
    prefix = _prefix(recipe)
    meta = {name: hold(tensors[prefix + name]) for name in algorithm.meta_parameters()}
    return meta | {name: hold(tensors[COUNTED + name]) for name in algorithm.tracked()}


def _prefix(recipe: Recipe) -> str:
    """What the names of the meta-parameters begin with in a checkpoint."""
    return "meta/" if recipe.outer.ema is None else "average/"


def _only(prefixes: tuple[str, ...]) -> Rooms:
    """Room for the tensors whose names begin so: the optimizer's states are not read."""
    whole = rooms_by(whole_tensor)

    def rooms(manifest: Manifest) -> dict[str, Tensor]:
        return {name: room for name, room in whole(manifest).items() if name.startswith(prefixes)}

    return rooms
