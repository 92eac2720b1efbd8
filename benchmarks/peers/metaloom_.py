"""metaloom: its engine without recipe, one micro-batch of all tasks."""

from __future__ import annotations

import torch

from benchmarks.peers.base import Prepared
from benchmarks.workloads import WORKLOADS, Array, Examples, Problem
from metaloom.engine.adapters.base import INIT, Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.choice import EXACT_AND_FLAT, choose_estimator
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import Hypergradient, add_
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.snapshots import Binomial, KeepAll
from metaloom.engine.unroll import Unroll

NUM_SLOTS = 9
AUTO_LIMIT_BYTES = 2**30
BLOCKS = Structure(tuple(f"blocks.{block}" for block in range(4)), "head")


def unroll_of(problem: Problem, *, recompute_blocks: bool) -> Unroll:
    """The problem as metaloom's engine sees it."""
    adapter: Adapter
    structure = BLOCKS if recompute_blocks else None
    if problem.lora:
        rank = problem.workload.lora_rank
        assert rank is not None, "a problem has LoRA matrices where its workload has their rank"
        adapter = LoraAdapter(
            problem.model,
            targets=problem.lora_layers,
            rank=rank,
            alpha=rank * problem.lora_scale,
            generator=torch.Generator(),
            structure=structure,
        )
    else:
        adapter = FullAdapter(problem.model, structure=structure)
    rates = Rates(problem.workload.rate, "none", problem.num_steps)
    learner = Learner(adapter, Precision(), recompute_blocks=recompute_blocks)
    return Unroll(learner, Sgd(), rates, step_weights("last", problem.num_steps))


def prepare(problem: Problem, variant: str) -> Prepared:
    """`variant` is the name of an estimator, and after a comma what it keeps, or how tasks are taken."""
    name, _, option = variant.partition(", ")
    # The tiny problem has fewer blocks.
    unroll = unroll_of(problem, recompute_blocks=option == "blocks" and problem.workload.title in _WHOLE)
    meta = unroll.learner.adapter.meta_parameters(init=True, backbone=problem.workload.learn_backbone)
    meta |= {INIT + name: torch.from_numpy(value) for name, value in problem.lora.items()}
    batch = TaskBatch(
        tuple(range(problem.workload.num_tasks)), _tensors(problem.support), _tensors(problem.query)
    )
    parts = batch.split(1) if option == "task after task" else [batch]
    estimator = _estimator(name, option, unroll, meta, parts[0])

    def forward() -> None:
        with torch.no_grad():
            unroll.learner.losses("query", meta, unroll.learner.init(meta, batch.num_tasks), batch, 0)

    def hypergradient() -> dict[str, Array]:
        total: dict[str, torch.Tensor] = {}
        for part in parts:
            add_(total, estimator.meta_gradient(unroll, meta, part).gradient)
        return {name: value.numpy() for name, value in total.items()}

    return Prepared(forward, hypergradient)


_WHOLE = tuple(workload.title for name, workload in WORKLOADS.items() if not name.startswith("tiny"))


def _estimator(
    name: str, option: str, unroll: Unroll, meta: dict[str, torch.Tensor], batch: TaskBatch
) -> Hypergradient:
    if name == "auto":
        choice, _ = choose_estimator(
            unroll,
            meta,
            batch,
            memory_limit_bytes=AUTO_LIMIT_BYTES,
            sharding=Replicated(),
        )
        return choice.build(KeepAll())
    if option == "binomial":
        return EXACT_AND_FLAT[name](Binomial(NUM_SLOTS))
    return HYPERGRADIENTS[name]()


def _tensors(examples: Examples) -> dict[str, torch.Tensor]:
    return {"inputs": torch.from_numpy(examples.inputs), "targets": torch.from_numpy(examples.targets)}
