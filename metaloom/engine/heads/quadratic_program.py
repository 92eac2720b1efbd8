"""Quadratic programs, many side by side, by an interior-point method, and the derivative of their minima.

Shape letters: B programs, N variables, M equations.
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
# Added to the Hessian's diagonal where a search direction is computed, relative to its mean.
DAMPING = 1e-14


def minimum(quadratic: Tensor, linear: Tensor, equalities: Tensor, upper: Tensor) -> Tensor:
    """The x of the least `x^T G x / 2 + c^T x` with `A x = 0` and `x <= h`, `[B, N]`, differentiable once in
    G and c.

    By Mehrotra's primal-dual method (Nocedal & Wright 2006, "Numerical Optimization", algorithm 16.4) to
    rounding. The derivative is that of the conditions of a minimum at the last iterate (implicit
    differentiation: Amos & Kolter 2017, "OptNet", equations 6 to 8); where a variable lies at its bound with
    a multiplier of 0 there is none, and what comes out is between those on its two sides. NaN where the
    method does not get there. Memory and time are those of dense `[N, N]` matrices: B N^3 / 3 multiplications
    an iteration, of which there are 10 to 20.

    Args:
        quadratic: G, `[B, N, N]`, symmetric, positive semidefinite; float64.
        linear: c, `[B, N]`.
        equalities: A, `[B, M, N]`, of full rank; with an x below the bounds.
        upper: h, `[B, N]`.
    """
    x: Tensor = _Minimum.apply(quadratic, linear, equalities, upper)  # type: ignore[no-untyped-call]
    return x


class _Minimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, quadratic: Tensor, linear: Tensor, equalities: Tensor, upper: Tensor) -> Tensor:
        program = _Program(quadratic, linear, equalities, upper)
        point, is_minimum = _followed(program)
        x = point.x.masked_fill(~is_minimum[:, None], torch.nan)
        ctx.save_for_backward(quadratic, equalities, x, point.multipliers / point.slack)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        # dx = M (-dG x - dc), where M r solves (G + Z / S) u + A^T v = r, A u = 0, and is symmetric.
        quadratic, equalities, x, barrier = ctx.saved_tensors
        system = _System.of(quadratic, equalities, barrier)
        u, _ = system.solve(d_x, torch.zeros_like(equalities[..., 0]))
        outer = u[:, :, None] * x[:, None]
        return -(outer + outer.mT) / 2, -u, None, None


@dataclasses.dataclass(frozen=True)
class _Program:
    quadratic: Tensor
    linear: Tensor
    equalities: Tensor
    upper: Tensor


@dataclasses.dataclass(frozen=True)
class _Point:
    """An iterate.

    Attributes:
        x: `[B, N]`.
        prices: nu, the multipliers of the equations, `[B, M]`.
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
    """`(G + diag(barrier)) u + A^T v = r, A u = p`, by factors of two positive definite matrices.

    `H = G + diag(barrier) + rho A^T A` has the same solution, with `r + rho A^T p` for r: without that term a
    variable that the equations alone hold in its place (that of an example inside its margin) would leave H
    singular but for its vanishing barrier, and no digit of the result right (Golub & Greif 2003, "On solving
    block-structured indefinite linear systems").
    """

    factor: Tensor
    equalities: Tensor
    reduced: Tensor
    reduced_factor: Tensor
    rho: Tensor

    @classmethod
    def of(cls, quadratic: Tensor, equalities: Tensor, barrier: Tensor) -> _System:
        scale = quadratic.diagonal(dim1=-2, dim2=-1).mean(1, keepdim=True)  # [B, 1]
        rho = torch.where(scale > 0.0, scale, 1.0)
        hessian = quadratic + rho[..., None] * (equalities.mT @ equalities)
        factor, _ = torch.linalg.cholesky_ex(hessian + torch.diag_embed(barrier + DAMPING * rho))
        reduced = torch.cholesky_solve(equalities.mT, factor)
        reduced_factor, _ = torch.linalg.cholesky_ex(equalities @ reduced)
        return cls(factor, equalities, reduced, reduced_factor, rho)

    def solve(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """u `[B, N]` and v `[B, M]` for r `[B, N]` and p `[B, M]`."""
        sums, rho = sums[..., None], self.rho[..., None]
        u = torch.cholesky_solve(right[..., None] + rho * (self.equalities.mT @ sums), self.factor)
        v = torch.cholesky_solve(self.equalities @ u - sums, self.reduced_factor)
        return (u - self.reduced @ v)[..., 0], v[..., 0]


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
    system = _System.of(program.quadratic, program.equalities, torch.ones_like(program.linear))
    none = torch.zeros_like(program.equalities[..., 0])
    x, prices = system.solve(program.upper - program.linear, none)
    slack = program.upper - x
    return _Point(x, prices, _above_zero(slack), _above_zero(-slack))


def _above_zero(values: Tensor) -> Tensor:
    least = values.amin(1, keepdim=True)
    return torch.where(least > 0.0, values, values - least + 1.0)


def _residuals(program: _Program, point: _Point) -> tuple[Tensor, Tensor, Tensor]:
    """How far the conditions of a minimum are from holding: of the gradient `[B, N]`, the equations `[B, M]`
    and the bounds `[B, N]`."""
    pull = (program.quadratic @ point.x[..., None] + program.equalities.mT @ point.prices[..., None])[..., 0]
    return (
        pull + program.linear + point.multipliers,
        (program.equalities @ point.x[..., None])[..., 0],
        point.x + point.slack - program.upper,
    )


def _is_minimum(program: _Program, point: _Point) -> Tensor:
    """Which iterates fulfil the conditions of a minimum to rounding, `[B]`."""
    residual = torch.cat(_residuals(program, point), dim=1).abs().amax(1)
    largest = torch.cat([point.multipliers, program.linear.abs(), program.upper.abs()], dim=1).amax(1)
    rounding = ROUNDING * program.quadratic.diagonal(dim1=-2, dim2=-1).amax(1)
    is_stationary = residual <= TOLERANCE * (1.0 + largest) + rounding
    # What a gradient is off by moves the slacks, and their products with multipliers.
    return is_stationary & (point.gap[:, 0] <= GAP * (1.0 + largest) + 1e-5 * rounding)


def _direction(program: _Program, point: _Point) -> _Point:
    """Newton's, towards the centre of the path a good deal further on."""
    residuals = _residuals(program, point)
    system = _System.of(program.quadratic, program.equalities, point.multipliers / point.slack)
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
