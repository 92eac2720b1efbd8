"""metaloom: its engine without recipe, one micro-batch of all tasks."""

from __future__ import annotations

import torch

from benchmarks.peers.base import Prepared
from benchmarks.workloads import Array, Examples, Problem
from metaloom.engine.adapters.base import INIT, Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll


def unroll_of(problem: Problem) -> Unroll:
    """The problem as metaloom's engine sees it."""
    adapter: Adapter
    if problem.lora:
        rank = problem.workload.lora_rank
        assert rank is not None, "a problem has LoRA matrices where its workload has their rank"
        adapter = LoraAdapter(
            problem.model,
            targets=problem.lora_layers,
            rank=rank,
            alpha=rank * problem.lora_scale,
            generator=torch.Generator(),
        )
    else:
        adapter = FullAdapter(problem.model)
    rates = Rates(problem.workload.rate, "none", problem.num_steps)
    return Unroll(Learner(adapter, Precision()), Sgd(), rates, step_weights("last", problem.num_steps))


def prepare(problem: Problem, variant: str) -> Prepared:
    """`variant` is the name of an estimator."""
    unroll = unroll_of(problem)
    estimator = HYPERGRADIENTS[variant]()
    meta = unroll.learner.adapter.meta_parameters(init=True, backbone=problem.workload.learn_backbone)
    meta |= {INIT + name: torch.from_numpy(value) for name, value in problem.lora.items()}
    batch = TaskBatch(
        tuple(range(problem.workload.num_tasks)), _tensors(problem.support), _tensors(problem.query)
    )

    def forward() -> None:
        with torch.no_grad():
            unroll.learner.losses("query", meta, unroll.learner.init(meta, batch.num_tasks), batch, 0)

    def hypergradient() -> dict[str, Array]:
        gradient = estimator.meta_gradient(unroll, meta, batch).gradient
        return {name: value.numpy() for name, value in gradient.items()}

    return Prepared(forward, hypergradient)


def _tensors(examples: Examples) -> dict[str, torch.Tensor]:
    return {"inputs": torch.from_numpy(examples.inputs), "targets": torch.from_numpy(examples.targets)}
