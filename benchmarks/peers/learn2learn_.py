"""learn2learn (Arnold et al. 2020): a clone of the module per task, adapted by `MAML.adapt`."""

from __future__ import annotations

import importlib.util
import sys
import types

from benchmarks.peers.base import Prepared
from benchmarks.peers.torch_task import loss, torch_problem
from benchmarks.workloads import Array, Problem


def prepare(problem: Problem, variant: str) -> Prepared:
    """There is one variant: the whole graph of the unroll."""
    _skip_init("learn2learn")
    _skip_init("learn2learn.algorithms")
    from learn2learn.algorithms.maml import MAML

    torch_side = torch_problem(problem)
    maml = MAML(torch_side.module, lr=torch_side.rate)

    def hypergradient() -> dict[str, Array]:
        torch_side.clear()
        for task in torch_side.tasks:
            learner = maml.clone()
            for _ in range(torch_side.num_steps):
                learner.adapt(loss(learner, task.support))
            loss(learner, task.query).backward()  # type: ignore[no-untyped-call]
        return torch_side.gradients()

    return Prepared(torch_side.forward, hypergradient)


def _skip_init(package: str) -> None:
    """Makes a package's modules importable without what its `__init__` imports: torchvision, gym and
    others that the algorithm does not use, some of them without a release for today's numpy."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = module
