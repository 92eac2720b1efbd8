"""The way from the adapted weights back to the initialisation."""

from __future__ import annotations

import dataclasses

import torch

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    OnGradient,
    Tensors,
    meta_losses,
    not_finite,
    weighted,
)
from metaloom.engine.hypergradients.endpoint import adapt_to_end, pull_back_start
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, leaves


@dataclasses.dataclass(frozen=True)
class Reptile(Hypergradient):
    """`phi_0 - phi_K`, summed over tasks, in place of the gradient of the initialisation (Nichol et al.
    2018, "On First-Order Meta-Learning Algorithms", algorithm 2).

    Not a gradient of the meta-loss, and not divided by the inner rate: an outer step of plain gradient
    descent with rate 1 sets the initialisation to the mean of the adapted weights. It comes from support
    data alone; query losses are computed for the metrics. Gives nothing but the initialisation. Memory
    and time are those of adaptation itself, whatever K.
    """

    name = "reptile"

    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        theta = leaves(meta)
        path = adapt_to_end(unroll, meta, batch)
        with torch.no_grad():
            losses, metrics = meta_losses(unroll, theta, (path.end, {}), batch, unroll.num_steps)
        unroll.require_finite()
        way_back = {name: value - path.end[name] for name, value in path.start.items()}
        if batch.weights is not None:
            way_back = {name: weighted(batch.weights, value) for name, value in way_back.items()}
        gradient = pull_back_start(unroll, theta, batch.num_tasks, way_back)
        metrics["not_finite"] = not_finite(losses, way_back.values())
        return MetaGradient(gradient, losses, metrics)
