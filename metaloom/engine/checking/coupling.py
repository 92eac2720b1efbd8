"""Whether one task reaches the loss of another, or padding that of its task.

The engine takes the gradient of the summed losses for the stack of the tasks' own, which is wrong where one
task's data or fast weights do. Shape letters: T tasks, N examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaloom.engine.checking.vectors import away_from_symmetry, relative_error
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, first_snapshot, leaves

Tensors = Mapping[str, Tensor]

# The same kernels on the same numbers; libraries may split a product of other values otherwise.
COUPLING_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Another task has moved when one was changed.

    Attributes:
        changed: position of the task whose data and fast weights were changed.
        moved: position of the other task that moved most.
        quantity: the first that moved: `inner loss`, `inner gradient`, `inner step`, `query loss` or
            `query gradient`.
        movement: relative to the quantity's norm.
    """

    changed: int
    moved: int
    quantity: str
    movement: float


@dataclasses.dataclass(frozen=True)
class Leak:
    """A task has moved when examples of weight 0 were changed.

    Attributes:
        moved: position of the task that moved most.
        quantity: the first that moved, as in `Coupling`.
        movement: relative to the quantity's norm.
    """

    moved: int
    quantity: str
    movement: float


def padding_leak(unroll: Unroll, meta: Tensors, batch: TaskBatch, *, seed: int) -> Leak | None:
    """What moves when padded examples get the inputs of real ones; None where nothing does."""
    fast = away_from_symmetry(first_snapshot(unroll, meta, batch.num_tasks).fast, seed=seed)
    before = _task_quantities(unroll, meta, fast, batch)
    after = _task_quantities(unroll, meta, fast, _with_filled_padding(batch))
    for quantity, values in before.items():
        movements = _movements(values, after[quantity])
        moved = max(range(len(movements)), key=lambda position: movements[position])
        if movements[moved] > COUPLING_TOLERANCE:
            return Leak(moved, quantity, movements[moved])
    return None


def coupled_tasks(unroll: Unroll, meta: Tensors, batch: TaskBatch, *, seed: int) -> tuple[Coupling, ...]:
    """What moves in other tasks when one task's data and fast weights change; empty where nothing does.

    A task gets all the data of the next one, weights of examples and number of classes included, and other
    fast weights; then the losses, gradients and first inner step of the others are compared.
    """
    fast = away_from_symmetry(first_snapshot(unroll, meta, batch.num_tasks).fast, seed=seed)
    others = away_from_symmetry(fast, seed=seed + 1)
    before = _task_quantities(unroll, meta, fast, batch)
    found = []
    for task in range(batch.num_tasks if batch.num_tasks > 1 else 0):
        changed = {name: _with_row(value, others[name], task, task) for name, value in fast.items()}
        after = _task_quantities(unroll, meta, changed, _with_next_data(batch, task))
        for quantity, values in before.items():
            movements = _movements(values, after[quantity])
            movements[task] = 0.0
            moved = max(range(len(movements)), key=lambda position: movements[position])
            if movements[moved] > COUPLING_TOLERANCE:
                found.append(Coupling(task, moved, quantity, movements[moved]))
                break
    return tuple(found)


def _task_quantities(
    unroll: Unroll, meta: Tensors, fast: Tensors, batch: TaskBatch
) -> dict[str, list[Tensor]]:
    """Losses, gradients and the first inner step: tensors `[T, ...]` by quantity, what comes first first."""
    at = leaves(fast)
    with torch.enable_grad():
        losses, _ = unroll.learner.losses("support", meta, at, batch, 0)
        grads = torch.autograd.grad(losses.sum(), list(at.values()), materialize_grads=True)
    with torch.no_grad():
        named = dict(zip(fast, grads, strict=True))
        stepped, _ = unroll.update(meta, fast, unroll.rule.init_state(fast), named, 0)
    after = leaves(stepped)
    with torch.enable_grad():
        query, _ = unroll.learner.losses("outer", meta, after, batch, 0)
        query_grads = torch.autograd.grad(query.sum(), list(after.values()), materialize_grads=True)
    return {
        "inner loss": [losses.detach()],
        "inner gradient": list(grads),
        "inner step": list(stepped.values()),
        "query loss": [query.detach()],
        "query gradient": list(query_grads),
    }


def _movements(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """How far each task has moved, relative to its own norm over all tensors `[T, ...]`."""
    movements = []
    for task in range(before[0].shape[0]):
        old = [value[task] for value in before]
        movements.append(relative_error([value[task] for value in after], old, 0.0))
    return movements


def _with_next_data(batch: TaskBatch, task: int) -> TaskBatch:
    """The batch with one task's data replaced by that of the next; its number, and so its draws, stay."""
    following = (task + 1) % batch.num_tasks
    changed = batch.mapped(lambda tensor: _with_row(tensor, tensor, task, following))
    return dataclasses.replace(changed, weights=batch.weights)


def _with_filled_padding(batch: TaskBatch) -> TaskBatch:
    """The batch with the inputs of a task's first example in place of those of examples of weight 0."""

    def filled(part: Tensors) -> dict[str, Tensor]:
        if "weights" not in part:
            return dict(part)
        inputs, weights = part["inputs"], part["weights"]
        is_padding = (weights == 0).view(*weights.shape, *(1,) * (inputs.ndim - 2))
        return {**part, "inputs": torch.where(is_padding, inputs[:, :1], inputs)}

    return dataclasses.replace(
        batch,
        support=filled(batch.support),
        query=filled(batch.query),
        rehearsal=None if batch.rehearsal is None else filled(batch.rehearsal),
        outer_rehearsal=None if batch.outer_rehearsal is None else filled(batch.outer_rehearsal),
    )


def _with_row(tensor: Tensor, source: Tensor, row: int, source_row: int) -> Tensor:
    """A copy of the tensor with one row from another."""
    copy = tensor.clone()
    copy[row] = source[source_row]
    return copy
