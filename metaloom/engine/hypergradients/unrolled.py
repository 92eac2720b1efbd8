"""The whole graph of the unroll, differentiated once: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    Tensors,
    gradient_of,
    query_losses,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, leaf, leaves


class Unrolled(Hypergradient):
    """Exact. Keeps the graph of all K inner steps: fastest where memory allows, as nothing is
    computed twice; peak memory grows by one step's graph per step. For long unrolls take
    `rematerialized` or `mixed_mode`.
    """

    name = "unrolled"

    def estimate(self, unroll: Unroll, meta: Tensors, batch: TaskBatch) -> MetaGradient:
        theta = leaves(meta)
        with torch.enable_grad():
            fast, state = unroll.start(theta, batch.num_tasks)
            # Fast weights that no meta-parameter starts must still be differentiated inside.
            fast = {n: value if value.requires_grad else leaf(value) for n, value in fast.items()}
            metrics: dict[str, Tensor] = {}
            if unroll.step_weights[0] == 0.0:
                with torch.no_grad():
                    metrics |= query_losses(unroll, theta, fast, batch, 0)[1]
            terms = []
            for step, weight in enumerate(unroll.step_weights):
                if step > 0:
                    fast, state = unroll.inner_step(theta, fast, state, batch, step - 1, create_graph=True)
                if weight != 0.0:
                    losses, at_step = query_losses(unroll, theta, fast, batch, step)
                    terms.append(weight * losses.double())
                    metrics |= at_step
            total = torch.stack(terms).sum(0)
            gradient = gradient_of([total.sum()], theta)
        return MetaGradient(gradient, total.detach(), metrics)
