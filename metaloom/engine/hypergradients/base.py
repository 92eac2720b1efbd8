"""What a hypergradient estimator is, and the sums over inner steps that all of them share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from metaloom.engine.capabilities import require
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class MetaGradient:
    """The hypergradient of a batch of tasks.

    Attributes:
        gradient: d (sum over tasks of the meta-loss) / d theta, shaped like theta.
        losses: the meta-loss of each task, `[T]`.
        metrics: per task, `[T]` each, float64: `loss_` and `accuracy_`, `before` and `after` adaptation,
            and the estimator's own.
    """

    gradient: dict[str, Tensor]
    losses: Tensor
    metrics: dict[str, Tensor]


class Hypergradient(abc.ABC):
    """The gradient of the meta-loss with respect to the meta-parameters, summed over tasks.

    Attributes:
        name: as in a recipe and in the table of `metaloom.engine.capabilities`.
        own_metrics: names of the metrics that this estimator alone reports.
    """

    name: ClassVar[str]
    own_metrics: ClassVar[tuple[str, ...]] = ()

    def meta_gradient(self, unroll: Unroll, meta: Tensors, batch: TaskBatch) -> MetaGradient:
        """Differentiates `unroll` at `meta` on `batch`; leaves both unchanged.

        Raises:
            CapabilityError: this estimator does not give the gradient of something in `meta`.
        """
        require(
            self.name,
            meta,
            has_proximal=unroll.rule.penalties.proximal > 0.0,
            end_only=not any(unroll.step_weights[:-1]),
        )
        return self.estimate(unroll, meta, batch)

    @abc.abstractmethod
    def estimate(self, unroll: Unroll, meta: Tensors, batch: TaskBatch) -> MetaGradient:
        """What `meta_gradient` returns, for meta-parameters of kinds that this estimator gives."""


def gradient_of(
    outputs: Sequence[Tensor],
    inputs: Tensors,
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """The vector-Jacobian product of `outputs` for each of `inputs`; zero where nothing depends on it."""
    connected = [
        (output, None if cotangents is None else cotangents[position])
        for position, output in enumerate(outputs)
        if output.requires_grad
    ]
    if not connected:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    grads = torch.autograd.grad(
        [output for output, _ in connected],
        list(inputs.values()),
        None if cotangents is None else [cotangent for _, cotangent in connected],
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix`, so that several dicts can be one."""
    return {prefix + name: value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """What `prefixed` put under `prefix`."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def add_(total: dict[str, Tensor], increment: Tensors) -> None:
    """`total += increment`, by name, in place; `total` must be the caller's own."""
    for name, value in increment.items():
        total[name] += value


def added(left: Tensors, right: Tensors) -> dict[str, Tensor]:
    """`left + right`, by name. Not in place: what autograd returns may share memory."""
    return {name: value + right[name] for name, value in left.items()}


def query_losses(
    unroll: Unroll, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Lq at phi_`step`: `[T]`, and the metrics under their public names."""
    losses, aux = unroll.learner.losses("query", meta, fast, batch, step)
    moment = {0: "before", unroll.num_steps: "after"}.get(step)
    if moment is None:
        return losses, {}
    return losses, {
        f"loss_{moment}": losses.detach().double(),
        f"accuracy_{moment}": aux["accuracy"],
    }
