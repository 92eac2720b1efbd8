"""higher (Grefenstette et al. 2019): `innerloop_ctx` around a module and torch's own SGD."""

from __future__ import annotations

import higher
import torch

from benchmarks.peers.base import Prepared
from benchmarks.peers.torch_task import loss, torch_problem
from benchmarks.workloads import Array, Problem


def prepare(problem: Problem, variant: str) -> Prepared:
    """There is one variant: the whole graph of the unroll."""
    torch_side = torch_problem(problem)
    optimizer = torch.optim.SGD(torch_side.module.parameters(), lr=torch_side.rate)

    def hypergradient() -> dict[str, Array]:
        torch_side.clear()
        for task in torch_side.tasks:
            context = higher.innerloop_ctx(torch_side.module, optimizer, copy_initial_weights=False)
            with context as (functional, differentiable):
                for _ in range(torch_side.num_steps):
                    differentiable.step(loss(functional, task.support))
                loss(functional, task.query).backward()  # type: ignore[no-untyped-call]
        return torch_side.gradients()

    return Prepared(torch_side.forward, hypergradient)
