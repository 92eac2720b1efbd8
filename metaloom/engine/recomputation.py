"""Activation checkpointing that can be differentiated twice.

`torch.utils.checkpoint` frees a block's activations until the block's backward pass. Where that backward
pass is itself differentiated (`create_graph=True`), everything it has recomputed is kept by the graph of the
gradient, and nothing is saved. Here the backward pass is a function of its own, which again keeps its inputs
alone:

    y = f(x)                                    keeps x
    dx = f'(x)^T dy                             keeps x and dy; computes f again
    (d/dx, d/ddy) <u, f'(x)^T dy>               computes f and f'(x)^T dy again, with a graph, for this block
    only

Under dual numbers the same in one go, all of it with tangents (x., y., dy.):

    y, y. = f(x), f'(x) x.                      keeps x and x.
    dx, dx. = f'(x)^T dy and its tangent        computes f again, on dual numbers

Here too torch's own will not do: the graph keeps the tangent of every tensor that it saves, whatever becomes
of the tensor itself, and that of torch 2.11 refuses dual numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from metaloom.engine.forward_pass import Derivative
from metaloom.engine.kernels.absent import none_of_none
from metaloom.engine.kernels.order import last_derivative
from metaloom.engine.kernels.wanted import wanted

Compute = Callable[..., tuple[Tensor, ...]]


def recomputed(compute: Compute, tensors: Sequence[Tensor], *, derivative: Derivative) -> tuple[Tensor, ...]:
    """`compute(*tensors)`, which keeps the tensors alone and computes again when it is differentiated.

    Args:
        compute: a pure function that reaches every tensor to be differentiated through its arguments. It is
            called outside any context of the first call: it has to bring its own (autocast, hooks, draws).
        tensors: its arguments.
        derivative: how it will be differentiated, as `ForwardPass` has it.

    Returns:
        What `compute` returns.
    """
    if derivative == "reverse":
        outputs: tuple[Tensor, ...] = _Recomputed.apply(compute, *tensors)  # type: ignore[no-untyped-call]
        return outputs
    if derivative == "forward":
        duals: tuple[Tensor, ...] = _RecomputedDual.apply(compute, *tensors)  # type: ignore[no-untyped-call]
        return duals
    returned: tuple[Tensor, ...] = checkpoint(
        compute, *tensors, use_reentrant=False, preserve_rng_state=False
    )
    return returned


class _Recomputed(torch.autograd.Function):
    """x -> f(x)."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = compute(*tensors)
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needed = _positions(wanted(ctx))
        gradients = _RecomputedGradient.apply(  # type: ignore[no-untyped-call]
            ctx.compute, needed, len(d_outputs), *d_outputs, *ctx.saved_tensors
        )
        spread: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for position, gradient in zip(needed, gradients, strict=True):
            spread[position] = gradient
        return (None, *spread)


class _RecomputedGradient(torch.autograd.Function):
    """(dy, x) -> f'(x)^T dy, for those of the tensors x that are `needed`."""

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, needed: tuple[int, ...], num_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        d_outputs, inputs = tensors[:num_outputs], _leaves(tensors[num_outputs:], needed)
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.needed, ctx.num_outputs = compute, needed, num_outputs
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            outputs = compute(*inputs)
            return _gradients(outputs, [inputs[position] for position in needed], d_outputs)

    @staticmethod
    @none_of_none
    @last_derivative
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, num_outputs = ctx.saved_tensors, ctx.num_outputs
        by = _positions(wanted(ctx))  # what to differentiate by the second time
        d_outputs = _leaves(saved[:num_outputs], [position for position in by if position < num_outputs])
        by_inputs = [position - num_outputs for position in by if position >= num_outputs]
        inputs = _leaves(saved[num_outputs:], {*ctx.needed, *by_inputs})
        first = [inputs[position] for position in ctx.needed]
        tensors = [*d_outputs, *inputs]
        with torch.enable_grad():
            gradients = _gradients(ctx.compute(*inputs), first, d_outputs, create_graph=True)
            results = _gradients(gradients, [tensors[position] for position in by], directions)
        spread: list[Tensor | None] = [None] * len(saved)
        for position, result in zip(by, results, strict=True):
            spread[position] = result
        return (None, None, None, *spread)


class _RecomputedDual(torch.autograd.Function):
    """x -> f(x), on dual numbers."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Switched off inside a Function; on again, so that values and tangents come out of one pass.
        with forward_ad._set_fwd_grad_enabled(True):
            outputs = compute(*_dual_leaves(tensors, ()))
            pairs = [_unpacked(output) for output in outputs]
            is_dual = any(_unpacked(tensor)[1] is not None for tensor in tensors)
        primals = tuple(primal for primal, _ in pairs)
        # Where an input is dual, torch wants a tangent of every number, zero or not.
        ctx.tangents = tuple(
            torch.zeros_like(primal)
            if tangent is None and is_dual and primal.is_floating_point()
            else tangent
            for primal, tangent in pairs
        )
        ctx.set_materialize_grads(False)
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(primal for primal in primals if not primal.is_floating_point()))
        return primals

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        tangents: tuple[Tensor | None, ...] = ctx.tangents
        del ctx.tangents  # the outputs hold them from here on
        return tangents

    @staticmethod
    @none_of_none
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = _positions(wanted(ctx))
        spread: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = _dual_leaves(ctx.saved_tensors, needed)
            outputs = ctx.compute(*inputs)
            tangents = _kept_tangents(outputs)
            gradients = _gradients(outputs, [inputs[position] for position in needed], d_outputs)
        _give_back(tangents, [tangent for _, tangent in map(_unpacked, gradients) if tangent is not None])
        for position, gradient in zip(needed, gradients, strict=True):
            spread[position] = gradient
        return (None, *spread)


def _kept_tangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tangents of what the graph of some outputs has saved of results on the way to them.

    Of what an operation saves of its own results (a softmax, say), torch 2.13 registers the tangent with the
    level of forward differentiation, which keeps it until it is left, and with it the tangent's own graph and
    all that this one has saved: the weights of the block.
    """
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    tangents = []
    while nodes:
        node = nodes.pop()
        for name in _names_of_saved(type(node)):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple) else (saved,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tangents.append(_unpacked(tensor)[1])
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return [tangent for tangent in tangents if tangent is not None]


@functools.cache
def _names_of_saved(kind: type) -> tuple[str, ...]:
    """The attributes under which a kind of node has what it saved: torch's own, or a `Function`."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")


def _give_back(tangents: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Empties tangents but those that are `kept`, whatever still refers to them."""
    numbers = {id(tangent) for tangent in kept}
    for tangent in tangents:
        if id(tangent) not in numbers:
            if not tangent._is_view():
                tangent.detach_()
            tangent.data = tangent.new_empty(0)


def _dual_leaves(tensors: Sequence[Tensor], needed: Collection[int]) -> list[Tensor]:
    """The same dual numbers without their graph."""
    tangents = [_unpacked(tensor)[1] for tensor in tensors]
    return [
        leaf if tangent is None else forward_ad.make_dual(leaf, tangent.detach())  # type: ignore[no-untyped-call]
        for leaf, tangent in zip(_leaves(tensors, needed), tangents, strict=True)
    ]


def _unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent; None where there is none."""
    if not tensor.is_floating_point():
        return tensor, None
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, tangent


def _positions(flags: Sequence[bool]) -> tuple[int, ...]:
    return tuple(position for position, flag in enumerate(flags) if flag)


def _leaves(tensors: Sequence[Tensor], needed: Collection[int]) -> list[Tensor]:
    return [
        tensor.detach().requires_grad_(position in needed) if tensor.is_floating_point() else tensor
        for position, tensor in enumerate(tensors)
    ]


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """The vector-Jacobian products; zero where nothing depends on an input."""
    connected = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad and cotangent is not None
    ]
    if not connected:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(
        [output for output, _ in connected],
        list(inputs),
        [cotangent for _, cotangent in connected],
        allow_unused=True,
        materialize_grads=True,
        create_graph=create_graph,
    )
