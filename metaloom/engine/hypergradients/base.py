"""What a hypergradient estimator is, and the sums over inner steps that all of them share."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from metaloom.engine.capabilities import require
from metaloom.engine.hypergradients.missing import refusal_of
from metaloom.engine.inner_loops.rates import RATES
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
OnGradient = Callable[[str, Tensor], None]


@dataclasses.dataclass(frozen=True)
class MetaGradient:
    """The hypergradient of a batch of tasks.

    Attributes:
        gradient: d (sum over tasks of the meta-loss) / d theta, shaped like theta.
        losses: the meta-loss of each task, `[T]`; 0 for a dummy.
        metrics: per task, `[T]` each, float64: what the learner measures with the meta-loss, after adaptation
            (`loss_after`, the query loss; `accuracy_after`, where there is one; `rehearsal_loss_after`, where
            the meta-loss has one); of an estimator `not_finite`, 1 where the task's loss or its share of the
            gradient is not finite (the latter alone, where it was inspected); and the estimator's own. All 0
            for a dummy.
        tracked: sums over the tasks of what is counted beside what is learned, by name.
    """

    gradient: dict[str, Tensor]
    losses: Tensor
    metrics: dict[str, Tensor]
    tracked: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Hypergradient(abc.ABC):
    """The gradient of the meta-loss with respect to the meta-parameters, summed over tasks.

    Attributes:
        name: as in a recipe and in the table of `metaloom.engine.capabilities`.
        own_metrics: names of the metrics that this estimator alone reports.
    """

    name: ClassVar[str]
    own_metrics: ClassVar[tuple[str, ...]] = ()

    def meta_gradient(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, *, on_final: OnGradient | None = None
    ) -> MetaGradient:
        """Differentiates `unroll` at `meta` on `batch`; leaves both unchanged.

        Args:
            on_final: called with the gradient of a meta-parameter, in the midst of a backward pass, where
                that is final before the others are. What is returned has it too. An estimator need not
                call it.

        Raises:
            CapabilityError: this estimator does not give the gradient of something in `meta`, or torch lacks
                a derivative of an operation of the model that it needs.
            NotFiniteError: a task that `unroll` inspects is not finite; before `on_final` is called.
        """
        require(
            self.name,
            meta,
            has_proximal=unroll.rule.penalties.proximal > 0.0,
            end_only=not any(map(unroll.has_loss_at, range(unroll.num_steps))),
            rehearses_outside=unroll.learner.rehearses_outside,
        )
        try:
            return _without_dummies(self.estimate(unroll, meta, batch, on_final), batch)
        except RuntimeError as error:  # NotImplementedError is one
            refusal = refusal_of(self.name, str(error))
            if refusal is None:
                raise
            raise CapabilityError(refusal) from error

    def metric_names(self, learner: Learner) -> tuple[str, ...]:
        """The names of the metrics that `meta_gradient` returns: ranks without tasks need them too."""
        after = (f"{name}_after" for name in learner.outer_measures)
        return (*after, "not_finite", *self.own_metrics)

    @abc.abstractmethod
    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        """What `meta_gradient` returns, for meta-parameters of kinds that this estimator gives."""


def _without_dummies(part: MetaGradient, batch: TaskBatch) -> MetaGradient:
    """The same with metrics of nothing but the tasks that count."""
    if batch.weights is None:
        return part
    is_dummy = batch.weights == 0
    metrics = {name: value.masked_fill(is_dummy, 0.0) for name, value in part.metrics.items()}
    return dataclasses.replace(part, metrics=metrics)


def gradient_of(
    outputs: Sequence[Tensor],
    inputs: Tensors,
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool = False,
    on_gradient: OnGradient | None = None,
) -> dict[str, Tensor]:
    """The vector-Jacobian product of `outputs` for each of `inputs`; zero where nothing depends on it.

    Args:
        on_gradient: called with each input's product as soon as the backward pass has it; not where nothing
            depends on it.
    """
    found = gradient_if_any(outputs, inputs, cotangents, retain_graph=retain_graph, on_gradient=on_gradient)
    return filled(found, inputs)


def gradient_if_any(
    outputs: Sequence[Tensor],
    inputs: Tensors,
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool = False,
    on_gradient: OnGradient | None = None,
) -> dict[str, Tensor]:
    """The same for those of `inputs` that `outputs` depend on: no memory for the others."""
    connected = [
        (output, None if cotangents is None else cotangents[position])
        for position, output in enumerate(outputs)
        if output.requires_grad
    ]
    if not connected:
        return {}
    with _hooked(inputs, on_gradient):
        grads = torch.autograd.grad(
            [output for output, _ in connected],
            list(inputs.values()),
            None if cotangents is None else [cotangent for _, cotangent in connected],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return {name: grad for name, grad in zip(inputs, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _hooked(inputs: Tensors, on_gradient: OnGradient | None) -> Iterator[None]:
    """In this context a backward pass tells of each input's gradient when nothing more is added to it."""
    with contextlib.ExitStack() as stack:
        if on_gradient is not None:
            for name, value in inputs.items():
                hook = value.register_hook(functools.partial(on_gradient, name))  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
        yield


def finishing(on_final: OnGradient | None, finish: Callable[[str, Tensor], Tensor]) -> OnGradient | None:
    """What takes the gradients of a last pass, by key, and tells of those under `theta/<name>` what they
    make final; None where nobody waits."""
    if on_final is None:
        return None

    def tell(key: str, gradient: Tensor) -> None:
        kind, _, name = key.partition("/")
        if kind == "theta":
            on_final(name, finish(name, gradient))

    return tell


def order_of_completion(names: Iterable[str]) -> list[str]:
    """Names of meta-parameters, those whose gradients tend to be final first first.

    A backward pass comes to the last layers first. The gradients of rates need the inner gradients, which
    may be had at the end alone.
    """
    backwards = list(names)[::-1]
    return sorted(backwards, key=lambda name: name.startswith(RATES))


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix`, so that several dicts can be one."""
    return {prefix + name: value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """What `prefixed` put under `prefix`."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def add_(total: dict[str, Tensor], increment: Tensors) -> None:
    """`total += increment`, by name, in place, where what `total` lacks counts as zero; `total` must be the
    caller's own."""
    for name, value in increment.items():
        if name in total:
            total[name] += value
        else:
            total[name] = value.clone()  # what autograd returns may share memory


def added(left: Tensors, right: Tensors) -> dict[str, Tensor]:
    """`left + right`, by name; what only one of them has counts as zero in the other. Not in place: what
    autograd returns may share memory."""
    total = dict(left)
    for name, value in right.items():
        total[name] = total[name] + value if name in total else value
    return total


def filled(tensors: Tensors, like: Tensors) -> dict[str, Tensor]:
    """The tensors by the names of `like`, zeros where there is none."""
    return {
        name: tensors[name] if name in tensors else torch.zeros_like(value) for name, value in like.items()
    }


def meta_losses(
    unroll: Unroll, theta: Tensors, start: tuple[Tensors, Tensors], batch: TaskBatch, first_step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sum_k c_k Lq(phi_k)` over k = `first_step` .. K as a graph over theta and `start`, and the metrics.

    Args:
        start: (phi, s) at inner step `first_step`; phi requires gradients.

    Returns:
        The sum for each task, `[T]`, float64, and the metrics of `query_losses`.
    """
    fast, state = start
    total = torch.zeros(batch.num_tasks, dtype=torch.float64, device=next(iter(fast.values())).device)
    metrics: dict[str, Tensor] = {}
    for step in range(first_step, unroll.num_steps + 1):
        if step > first_step:
            fast, state = unroll.inner_step(theta, fast, state, batch, step - 1, create_graph=True)
        losses, at_step = query_losses(unroll, theta, fast, batch, step)
        metrics |= at_step
        if losses is not None:
            total = total + losses
    return total, metrics


def query_losses(
    unroll: Unroll, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`c_k Lq` at phi_`step`, with the meta-loss's rehearsal, and its further terms there, times the tasks'
    weights, `[T]`, float64, None where there are none; and the metrics of the last step."""
    weight, is_last = unroll.step_weights[step], step == unroll.num_steps
    parts: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    if weight != 0.0 or is_last:
        with torch.set_grad_enabled(weight != 0.0 and torch.is_grad_enabled()):
            losses, measures = unroll.learner.losses("outer", meta, fast, batch, step)
        if weight != 0.0:
            parts.append(weight * losses.double())
        if is_last:
            metrics = {f"{name}_after": value for name, value in measures.items()}
    parts += [
        term.losses(unroll.learner, meta, fast, batch, step, num_steps=unroll.num_steps).double()
        for term in unroll.terms_at(step)
    ]
    if not parts:
        return None, metrics
    total = functools.reduce(torch.add, parts)
    unroll.look("query loss", step, [total])
    return (total if batch.weights is None else total * batch.weights), metrics


def weighted(weights: Tensor, tensor: Tensor) -> Tensor:
    """Each task's part of a tensor `[T, ...]` times its weight."""
    return tensor * weights.view(-1, *(1,) * (tensor.ndim - 1))


def not_finite(losses: Tensor, per_task: Iterable[Tensor]) -> Tensor:
    """1 for each task with a loss, or an entry of its `[T, ...]` tensors, that is not finite; `[T]`,
    float64."""
    finite = losses.isfinite()
    for tensor in per_task:
        finite = finite & tensor.reshape(len(losses), -1).isfinite().all(dim=1)
    return (~finite).double()
