"""Gathering shards and summing into them, as linear operators that can be differentiated any number of times.

On W ranks, with x_r the shard `[P]` of rank r, and Y_r the whole `[W * P]` that rank r holds a copy or a part
of a sum of:

    gather:           Y_r = [x_0 ... x_{W-1}]           the same on every rank
    scatter_sum:      x_r = sum_s Y_s[r P : (r + 1) P]

Each is the transpose of the other, taken over all ranks at once. A linear operator's derivative in forward
mode is itself, applied to the tangent, and in reverse mode its transpose: so the pair is closed under
differentiation, and gradients of any order come through it exactly. torch's own way to weights that are
sharded (FSDP2) has no second derivative.

Every rank of the group must make the same calls in the same order, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function


class Wire(Protocol):
    """What carries tensors between the ranks of a group."""

    def gather(self, shard: Tensor) -> Tensor:
        """All ranks' `[P]` in the order of ranks, `[W * P]`."""

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """This rank's part, `[P]`, of the sum of all ranks' `[W * P]`."""


def gather(shard: Tensor, wire: Wire, *, fetched: Callable[[], Tensor] | None = None) -> Tensor:
    """All ranks' shards, one after the other.

    Args:
        shard: `[P]`, as long on every rank.
        fetched: gives the result, where it has been gathered ahead of need.

    Returns:
        `[W * P]`.
    """
    whole: Tensor = _Gather.apply(shard, wire, fetched)  # type: ignore[no-untyped-call]
    return whole


def scatter_sum(whole: Tensor, wire: Wire) -> Tensor:
    """This rank's part of the sum over ranks.

    Args:
        whole: `[W * P]`.

    Returns:
        `[P]`.
    """
    shard: Tensor = _ScatterSum.apply(whole, wire)  # type: ignore[no-untyped-call]
    return shard


class _Gather(Function):
    @staticmethod
    def forward(shard: Tensor, wire: Wire, fetched: Callable[[], Tensor] | None) -> Tensor:
        return wire.gather(shard) if fetched is None else fetched()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Wire, object], output: Tensor) -> None:
        ctx.wire = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(gradient, ctx.wire), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return gather(tangent, ctx.wire)


class _ScatterSum(Function):
    @staticmethod
    def forward(whole: Tensor, wire: Wire) -> Tensor:
        return wire.scatter_sum(whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Wire], output: Tensor) -> None:
        ctx.wire = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather(gradient, ctx.wire), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return scatter_sum(tangent, ctx.wire)
