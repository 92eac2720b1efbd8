"""How well tasks are solved after each adaptation step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, adapt


def adaptation_curve(
    unroll: Unroll, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int
) -> dict[str, Tensor]:
    """The query loss and accuracy of each task after 0 .. K adaptation steps.

    Returns:
        `loss` (nats) and `accuracy`, each `[T, K + 1]`, float64; with retention data also
        `retention_loss` `[T, 2]`, before and after: the rise is what was forgotten.
    """
    snapshots = adapt(unroll, meta, batch, num_steps=num_steps)
    constants = {name: value.detach() for name, value in meta.items()}
    curve: dict[str, Tensor] = {}
    with torch.no_grad():
        results = [unroll.learner.losses("query", constants, at.fast, batch, 0) for at in snapshots]
        curve["loss"] = torch.stack([losses.double() for losses, _ in results], dim=1)
        curve["accuracy"] = torch.stack([aux["accuracy"] for _, aux in results], dim=1)
        if batch.retention is not None:
            ends = [
                unroll.learner.losses("retention", constants, at.fast, batch, 0)[0]
                for at in (snapshots[0], snapshots[-1])
            ]
            curve["retention_loss"] = torch.stack([losses.double() for losses in ends], dim=1)
    return curve
