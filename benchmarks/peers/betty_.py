"""Betty (Choe et al. 2023): one iterative problem per task below one problem that is learned.

As in Betty's own example of MAML, all tasks are adapted before the upper problem's backward pass, so the
graphs of all tasks are alive at once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import IterativeProblem
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.base import Prepared
from benchmarks.peers.torch_task import Task, TorchProblem, torch_problem, twice_differentiable
from benchmarks.workloads import Array, Problem


class _Outer(IterativeProblem):  # type: ignore[misc]
    """Learns where the tasks start. Its optimizer's step keeps the gradient and moves nothing."""

    torch_side: TorchProblem
    gradient: dict[str, Array]

    def forward(self) -> Any:
        return self.params, self.buffers

    def trainable_parameters(self) -> tuple[Tensor, ...]:
        return (*self.params, *self.torch_side.backbone.values())

    def training_step(self, batch: object) -> Tensor:
        terms = [_loss(child, child.task.query) for child in self.children]
        return torch.stack(terms).sum()

    def get_batch(self) -> None:
        return None

    def optimizer_step(self) -> None:
        names = self.torch_side.meta_parameters()
        grads = [value.grad for value in self.trainable_parameters()]
        self.gradient = {
            name: grad.numpy() for name, grad in zip(names, grads, strict=True) if grad is not None
        }


class _Inner(IterativeProblem):  # type: ignore[misc]
    """One task."""

    task: Task

    def training_step(self, batch: object) -> Tensor:
        return _loss(self, self.task.support)

    def get_batch(self) -> None:
        return None

    def on_inner_loop_start(self) -> None:
        params, buffers = self.outer()
        self.params = tuple(value.clone() for value in params)
        self.buffers = tuple(value.clone() for value in buffers)
        for state in self.optimizer.state:  # Betty's momentum is kept even at 0, with its graph
            state.clear()


def _loss(problem: Any, examples: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = examples
    with twice_differentiable():
        logits = problem.fmodule(problem.params, problem.buffers, inputs)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def prepare(problem: Problem, variant: str) -> Prepared:
    """There is one variant: the whole graph of the unroll."""
    warnings.simplefilter("ignore")  # Betty reads .grad of tensors that are no leaves, on purpose
    torch_side = torch_problem(problem)

    def sgd() -> torch.optim.SGD:
        return torch.optim.SGD(torch_side.module.parameters(), lr=torch_side.rate)

    outer = _Outer("outer", Config(first_order=False), torch_side.module, sgd(), device="cpu")
    outer.torch_side = torch_side
    inner_config = Config(unroll_steps=torch_side.num_steps, retain_graph=True)
    inner = []
    for task in torch_side.tasks:
        child = _Inner("inner", inner_config, torch_side.module, sgd(), device="cpu")
        child.task = task
        inner.append(child)
    engine = Engine(
        problems=[*inner, outer],
        config=EngineConfig(train_iters=torch_side.num_steps, valid_step=torch_side.num_steps + 1),
        dependencies={"u2l": {outer: inner}, "l2u": {child: [outer] for child in inner}},
    )

    def hypergradient() -> dict[str, Array]:
        engine.run()
        return outer.gradient

    return Prepared(torch_side.forward, hypergradient)
