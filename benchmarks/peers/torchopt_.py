"""TorchOpt (Ren et al. 2023): `MetaSGD` on the module itself, whose state is put back after each task."""

from __future__ import annotations

import torchopt

from benchmarks.peers.base import Prepared
from benchmarks.peers.torch_task import loss, torch_problem
from benchmarks.workloads import Array, Problem


def prepare(problem: Problem, variant: str) -> Prepared:
    """There is one variant: the whole graph of the unroll."""
    torch_side = torch_problem(problem)
    module = torch_side.module

    def hypergradient() -> dict[str, Array]:
        torch_side.clear()
        optimizer = torchopt.MetaSGD(module, lr=torch_side.rate)
        module_state = torchopt.extract_state_dict(module, by="reference")
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        for task in torch_side.tasks:
            for _ in range(torch_side.num_steps):
                optimizer.step(loss(module, task.support))
            loss(module, task.query).backward()  # type: ignore[no-untyped-call]
            torchopt.recover_state_dict(module, module_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        return torch_side.gradients()

    return Prepared(torch_side.forward, hypergradient)
