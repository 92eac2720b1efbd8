"""Linear layers in float32 on a CPU, by oneDNN.

torch multiplies float32 matrices on a CPU by MKL, which on processors that are not Intel's leaves their
AVX-512 units unused. oneDNN, which torch has on board for convolutions, uses them: twice the rate on such a
machine, and no loss on others.

Shape letters: M rows, K input width, N output width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.kernels.absent import left_absent, none_of_none
from metaloom.engine.kernels.wanted import wanted


def _product_flops(a: Sequence[int], b: Sequence[int], *rest: Any, out_shape: Any = None) -> int:
    """Operations of one product from its shapes, which torch's counters do not know of."""
    return 2 * a[0] * a[1] * b[0]


def product_flops() -> dict[Any, Any]:
    """For counters of floating-point operations: torch's own do not know of this product."""
    return {_onednns_product(): _product_flops} if _has_onednn() else {}


# Below so many multiplications a product takes less time than what surrounds it.
SMALLEST_PRODUCT = 2**18


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, x W^T + b; differentiable any number of times, in both modes."""
    num_products = inputs.numel() * weight.shape[0]
    if weight.ndim != 2 or num_products < SMALLEST_PRODUCT or not _is_onednns(inputs, weight):
        return F.linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    output: Tensor = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    if bias is not None:
        output = output + bias
    return output.view(*inputs.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """A B^T, `[M, N]`, for A `[M, K]` and B `[N, K]`. Its derivatives are products of the same form, so that
    it is closed under differentiation: `dA = G B = G (B^T)^T`, `dB = G^T A = G^T (A^T)^T`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiplied(a, b)

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @none_of_none
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        d_a: Tensor | None = None
        d_b: Tensor | None = None
        wants_a, wants_b = wanted(ctx)
        if wants_a:
            d_a = _laid_out_as(a, gradient, b.t())
        if wants_b:
            d_b = _laid_out_as(b, gradient.t(), a.t())
        return d_a, d_b

    @staticmethod
    def jvp(ctx: Any, a_dot: Tensor | None, b_dot: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        parts = []
        if a_dot is not None:
            parts.append(_multiplied(a_dot, b))
        if b_dot is not None:
            parts.append(_multiplied(a, b_dot))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _laid_out_as(like: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A B^T, by columns where `like` is: what it is added to and multiplied with is laid out so too, and
    elementwise operations on two layouts take several times as long."""
    if _is_by_columns(like):
        turned: Tensor = _Product.apply(b, a)  # type: ignore[no-untyped-call]
        return turned.t()
    product: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return product


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = _onednns_product()(_dense(a), _dense(b), None, "none", [], "")
    return product


def _onednns_product() -> Any:
    return torch.ops.mkldnn._linear_pointwise


def _dense(matrix: Tensor) -> Tensor:
    """The matrix by rows or by columns, without gaps that oneDNN does not take (expanded gradients have)."""
    return matrix if _is_by_rows(matrix) or _is_by_columns(matrix) else matrix.contiguous()


def _is_by_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _is_by_columns(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) >= matrix.shape[0]


def _is_onednns(*tensors: Tensor) -> bool:
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    )


@functools.cache
def _has_onednn() -> bool:
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_there and "AVX512" in torch.backends.cpu.get_cpu_capability()
