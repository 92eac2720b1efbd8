"""How well tasks are solved after each adaptation step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, adapt, constants


class Curve(Protocol):
    """The losses and scores of tasks over their adaptation: see `Algorithm.curve`."""

    def __call__(
        self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int
    ) -> dict[str, Tensor]: ...


def adaptation_curve(
    unroll: Unroll, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int
) -> dict[str, Tensor]:
    """The query loss and scores of each task after 0 .. K adaptation steps.

    Returns:
        `loss` and the learner's scores (`accuracy`, where tasks classify), each `[T, K + 1]`, float64; with
        retention data also `retention_loss` `[T, 2]`, before and after: the rise is what was forgotten.
    """
    fixed = constants(meta)
    points: dict[str, list[Tensor]] = {"loss": []}
    for step, at in enumerate(adapt(unroll, meta, batch, num_steps=num_steps)):
        with torch.no_grad():
            losses, scores = unroll.learner.losses("query", fixed, at.fast, batch, step)
            points["loss"].append(losses.double())
            for name, values in scores.items():
                points.setdefault(name, []).append(values)
            if batch.retention is not None and step in (0, num_steps):
                retained, _ = unroll.learner.losses("retention", fixed, at.fast, batch, step)
                points.setdefault("retention_loss", []).append(retained.double())
    return {name: torch.stack(values, dim=1) for name, values in points.items()}
