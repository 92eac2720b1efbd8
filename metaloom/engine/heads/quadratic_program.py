"""Quadratic programs, many side by side, by an interior-point method, and the derivative of their minima.

Shape letters: B programs, C blocks of S variables, N = C S variables in all, in the order of the blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_ITERATIONS = 60
# Of the conditions of a minimum, relative to their terms; and of the mean product of slack and multiplier,
# which decides how sharply active bounds are told from others in the derivative.
TOLERANCE, GAP = 1e-9, 1e-16
# Of what a product with the Hessian can be off by, relative to the largest on its diagonal.
ROUNDING = 1e-13
# Added to the Hessian's diagonal where a system is factored, relative to its mean; and how often a solution
# is corrected by what it leaves of the system as it is.
DAMPING, NUM_CORRECTIONS = 1e-10, 2


def minimum(quadratic: Tensor, linear: Tensor, is_summed: Tensor, upper: Tensor) -> Tensor:
    """The x of the least `sum_k (x_k^T G_k x_k / 2 + c_k^T x_k)` with `sum_k m_k x_k = 0` and `x <= h`,
    `[B, C, S]`, differentiable once in G and c. Blocks meet in the equations alone, one for each of the S
    places.

    By Mehrotra's primal-dual method (Nocedal & Wright 2006, "Numerical Optimization", algorithm 16.4) to
    rounding. The derivative is that of the conditions of a minimum at the last iterate (implicit
    differentiation: Amos & Kolter 2017, "OptNet", equations 6 to 8); where a variable lies at its bound with
    a multiplier of 0 there is none, and what comes out is between those on its two sides. NaN where the
    method does not get there. Memory and time are those of B C dense `[S, S]` matrices and their inverses, in
    each of 10 to 20 iterations.

    Args:
        quadratic: G, `[B, C, S, S]`, symmetric, positive semidefinite; float64.
        linear: c, `[B, C, S]`.
        is_summed: m, `[B, C, S]`, 1 for the variables that a place's equation sums, of which it has some, and
            0 for the others; with an x below the bounds.
        upper: h, `[B, C, S]`.
    """
    x: Tensor = _Minimum.apply(quadratic, linear, is_summed, upper)  # type: ignore[no-untyped-call]
    return x


class _Minimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, quadratic: Tensor, linear: Tensor, is_summed: Tensor, upper: Tensor) -> Tensor:
        program = _Program(quadratic, linear.flatten(1), is_summed, upper.flatten(1))
        point, is_minimum = _followed(program)
        x = point.x.masked_fill(~is_minimum[:, None], torch.nan)
        ctx.save_for_backward(quadratic, is_summed, x, point.multipliers / point.slack)
        return x.view(linear.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        # dx = M (-dG x - dc), where M r solves (G + Z / S) u + A^T v = r, A u = 0, and is symmetric.
        quadratic, is_summed, x, barrier = ctx.saved_tensors
        system = _System.of(_Program(quadratic, x, is_summed, x), barrier)
        u, _ = system.solve(d_x.flatten(1), torch.zeros_like(is_summed[:, 0]))
        u, x = u.view(d_x.shape), x.view(d_x.shape)
        outer = u[..., :, None] * x[..., None, :]
        return -(outer + outer.mT) / 2, -u, None, None


@dataclasses.dataclass(frozen=True)
class _Program:
    """Attributes:
    quadratic: G, `[B, C, S, S]`.
    linear: c, `[B, N]`.
    is_summed: m, `[B, C, S]`.
    upper: h, `[B, N]`.
    """

    quadratic: Tensor
    linear: Tensor
    is_summed: Tensor
    upper: Tensor

    @property
    def diagonal(self) -> Tensor:
        """That of G, `[B, N]`."""
        return self.quadratic.diagonal(dim1=-2, dim2=-1).flatten(1)

    def pull(self, x: Tensor) -> Tensor:
        """G x, `[B, N]`."""
        blocks = x.view(self.is_summed.shape)[..., None]
        return (self.quadratic @ blocks).flatten(1)

    def sums(self, x: Tensor) -> Tensor:
        """A x, `[B, S]`."""
        return (self.is_summed * x.view(self.is_summed.shape)).sum(1)

    def spread(self, prices: Tensor) -> Tensor:
        """A^T v, `[B, N]`."""
        return (self.is_summed * prices[:, None]).flatten(1)


@dataclasses.dataclass(frozen=True)
class _Point:
    """An iterate.

    Attributes:
        x: `[B, N]`.
        prices: nu, the multipliers of the equations, `[B, S]`.
        slack: s = h - x in the end, `[B, N]`, above 0.
        multipliers: z, of the bounds, `[B, N]`, above 0.
    """

    x: Tensor
    prices: Tensor
    slack: Tensor
    multipliers: Tensor

    @property
    def gap(self) -> Tensor:
        """The mean product of slack and multiplier, `[B, 1]`."""
        return (self.slack * self.multipliers).mean(1, keepdim=True)

    def moved(self, by: _Point, length: Tensor) -> _Point:
        """Further by `length`, `[B, 1]`, times a direction."""
        return _Point(
            self.x + length * by.x,
            self.prices + length * by.prices,
            self.slack + length * by.slack,
            self.multipliers + length * by.multipliers,
        )

    def unless(self, stays: Tensor, other: _Point) -> _Point:
        """This one where `stays`, `[B]`, and the other elsewhere."""
        return _Point(
            torch.where(stays[:, None], self.x, other.x),
            torch.where(stays[:, None], self.prices, other.prices),
            torch.where(stays[:, None], self.slack, other.slack),
            torch.where(stays[:, None], self.multipliers, other.multipliers),
        )

    def longest(self, by: _Point) -> Tensor:
        """How far one may go so, `[B, 1]`, until a slack or multiplier is 0; at most 1."""
        lengths = [
            torch.where(change < 0.0, -value / change, torch.inf).amin(1, keepdim=True)
            for value, change in ((self.slack, by.slack), (self.multipliers, by.multipliers))
        ]
        return torch.minimum(*lengths).clamp(max=1.0)


@dataclasses.dataclass(frozen=True)
class _System:
    """`(G + diag(barrier)) u + A^T v = r, A u = p`, by factors of positive definite matrices of S rows.

    Variables that the equations alone hold in their place (those of examples inside their margins) may leave
    a block singular but for their vanishing barriers. So the factors are of blocks with a little more on the
    diagonal, and what that makes wrong is corrected (iterative refinement: Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", chapter 12).

    Attributes:
        factor: of G_k + diag(barrier_k + damping), `[B, C, S, S]`.
        reduced_factor: of the sum over blocks of these matrices' inverses, where they are summed,
            `[B, S, S]`.
    """

    program: _Program
    barrier: Tensor
    factor: Tensor
    reduced_factor: Tensor

    @classmethod
    def of(cls, program: _Program, barrier: Tensor) -> _System:
        scale = program.diagonal.mean(1, keepdim=True)  # [B, 1]
        damped = barrier + DAMPING * torch.where(scale > 0.0, scale, 1.0)
        blocks = program.quadratic + torch.diag_embed(damped.view(program.is_summed.shape))
        factor, _ = torch.linalg.cholesky_ex(blocks)
        summed = program.is_summed[..., :, None] * program.is_summed[..., None, :]
        reduced = (summed * torch.cholesky_inverse(factor)).sum(1)
        return cls(program, barrier, factor, torch.linalg.cholesky_ex(reduced)[0])

    def solve(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """u `[B, N]` and v `[B, S]` for r `[B, N]` and p `[B, S]`."""
        u, v = self._solved(right, sums)
        for _ in range(NUM_CORRECTIONS):
            left = right - self.program.pull(u) - self.barrier * u - self.program.spread(v)
            more_u, more_v = self._solved(left, sums - self.program.sums(u))
            u, v = u + more_u, v + more_v
        return u, v

    def _solved(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of the damped system."""
        without = self.program.sums(self._divided(right)) - sums
        v = torch.cholesky_solve(without[..., None], self.reduced_factor)[..., 0]
        return self._divided(right - self.program.spread(v)), v

    def _divided(self, right: Tensor) -> Tensor:
        blocks = right.view(self.program.is_summed.shape)[..., None]
        return torch.cholesky_solve(blocks, self.factor).flatten(1)


def _followed(program: _Program) -> tuple[_Point, Tensor]:
    """The last iterates, and which of them are minima, `[B]`."""
    point = _started(program)
    is_minimum = _is_minimum(program, point)
    for _ in range(MAX_ITERATIONS):
        if bool(is_minimum.all()):
            break
        by = _direction(program, point)
        # Those that are there stay: to go on would divide by what has vanished.
        point = point.unless(is_minimum, point.moved(by, 0.995 * point.longest(by)))
        is_minimum = is_minimum | _is_minimum(program, point)
    return point, is_minimum


def _started(program: _Program) -> _Point:
    """The minimum without bounds, where being far above one is dear; slacks and multipliers moved above 0."""
    system = _System.of(program, torch.ones_like(program.linear))
    none = torch.zeros_like(program.is_summed[:, 0])
    x, prices = system.solve(program.upper - program.linear, none)
    slack = program.upper - x
    return _Point(x, prices, _above_zero(slack), _above_zero(-slack))


def _above_zero(values: Tensor) -> Tensor:
    least = values.amin(1, keepdim=True)
    return torch.where(least > 0.0, values, values - least + 1.0)


def _residuals(program: _Program, point: _Point) -> tuple[Tensor, Tensor, Tensor]:
    """How far the conditions of a minimum are from holding: of the gradient `[B, N]`, the equations `[B, S]`
    and the bounds `[B, N]`."""
    return (
        program.pull(point.x) + program.spread(point.prices) + program.linear + point.multipliers,
        program.sums(point.x),
        point.x + point.slack - program.upper,
    )


def _is_minimum(program: _Program, point: _Point) -> Tensor:
    """Which iterates fulfil the conditions of a minimum to rounding, `[B]`."""
    residual = torch.cat(_residuals(program, point), dim=1).abs().amax(1)
    largest = torch.cat([point.multipliers, program.linear.abs(), program.upper.abs()], dim=1).amax(1)
    rounding = ROUNDING * program.diagonal.amax(1)
    is_stationary = residual <= TOLERANCE * (1.0 + largest) + rounding
    # What a gradient is off by moves the slacks, and their products with multipliers.
    return is_stationary & (point.gap[:, 0] <= GAP * (1.0 + largest) + 1e-5 * rounding)


def _direction(program: _Program, point: _Point) -> _Point:
    """Newton's, towards the centre of the path a good deal further on."""
    residuals = _residuals(program, point)
    system = _System.of(program, point.multipliers / point.slack)
    products = point.slack * point.multipliers
    straight = _newton(system, point, residuals, products)
    reached = point.moved(straight, point.longest(straight)).gap
    centring = (reached / point.gap) ** 3
    corrected = products + straight.slack * straight.multipliers - centring * point.gap
    return _newton(system, point, residuals, corrected)


def _newton(
    system: _System, point: _Point, residuals: tuple[Tensor, Tensor, Tensor], products: Tensor
) -> _Point:
    """The step after which, to first order, no residual is left, and no product of slack and multiplier."""
    gradient, sums, bounds = residuals
    barrier = point.multipliers / point.slack
    x, prices = system.solve(-gradient + products / point.slack - barrier * bounds, -sums)
    slack = -bounds - x
    return _Point(x, prices, slack, -products / point.slack - barrier * slack)
