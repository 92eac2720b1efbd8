"""The whole graph of the unroll, differentiated once: the oracle."""

from __future__ import annotations

import torch

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    OnGradient,
    Tensors,
    finishing,
    gradient_of,
    meta_losses,
    not_finite,
    prefixed,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, leaf, leaves, unscaled


class Unrolled(Hypergradient):
    """Exact. Keeps the graph of all K inner steps: fastest where memory allows, as nothing is
    computed twice; peak memory grows by one step's graph per step. For long unrolls take
    `rematerialized` or `mixed_mode`.
    """

    name = "unrolled"

    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        theta = leaves(meta)
        scale = unroll.scales.tangent
        with torch.enable_grad():
            fast, state = unroll.start(theta, batch.num_tasks)
            # Fast weights that no meta-parameter starts must still be differentiated inside.
            fast = {name: value if value.requires_grad else leaf(value) for name, value in fast.items()}
            losses, metrics = meta_losses(unroll, theta, (fast, state), batch, 0)
            unroll.require_finite()
            gradient = gradient_of(
                [scale * losses.sum()],
                prefixed("theta/", theta) | prefixed("fast/", fast),
                on_gradient=finishing(on_final, lambda name, value: unscaled({name: value}, scale)[name]),
            )
        metrics["not_finite"] = not_finite(losses, unprefixed("fast/", gradient).values())
        return MetaGradient(unscaled(unprefixed("theta/", gradient), scale), losses.detach(), metrics)
