"""Which operations of a model stand in the way of an estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.missing import operation_in
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, first_snapshot, leaves
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]


def attempt(
    hypergradient: Hypergradient, unroll: Unroll, meta: Tensors, batch: TaskBatch
) -> tuple[dict[str, Tensor] | None, str | None]:
    """The gradient; or None, and what torch says of why there is none."""
    try:
        return hypergradient.meta_gradient(unroll, meta, batch).gradient, None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, CapabilityError) as error:  # NotImplementedError is a RuntimeError
        said = error.__cause__ or error  # what torch said, where it was put into other words
        return None, (str(said).strip().splitlines() or [type(said).__name__])[0]


def refusal(estimator: str, failure: str | None, own_functions: tuple[str, ...], has_oracle: bool) -> str:
    """Which estimator, which operation, and what to do."""
    failure = failure or ""
    named = operation_in(failure)
    if named is not None:
        operation = named
    elif own_functions:
        operation = f"one of the model's own autograd functions ({', '.join(own_functions)})"
    else:
        operation = "an operation of the model"
    if has_oracle:
        fix = "Set algorithm.hypergradient to rematerialized or unrolled, which this model can do"
    else:
        fix = (
            "Replace the operation by one that can be differentiated twice (eager attention for a fused one, "
            "differentiable operations in the backward of an autograd function), or set "
            "algorithm.hypergradient to first_order, which needs no second derivative and is approximate"
        )
    return (
        f"`{estimator}` cannot be computed: {operation} lacks a derivative that it needs (torch: {failure}). "
        f"{fix}."
    )


def own_functions_of(unroll: Unroll, meta: Tensors, batch: TaskBatch) -> tuple[str, ...]:
    """Names of the autograd functions in the inner loss that are not metaloom's."""
    at = leaves(first_snapshot(unroll, meta, batch.num_tasks).fast)
    with torch.enable_grad():
        losses, _ = unroll.learner.losses("support", leaves(meta), at, batch, 0, derivative="reverse")
    names = {
        type(node)._forward_cls.__name__  # type: ignore[attr-defined]
        for node in _graph(losses)
        if isinstance(node, BackwardCFunction)
        and not type(node)._forward_cls.__module__.startswith("metaloom.")  # type: ignore[attr-defined]
    }
    return tuple(sorted(names))


def _graph(output: Tensor) -> Iterator[object]:
    """Every node of the graph that a tensor hangs on."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]
