"""Activations with a second derivative in closed form: one fused pass backward, few beyond it.

For y = f(x), dx = f'(x) dy; along a direction u of x and w of dy the latter moves by
f'(x) w + f''(x) dy u, which is both its forward-mode rule and, by symmetry, its reverse-mode one.
torch's own double backward of these takes a dozen passes over the activations, and `silu` has no
forward-mode rule for its backward pass at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.kernels.absent import left_absent, none_of_none
from metaloom.engine.kernels.order import last_derivative


class _Rule(NamedTuple):
    """f, `(dy, x) -> f'(x) dy` in one fused kernel, and f''."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`: x Phi(x), or its approximation by tanh."""
    if approximate not in _GELUS:
        return F.gelu(x, approximate=approximate)  # which says what is wrong with it
    rule = _GELUS[approximate]
    output: Tensor = _Activation.apply(x, rule)  # type: ignore[no-untyped-call]
    return output


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`, x sigmoid(x), never in place."""
    output: Tensor = _Activation.apply(x, _SILU)  # type: ignore[no-untyped-call]
    return output


def written_out_silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`silu` from elementary functions, for `torch.func.vmap`."""
    return x * torch.sigmoid(x)


def written_out_mish(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.mish`, x tanh(softplus(x)), from elementary functions, never in place: its
    backward pass has no forward-mode rule."""
    return x * F.softplus(x).tanh()


class _Activation(torch.autograd.Function):
    """x -> f(x)."""

    @staticmethod
    def forward(x: Tensor, rule: _Rule) -> Tensor:
        return rule.value(x)

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Rule], output: Tensor) -> None:
        x, ctx.rule = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    @none_of_none
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient: Tensor = _ActivationGradient.apply(  # type: ignore[no-untyped-call]
            d_output, *ctx.saved_tensors, ctx.rule
        )
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        tangent: Tensor = ctx.rule.gradient(x_dot, x)
        return tangent


class _ActivationGradient(torch.autograd.Function):
    """(dy, x) -> f'(x) dy."""

    @staticmethod
    def forward(d_output: Tensor, x: Tensor, rule: _Rule) -> Tensor:
        return rule.gradient(d_output, x)

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Rule], output: Tensor) -> None:
        d_output, x, ctx.rule = inputs
        ctx.save_for_backward(d_output, x)
        ctx.save_for_forward(d_output, x)

    @staticmethod
    @none_of_none
    @last_derivative
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        d_output, x = ctx.saved_tensors
        second = ctx.rule.second(x).mul_(d_output).mul_(direction)
        return ctx.rule.gradient(direction, x), second, None

    @staticmethod
    def jvp(ctx: Any, d_output_dot: Tensor | None, x_dot: Tensor | None, _: None) -> Tensor:
        d_output, x = ctx.saved_tensors
        parts: list[Tensor] = []
        if d_output_dot is not None:
            parts.append(ctx.rule.gradient(d_output_dot, x))
        if x_dot is not None:
            parts.append(ctx.rule.second(x).mul_(d_output).mul_(x_dot))
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _gelu_second(x: Tensor) -> Tensor:
    """f''(x) = phi(x) (2 - x^2), phi the normal density."""
    squared = x * x
    density = squared.mul(-0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi))
    return squared.neg_().add_(2.0).mul_(density)


def _gelu_tanh_second(x: Tensor) -> Tensor:
    """With t = tanh(u), u = c (x + a x^3): f'' = (1 - t^2) (u' + x u'' / 2 - x t u'^2)."""
    c, a = math.sqrt(2.0 / math.pi), 0.044715
    squared = x * x
    t = torch.tanh(c * x * (1.0 + a * squared))
    slope = c * (1.0 + 3.0 * a * squared)
    # x u'' / 2 = 3 c a x^2
    inner = slope + 3.0 * c * a * squared - x * t * slope.square()
    return inner.mul_(1.0 - t * t)


def _silu_second(x: Tensor) -> Tensor:
    """f'' = s (1 - s) (2 + x (1 - 2 s)), s the sigmoid."""
    s = torch.sigmoid(x)
    return (2.0 + x * (1.0 - 2.0 * s)).mul_(s).mul_(1.0 - s)


_GELU = _Rule(F.gelu, lambda dy, x: torch.ops.aten.gelu_backward(dy, x), _gelu_second)
_GELU_TANH = _Rule(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    _gelu_tanh_second,
)
_GELUS = {"none": _GELU, "tanh": _GELU_TANH}
_SILU = _Rule(F.silu, lambda dy, x: torch.ops.aten.silu_backward(dy, x), _silu_second)
