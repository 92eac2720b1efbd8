"""The thin products of task-batched LoRA, and those of a layer per task, in the shapes that matrix libraries
are fast at.

Shape letters: T tasks, M rows (examples, tokens), D input width, D' output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaloom.engine.kernels.absent import left_absent, none_of_none
from metaloom.engine.kernels.autocast import as_autocast


def low_rank_update(output: Tensor, inputs: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """`output + scale * (x A^T) B^T`, task by task.

    Args:
        output: `[T, M, D']`.
        inputs: x, `[T, M, D]`.
        lora_a: A, `[T, R, D]`.
        lora_b: B, `[T, D', R]`.
    """
    inputs, lora_a = as_autocast(inputs, lora_a)
    low_rank: Tensor = _Project.apply(inputs, lora_a)  # type: ignore[no-untyped-call]
    # Scaled where it is thin.
    output, low_rank, lora_b = as_autocast(output, scale * low_rank, lora_b)
    updated: Tensor = _AddExpanded.apply(  # type: ignore[no-untyped-call]
        output, low_rank, lora_b.transpose(1, 2)
    )
    return updated


def product_per_task(inputs: Tensor, weights: Tensor) -> Tensor:
    """x W^T, task by task: `[T, M, D']` for x `[T, M, D]` and W `[T, D', D]`."""
    product: Tensor = _Project.apply(*as_autocast(inputs, weights))  # type: ignore[no-untyped-call]
    return product


class _Project(torch.autograd.Function):
    """x A^T, `[T, M, R]`, with `dA = g^T x`. Left to itself, torch computes the transpose of that, `x^T g`,
    whose long and narrow result takes a CPU several times as long."""

    @staticmethod
    def forward(inputs: Tensor, lora_a: Tensor) -> Tensor:
        return torch.bmm(inputs, lora_a.transpose(1, 2))

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @none_of_none
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, lora_a = ctx.saved_tensors
        d_inputs = torch.bmm(gradient, lora_a) if ctx.needs_input_grad[0] else None
        d_lora_a = torch.bmm(gradient.transpose(1, 2), inputs) if ctx.needs_input_grad[1] else None
        return d_inputs, d_lora_a

    @staticmethod
    def jvp(ctx: Any, inputs_dot: Tensor | None, lora_a_dot: Tensor | None) -> Tensor:
        inputs, lora_a = ctx.saved_tensors
        return _sum_of_products(None, (inputs_dot, lora_a.transpose(1, 2)), (inputs, _turned(lora_a_dot)))


class _AddExpanded(torch.autograd.Function):
    """`output + l B`, `[T, M, D']`, for l `[T, M, R]` and B `[T, R, D']`: differentiated by `_Project`, for
    the same reason."""

    @staticmethod
    def forward(output: Tensor, low_rank: Tensor, lora_b: Tensor) -> Tensor:
        return torch.baddbmm(output, low_rank, lora_b)

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    @none_of_none
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low_rank, lora_b = ctx.saved_tensors
        d_low_rank = None
        if ctx.needs_input_grad[1]:
            d_low_rank = _Project.apply(gradient, lora_b)  # type: ignore[no-untyped-call]
        d_lora_b = torch.bmm(low_rank.transpose(1, 2), gradient) if ctx.needs_input_grad[2] else None
        return gradient if ctx.needs_input_grad[0] else None, d_low_rank, d_lora_b

    @staticmethod
    def jvp(
        ctx: Any, output_dot: Tensor | None, low_rank_dot: Tensor | None, lora_b_dot: Tensor | None
    ) -> Tensor:
        low_rank, lora_b = ctx.saved_tensors
        return _sum_of_products(output_dot, (low_rank_dot, lora_b), (low_rank, lora_b_dot))


def _sum_of_products(start: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """`start + sum of A B`, without what is not there; something is."""
    total = start
    for one, other in pairs:
        if one is not None and other is not None:
            total = torch.bmm(one, other) if total is None else torch.baddbmm(total, one, other)
    assert total is not None
    return total


def _turned(matrices: Tensor | None) -> Tensor | None:
    return None if matrices is None else matrices.transpose(1, 2)
