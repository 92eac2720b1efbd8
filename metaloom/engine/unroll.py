"""The inner problem: K steps of adaptation on support data, then the query loss.

Notation as in docs/architecture.md: theta meta-parameters, phi_k fast weights, s_k the rule's
state, c_k the weight of the query loss after k steps, L the inner loss, Lq the query loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.learner import Learner, TaskBatch

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Unroll:
    """The meta-loss of a task, `sum_k c_k * Lq(phi_k; theta)`, with phi_k from K inner steps.

    Attributes:
        learner: the losses.
        rule: the inner rule.
        rates: its learning rates.
        step_weights: c_0 .. c_K; plain MAML has c_K = 1 and the others 0.
    """

    learner: Learner
    rule: InnerRule
    rates: Rates
    step_weights: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.step_weights) - 1

    def start(self, meta: Tensors, num_tasks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(phi_0, s_0), differentiable in `meta`."""
        fast = self.learner.init(meta, num_tasks)
        return fast, self.rule.init_state(fast)

    def support_gradient(
        self, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int, *, create_graph: bool
    ) -> dict[str, Tensor]:
        """g_k, the gradient of the tasks' inner losses at phi_k: name -> `[T, ...]`.

        `fast` must require gradients; with `create_graph` the result is differentiable again.
        """
        losses, _ = self.learner.losses("support", meta, fast, batch, step)
        grads = torch.autograd.grad(losses.sum(), list(fast.values()), create_graph=create_graph)
        return dict(zip(fast, grads, strict=True))

    def inner_step(
        self, meta: Tensors, fast: Tensors, state: Tensors, batch: TaskBatch, step: int, *, create_graph: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(phi_{k+1}, s_{k+1}) from (phi_k, s_k)."""
        grads = self.support_gradient(meta, fast, batch, step, create_graph=create_graph)
        return self.rule.update(fast, state, grads, self.rates.at(meta, fast, step))


def leaves(tensors: Tensors) -> dict[str, Tensor]:
    """The same values as fresh leaves that require gradients (no copy is made)."""
    return {name: leaf(value) for name, value in tensors.items()}


def leaf(tensor: Tensor) -> Tensor:
    """The same values as a fresh leaf that requires gradients (no copy is made)."""
    return tensor.detach().requires_grad_()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is kept of one inner step for the adjoint sweep: (phi_k, s_k), without a graph."""

    fast: dict[str, Tensor]
    state: dict[str, Tensor]


def adapt(unroll: Unroll, meta: Tensors, batch: TaskBatch, *, num_steps: int) -> list[Snapshot]:
    """(phi_k, s_k) for k = 0 .. `num_steps`, without a graph.

    Memory: one copy of the fast weights and the rule's state per step, and one step's activations.
    """
    constants = {name: value.detach() for name, value in meta.items()}
    with torch.no_grad():
        fast, state = unroll.start(constants, batch.num_tasks)
    snapshots = [Snapshot(fast, state)]
    for step in range(num_steps):
        with torch.enable_grad():
            grads = unroll.support_gradient(constants, leaves(fast), batch, step, create_graph=False)
        with torch.no_grad():
            fast, state = unroll.rule.update(fast, state, grads, unroll.rates.at(constants, fast, step))
        snapshots.append(Snapshot(fast, state))
    return snapshots
