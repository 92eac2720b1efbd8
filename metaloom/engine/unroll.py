"""The inner problem: K steps of adaptation on support data, then the query loss.

Notation as in docs/architecture.md: theta meta-parameters, phi_k fast weights, s_k the rule's
state, c_k the weight of the query loss after k steps, L the inner loss, Lq the query loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaloom.engine.adapters.base import Learned
from metaloom.engine.forward_pass import Derivative
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.head_first import HeadFirst
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inspection import Inspection
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Scales
from metaloom.engine.stopping import StopPoints
from metaloom.engine.terms import MetaTerm

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Unroll:
    """The meta-loss of a task, `sum_k c_k * Lq(phi_k; theta)`, with phi_k from K inner steps.

    Attributes:
        learner: the losses.
        rule: the inner rule.
        rates: its learning rates.
        step_weights: c_0 .. c_K; plain MAML has c_K = 1 and the others 0.
        scales: what losses are multiplied by inside, in half precision.
        terms: what is added to the meta-loss beside query losses.
        head_first: the steps that move the head alone; None for none.
        points: where the unroll may be broken off.
        inspection: what looks whether the tasks of the batch at hand are finite; None where nobody asks.
    """

    learner: Learner
    rule: InnerRule
    rates: Rates
    step_weights: tuple[float, ...]
    scales: Scales = dataclasses.field(default_factory=Scales)
    terms: tuple[MetaTerm, ...] = ()
    head_first: HeadFirst | None = None
    points: StopPoints = dataclasses.field(default_factory=StopPoints)
    inspection: Inspection | None = None

    @property
    def num_steps(self) -> int:
        return len(self.step_weights) - 1

    def terms_at(self, step: int) -> list[MetaTerm]:
        """The terms that have a part of the meta-loss at phi_`step`."""
        return [term for term in self.terms if step in term.steps(self.num_steps)]

    def has_loss_at(self, step: int) -> bool:
        """Whether the meta-loss has a part at phi_`step`."""
        return self.step_weights[step] != 0.0 or bool(self.terms_at(step))

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        """Fresh copies of the initial values of what is learned: of the adapter's what is asked for, and the
        rates and loss parameters that are to be."""
        adapter = self.learner.adapter
        fast = adapter.init({}, 1)
        like = next(iter(fast.values()))
        learned = adapter.meta_parameters(init=init, backbone=backbone) | self.rates.meta_parameters(fast)
        loss = self.learner.learned_loss or self.learner.support_loss
        return learned | loss.meta_parameters(like)

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
        if not create_graph:
            grads = self.scaled_support_gradient(meta, fast, batch, step, derivative="once")
            return unscaled(grads, self.scales.loss)
        scale = self.scales.loss
        meta, fast = entered(meta, scale), entered(fast, scale)
        grads = self.scaled_support_gradient(meta, fast, batch, step, derivative="reverse")
        return left(grads, scale)

    def scaled_support_gradient(
        self, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int, *, derivative: Derivative
    ) -> dict[str, Tensor]:
        """`S * g_k`, S the loss scale; as `support_gradient`."""
        self.points.between_passes()
        losses, _ = self.learner.losses("support", meta, fast, batch, step, derivative=derivative)
        self.look("support loss", step, [losses])
        # Zero where the inner loss has no part of a fast weight, as of the head of another objective.
        grads = torch.autograd.grad(
            self.scales.loss * losses.sum(),
            list(fast.values()),
            create_graph=derivative == "reverse",
            materialize_grads=True,
        )
        return dict(zip(fast, grads, strict=True))

    def inner_step(
        self, meta: Tensors, fast: Tensors, state: Tensors, batch: TaskBatch, step: int, *, create_graph: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(phi_{k+1}, s_{k+1}) from (phi_k, s_k)."""
        grads = self.support_gradient(meta, fast, batch, step, create_graph=create_graph)
        return self.update(meta, fast, state, grads, step)

    def update(
        self, meta: Tensors, fast: Tensors, state: Tensors, grads: Tensors, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(phi_{k+1}, s_{k+1}) from (phi_k, s_k) and g_k, a pure function; `meta` has the learned rates."""
        rates = self.rates.at(meta, fast, step)
        if self.head_first is not None:
            after = self.head_first.update(self.rule, fast, state, grads, rates, step)
        else:
            after = self.rule.update(fast, state, grads, rates)
        # What is not finite stays so. A scaled gradient may overflow where a smaller scale would not have it
        # so: then every step is looked at, to tell this from a loss that is not finite by itself.
        is_scaled = self.scales.loss != 1.0
        if is_scaled or step + 1 == self.num_steps:
            moved = [value for tensors in after for value in tensors.values() if value.ndim > 0]
            self.look("fast weights", step + 1, moved, is_excused=is_scaled)
        return after

    def look(self, what: str, step: int, tensors: Iterable[Tensor], *, is_excused: bool = False) -> None:
        """Has numbers of the tasks looked at: see `Inspection.look`."""
        if self.inspection is not None:
            self.inspection.look(what, step, tensors, is_excused=is_excused)

    def require_finite(self) -> None:
        """Passes where the tasks are finite in all that was looked at, or nobody asks: called before anything
        is differentiated that a task could poison.

        Raises:
            NotFiniteError: one is not.
        """
        if self.inspection is not None:
            self.inspection.settle()


def entered(tensors: Tensors, scale: float) -> dict[str, Tensor]:
    """The tensors as a scaled gradient is to see them: what comes back for them is divided by the scale, in
    their own precision. With `left`, the derivatives of the gradient are right and its graph stays scaled:
    an adjoint that were divided on the way in would vanish in half precision."""
    if scale == 1.0:
        return dict(tensors)
    return {
        name: _Entered.apply(value, scale)  # type: ignore[no-untyped-call]
        for name, value in tensors.items()
    }


def left(tensors: Tensors, scale: float) -> dict[str, Tensor]:
    """Scaled gradients divided by the scale, through which adjoints pass as they are: see `entered`."""
    if scale == 1.0:
        return dict(tensors)
    return {
        name: _Left.apply(value, scale)  # type: ignore[no-untyped-call]
        for name, value in tensors.items()
    }


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.scale, None


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        return value / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def unscaled(tensors: Tensors, scale: float) -> dict[str, Tensor]:
    """The tensors divided by a scale."""
    return dict(tensors) if scale == 1.0 else {name: value / scale for name, value in tensors.items()}


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


def first_snapshot(unroll: Unroll, meta: Tensors, num_tasks: int) -> Snapshot:
    """(phi_0, s_0), without a graph."""
    with torch.no_grad():
        return Snapshot(*unroll.start(constants(meta), num_tasks))


def advance(unroll: Unroll, meta: Tensors, batch: TaskBatch, at: Snapshot, step: int) -> Snapshot:
    """(phi_{k+1}, s_{k+1}) from (phi_k, s_k) at inner step k = `step`, without a graph."""
    fixed = constants(meta)
    with torch.enable_grad():
        grads = unroll.support_gradient(fixed, leaves(at.fast), batch, step, create_graph=False)
    with torch.no_grad():
        return Snapshot(*unroll.update(fixed, at.fast, at.state, grads, step))


def adapt(unroll: Unroll, meta: Tensors, batch: TaskBatch, *, num_steps: int) -> Iterator[Snapshot]:
    """(phi_k, s_k) for k = 0 .. `num_steps`, one after the other, without a graph.

    Memory: what the caller keeps, and one step's activations.
    """
    at = first_snapshot(unroll, meta, batch.num_tasks)
    yield at
    for step in range(num_steps):
        at = advance(unroll, meta, batch, at, step)
        yield at


def constants(tensors: Tensors) -> dict[str, Tensor]:
    """The same values without their graph."""
    return {name: value.detach() for name, value in tensors.items()}
