"""The adjoint sweep over inner steps, which all but the whole-graph estimator share.

    v = c_K dLq/dphi,  w = 0,  dtheta = c_K dLq/dtheta,  all at phi_K
    for k = K-1 ... 0:
        (v, w), dtheta += pull-back of inner step k, applied to (v, w)
        v += c_k dLq/dphi,  dtheta += c_k dLq/dtheta,  at phi_k
    dtheta += (d phi_0 / d theta)^T v + (d s_0 / d theta)^T w

An estimator says how one inner step is pulled back, and nothing else. In half precision the meta-loss is
multiplied by the tangent scale, so that v, w and dtheta are, until the end.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    OnGradient,
    Tensors,
    add_,
    added,
    filled,
    gradient_if_any,
    meta_losses,
    not_finite,
    prefixed,
    query_losses,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.snapshots import KeepAll, SnapshotPlan
from metaloom.engine.unroll import Snapshot, Unroll, advance, first_snapshot, leaves, unscaled


@dataclasses.dataclass
class Adjoint:
    """v and w: the derivatives of the meta-loss with respect to phi_k and s_k; with `grads`,
    where an estimator asks for it, that with respect to the inner gradient g_k."""

    fast: dict[str, Tensor]
    state: dict[str, Tensor]
    grads: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AdjointSweep(Hypergradient):
    """Runs the inner steps without a graph, keeping what the plan says of (phi_k, s_k), then sweeps back over
    them.

    Attributes:
        snapshots: which (phi_k, s_k) are kept, and where.
        num_graph_steps: the last so many inner steps keep their graph instead: nothing of them is computed
            twice, and memory grows by one step's graph each.
    """

    snapshots: SnapshotPlan = dataclasses.field(default_factory=KeepAll)
    num_graph_steps: int = 0

    @abc.abstractmethod
    def pull_back(
        self,
        unroll: Unroll,
        theta: Tensors,
        batch: TaskBatch,
        step: int,
        at: Snapshot,
        adjoint: Adjoint,
        on_complete: OnGradient | None,
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        """The adjoint before inner step `step` from the one after it.

        Args:
            theta: meta-parameters, leaves that require gradients.
            at: (phi_k, s_k), where the step starts.
            adjoint: (v, w) at (phi_{k+1}, s_{k+1}).
            on_complete: called with entries of what is returned that are complete before the others are,
                under `fast/<name>`, `state/<name>` or `theta/<name>`; None where nobody waits for them.

        Returns:
            (v, w) at (phi_k, s_k), and the step's share of dtheta, of what the step depends on alone.
        """

    def num_passed_over(self, unroll: Unroll) -> int:
        """How many of the first inner steps have no part in the sweep, and need not be kept."""
        return 0

    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        theta = leaves(meta)
        top = max(0, unroll.num_steps - self.num_graph_steps)
        first = self.num_passed_over(unroll)
        start = first_snapshot(unroll, meta, batch.num_tasks)
        for step in range(first):
            start = advance(unroll, meta, batch, start, step)
        states = self.snapshots.backwards(
            start, top - first, lambda at, step: advance(unroll, meta, batch, at, first + step)
        )
        del start
        d_theta: dict[str, Tensor] = {}
        end = End(unroll, theta, batch.num_tasks, d_theta, on_final)
        on_complete = end.take if on_final is not None and top == first else None
        losses, metrics, adjoint, share = self._top(unroll, theta, batch, next(states), top, on_complete)
        add_(d_theta, share)
        for step in range(top - 1, first - 1, -1):
            at = next(states)
            is_last_pass = step == first and not unroll.has_loss_at(step)
            on_complete = end.take if on_final is not None and is_last_pass else None
            if step == first:
                unroll.require_finite()  # query losses on the way back, before gradients are told of
            adjoint, share = self.pull_back(unroll, theta, batch, step, at, adjoint, on_complete)
            add_(d_theta, share)
            query = _query_gradient(unroll, theta, batch, step, at.fast)
            metrics |= query.metrics
            if query.losses is not None:
                adjoint = Adjoint(added(adjoint.fast, query.d_fast), adjoint.state)
                add_(d_theta, query.d_theta)
                losses = losses + query.losses
            del at  # before the plan makes the next one
        unroll.require_finite()
        metrics["not_finite"] = not_finite(losses, adjoint.fast.values())
        return MetaGradient(end.gradient(adjoint), losses, metrics)

    def _top(
        self,
        unroll: Unroll,
        theta: Tensors,
        batch: TaskBatch,
        at: Snapshot,
        first_step: int,
        on_complete: OnGradient | None,
    ) -> tuple[Tensor, dict[str, Tensor], Adjoint, dict[str, Tensor]]:
        """Losses, metrics, (v, w) and dtheta of everything from state `first_step` on, through its graph;
        `on_complete` as in `pull_back`."""
        fast, state = leaves(at.fast), leaves(at.state)
        with torch.enable_grad():
            losses, metrics = meta_losses(unroll, theta, (fast, state), batch, first_step)
            unroll.require_finite()
            inputs = prefixed("fast/", fast) | prefixed("state/", state) | prefixed("theta/", theta)
            bars = gradient_if_any([unroll.scales.tangent * losses.sum()], inputs, on_gradient=on_complete)
        adjoint = Adjoint(filled(unprefixed("fast/", bars), fast), filled(unprefixed("state/", bars), state))
        return losses.detach(), metrics, adjoint, unprefixed("theta/", bars)


class End:
    """The end of a sweep: the pull-back of the start, after which dtheta is what was asked for.

    What the start depends on (the initialisation) acts in no other way, so its gradient is final as soon as
    the adjoints of what it starts are complete; that of anything else with the last pass's share of it.

    Args:
        d_theta: without the last pass's share, while that runs; with it afterwards.
        on_final: told of gradients that are final while the last pass runs.
    """

    def __init__(
        self,
        unroll: Unroll,
        theta: Tensors,
        num_tasks: int,
        d_theta: dict[str, Tensor],
        on_final: OnGradient | None,
    ) -> None:
        with torch.enable_grad():
            fast, state = unroll.start(theta, num_tasks)
        start = prefixed("fast/", fast) | prefixed("state/", state)
        self._start = {key: value for key, value in start.items() if value.requires_grad}
        self._starts = _dependents(self._start, theta)
        self._theta, self._d_theta = theta, d_theta
        self._scale = unroll.scales.tangent
        self._on_final = on_final
        self._adjoints: dict[str, Tensor] = {}
        self._told: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> None:
        """Takes in an adjoint at (phi_0, s_0), or the last pass's share of dtheta, that is complete."""
        kind, _, name = key.partition("/")
        if kind == "theta":
            if name not in self._starts:
                self._tell(name, value)
            return
        self._adjoints[key] = value
        for started_by, keys in self._starts.items():
            if key in keys and keys <= self._adjoints.keys():
                share = self._pull_back([started_by], self._adjoints)
                self._tell(started_by, share[started_by])

    def gradient(self, adjoint: Adjoint) -> dict[str, Tensor]:
        """dtheta, given the adjoints at (phi_0, s_0)."""
        adjoints = prefixed("fast/", adjoint.fast) | prefixed("state/", adjoint.state)
        rest = [name for name in self._theta if name not in self._told]
        add_(self._d_theta, self._pull_back(rest, adjoints))
        late = {name: value for name, value in self._d_theta.items() if name not in self._told}
        return filled(self._told | unscaled(late, self._scale), self._theta)

    def _pull_back(self, names: Sequence[str], adjoints: Tensors) -> dict[str, Tensor]:
        keys = {key for name in names for key in self._starts.get(name, ())}
        outputs = [key for key in self._start if key in keys]
        inputs = {name: self._theta[name] for name in names}
        return gradient_if_any(
            [self._start[key] for key in outputs], inputs, [adjoints[key] for key in outputs]
        )

    def _tell(self, name: str, share: Tensor) -> None:
        assert self._on_final is not None
        own = {name: self._d_theta[name]} if name in self._d_theta else {}
        final = unscaled(added(own, {name: share}), self._scale)
        self._told |= final
        self._on_final(name, final[name])


def _dependents(outputs: Tensors, inputs: Tensors) -> dict[str, set[str]]:
    """Which of `outputs`, all with a graph, depend on each of `inputs`, leaves; of these, those that any
    depends on."""
    leaf_nodes = {get_gradient_edge(value).node: name for name, value in inputs.items()}
    found: dict[str, set[str]] = {}
    for key, output in outputs.items():
        waiting = [get_gradient_edge(output).node]
        while waiting:
            node = waiting.pop()
            if node in leaf_nodes:
                found.setdefault(leaf_nodes[node], set()).add(key)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found


@dataclasses.dataclass(frozen=True)
class _Query:
    losses: Tensor | None
    metrics: dict[str, Tensor]
    d_fast: dict[str, Tensor]
    d_theta: dict[str, Tensor]


def _query_gradient(
    unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, fast_values: Tensors
) -> _Query:
    """The meta-loss's part at phi_k, and its derivatives by phi and theta; no losses where it has none."""
    fast = leaves(fast_values)
    with torch.enable_grad():
        losses, metrics = query_losses(unroll, theta, fast, batch, step)
        if losses is None:
            return _Query(None, metrics, {}, {})
        grads = gradient_if_any(
            [unroll.scales.tangent * losses.sum()], prefixed("fast/", fast) | prefixed("theta/", theta)
        )
    return _Query(losses.detach(), metrics, unprefixed("fast/", grads), unprefixed("theta/", grads))


def rule_vjp(
    unroll: Unroll,
    theta: Tensors,
    at: Snapshot,
    grads: Tensors,
    step: int,
    adjoint: Adjoint,
) -> tuple[Adjoint, dict[str, Tensor]]:
    """(v, w) applied to the Jacobian of the update alone, by phi, s, g and the rates in theta.

    Args:
        at: (phi_k, s_k).
        grads: g_k.
        adjoint: (v, w) at (phi_{k+1}, s_{k+1}).

    Returns:
        (phi_bar, w) with `grads` g_bar; and the rates' share of dtheta.
    """
    fast, state, inner = leaves(at.fast), leaves(at.state), leaves(grads)
    with torch.enable_grad():
        after_fast, after_state = unroll.update(theta, fast, state, inner, step)
    outputs = [*after_fast.values(), *after_state.values()]
    cotangents = [
        *(adjoint.fast[name] for name in after_fast),
        *(adjoint.state[name] for name in after_state),
    ]
    inputs = (
        prefixed("fast/", fast)
        | prefixed("state/", state)
        | prefixed("theta/", theta)
        | prefixed("grads/", inner)
    )
    bars = gradient_if_any(outputs, inputs, cotangents)
    before = Adjoint(
        filled(unprefixed("fast/", bars), fast),
        filled(unprefixed("state/", bars), state),
        filled(unprefixed("grads/", bars), inner),
    )
    return before, unprefixed("theta/", bars)


def completed(on_complete: OnGradient | None, known: Tensors, scale: float) -> OnGradient | None:
    """What tells `on_complete` of `known` plus a pass's own gradients, divided by their scale, by key; None
    where nobody waits."""
    if on_complete is None:
        return None

    def tell(key: str, gradient: Tensor) -> None:
        share = unscaled({key: gradient}, scale)
        on_complete(key, added({key: known[key]} if key in known else {}, share)[key])

    return tell
