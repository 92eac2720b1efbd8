"""Adaptation to a new task, with what it is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import adapt, constants
from metaloom.errors import MetaloomError
from metaloom.export.trained import Trained


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What adaptation has come to.

    Attributes:
        trained: what was adapted, at the adapted weights.
        measures: before and after, by `<part>_<measure>`: losses and scores of `support` and `query`, and
            `retention_loss` where there are rehearsal data.
    """

    trained: Trained
    measures: dict[str, tuple[float, float]]


def adapted(
    trained: Trained, batch: TaskBatch, *, num_steps: int, on_step: Callable[[], None] = lambda: None
) -> Outcome:
    """Adapts to the one task of a batch by the run's inner loop.

    Args:
        on_step: called after each step.

    Raises:
        MetaloomError: a loss is not finite after it.
    """
    assert trained.unroll is not None, "a run without inner steps was refused"
    points: list[dict[str, float]] = []
    for step, at in enumerate(adapt(trained.unroll, trained.meta, batch, num_steps=num_steps)):
        if step in (0, num_steps):
            points.append(_measured(trained, at.fast, batch, step))
        if step:
            on_step()
    before, after = points
    measures = {name: (before[name], after[name]) for name in before}
    if not all(math.isfinite(value) for value in after.values()):
        raise MetaloomError(
            f"the loss after {num_steps} inner steps is not finite, and nothing was written: take fewer "
            "(--steps), or see that the task's data are like those that the run was trained on."
        )
    fast = {name: value[0] for name, value in at.fast.items()}
    return Outcome(trained.moved(fast, num_steps=num_steps), measures)


def _measured(trained: Trained, fast: dict[str, Tensor], batch: TaskBatch, step: int) -> dict[str, float]:
    assert trained.unroll is not None
    learner, meta = trained.unroll.learner, constants(trained.meta)
    found: dict[str, float] = {}
    with torch.no_grad():
        for part, data in (("support", batch.support), ("query", batch.query)):
            judged = dataclasses.replace(batch, query=data)
            losses, scores = learner.losses("query", meta, fast, judged, step)
            found[f"{part}_loss"] = float(losses)
            found |= {f"{part}_{name}": float(value) for name, value in scores.items()}
        if batch.retention is not None:
            losses, _ = learner.losses("retention", meta, fast, batch, step)
            found["retention_loss"] = float(losses)
    return found
