"""A run's result: the checkpoint that it is, and the parameters in it that are evaluated and taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.outer import COUNTED
from metaloom.errors import CheckpointError
from metaloom.recipe import Recipe
from metaloom.run_folder import RunFolder


def newest_result(store: CheckpointStore, folder: RunFolder, warn: Callable[[str], None]) -> Checkpoint:
    """The newest valid checkpoint of meta-training. Every rank must call.

    Args:
        warn: told of each checkpoint that was passed over.

    Raises:
        CheckpointError: there is none.
    """
    newest = store.load_newest(warn)
    if newest is None:
        raise CheckpointError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )
    return newest


def best_result(store: CheckpointStore, newest: Checkpoint) -> Checkpoint:
    """The checkpoint of the step with the lowest validation loss; the newest where nothing was validated."""
    best_step = newest.scalars["progress"]["best_step"]
    return newest if best_step in (None, newest.step) else store.load(best_step)


def stored_result(folder: RunFolder, step: int | None, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that is a run's result, its tensors whole, for one process.

    Args:
        step: another one, which is kept; None for the best that was validated, or the newest.
        warn: as in `newest_result`.

    Raises:
        CheckpointError: it is not there, or not valid.
    """
    store = CheckpointStore(folder.checkpoints("meta"))
    if step is None:
        return best_result(store, newest_result(store, folder, warn))
    steps = store.steps()
    if step not in steps:
        raise CheckpointError(
            f"{store.root} has no checkpoint of outer step {step}; it has those of "
            f"{', '.join(map(str, steps)) or 'none'} (checkpoint.keep_last says how many are kept)."
        )
    return store.load(step)


def stored_pretraining(folder: RunFolder, num_steps: int, warn: Callable[[str], None]) -> dict[str, Tensor]:
    """The whole weights that a run's pre-training has left after its last step, by name, for one process.

    Raises:
        CheckpointError: they are missing, or of an earlier step.
    """
    store = CheckpointStore(folder.checkpoints("pretrain"))
    newest = store.load_newest(warn)
    if newest is None or newest.step != num_steps:
        raise CheckpointError(
            f"{store.root} has no valid checkpoint of step {num_steps}, from which this run went on. Restore "
            "that folder."
        )
    return newest.under(f"meta/{BACKBONE}")


def result_parameters(
    recipe: Recipe, algorithm: Algorithm, tensors: Mapping[str, Tensor], hold: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What is evaluated and taken away, by name: the meta-parameters, their moving average where there is
    one, and what was counted beside them.

    Args:
        tensors: of a checkpoint of `OuterOptimizer`.
        hold: makes what this rank computes with of a stored tensor.
    """
    prefix = "meta/" if recipe.outer.ema is None else "average/"
    meta = {name: hold(tensors[prefix + name]) for name in algorithm.meta_parameters()}
    return meta | {name: hold(tensors[COUNTED + name]) for name in algorithm.tracked()}
