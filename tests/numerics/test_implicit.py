"""The implicit hypergradient against dense matrices and long unrolls, and its solvers on matrices.

Shape letters: T tasks, D unknowns of one task, N iterations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.base import Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Neumann, Solution, Solver
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.base import InnerRule, Penalties
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from tests.numerics.end_problems import (
    EndProblem,
    dense,
    logistic_end_problem,
    quadratic_end_problem,
)
from tests.numerics.problems import assert_gradients_agree, gpt_problem, last, relative_error

EXACT_CG = ConjugateGradient(num_iterations=60, tolerance=1e-13)
PROBLEMS: dict[str, Callable[..., EndProblem]] = {
    "quadratic": quadratic_end_problem,
    "logistic": logistic_end_problem,
}
both = pytest.mark.parametrize("kind", PROBLEMS)


def implicit(problem: EndProblem, solver: Solver, *, damping: float = 0.0) -> MetaGradient:
    return Implicit(solver, damping).meta_gradient(problem.unroll, problem.meta, problem.batch)


def system(problem: EndProblem, *, damping: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """A and b of each task, dense."""
    penalties = problem.unroll.rule.penalties
    diagonal = penalties.proximal + penalties.weight_decay + damping
    at = [dense(problem, phi, task) for task, phi in enumerate(problem.adapted())]
    return [
        (one.hessian + diagonal * torch.eye(len(one.hessian), dtype=torch.float64), one.query_slope)
        for one in at
    ]


def gradient_with(problem: EndProblem, x: list[Tensor]) -> dict[str, Tensor]:
    """The implicit hypergradient for given solutions of A x = b, by dense matrices."""
    init, omega = torch.zeros_like(problem.start()), torch.zeros_like(problem.meta[problem.omega].flatten())
    for task, phi in enumerate(problem.adapted()):
        at = dense(problem, phi, task)
        init = init + problem.unroll.rule.penalties.proximal * x[task]
        omega = omega + at.query_omega - at.mixed @ x[task]
    return problem.named(init, omega)


RULES = {
    "proximal": Sgd(GradientTerms(proximal=0.7)),
    "weak proximal, momentum": Sgd(GradientTerms(proximal=0.1), momentum=0.5),
    "proximal and decay": Sgd(GradientTerms(weight_decay=0.3, proximal=0.4)),
    "clipped": Sgd(GradientTerms(clip_norm=0.5, proximal=0.4)),
}


@both
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("damping", [0.0, 0.35])
def test_with_conjugate_gradients_it_equals_the_dense_solve(kind: str, rule: str, damping: float) -> None:
    problem = PROBLEMS[kind](rule=RULES[rule])
    expected = gradient_with(problem, [torch.linalg.solve(a, b) for a, b in system(problem, damping=damping)])
    actual = implicit(problem, EXACT_CG, damping=damping)
    # The solver stops at 1e-13; the matrices' condition is below 100.
    assert_gradients_agree(actual.gradient, expected, rtol=1e-10)
    assert actual.metrics["solver_residual"].max() < 1e-12
    assert actual.metrics["negative_curvature"].tolist() == [0.0, 0.0, 0.0]


@both
@pytest.mark.parametrize("num_terms", [1, 2, 5])
def test_with_a_neumann_series_it_is_the_sum_of_that_many_terms(kind: str, num_terms: int) -> None:
    problem = PROBLEMS[kind](rule=RULES["proximal"])
    alpha, x = 0.15, []
    for a, b in system(problem, damping=0.2):
        contraction = torch.eye(len(a), dtype=torch.float64) - alpha * a
        x.append(alpha * sum(torch.linalg.matrix_power(contraction, j) @ b for j in range(num_terms)))
    actual = implicit(problem, Neumann(num_terms, alpha), damping=0.2)
    assert_gradients_agree(actual.gradient, gradient_with(problem, x), rtol=1e-12)
    residuals = [
        float(torch.linalg.vector_norm(b - a @ one) / torch.linalg.vector_norm(b))
        for (a, b), one in zip(system(problem, damping=0.2), x, strict=True)
    ]
    assert actual.metrics["solver_residual"].tolist() == pytest.approx(residuals, rel=1e-10)


@both
def test_a_long_neumann_series_equals_the_dense_solve(kind: str) -> None:
    problem = PROBLEMS[kind](rule=RULES["proximal"])
    expected = gradient_with(problem, [torch.linalg.solve(a, b) for a, b in system(problem)])
    # Eigenvalues from 0.7 up: each term shrinks by 1 - 0.15 * 0.7 = 0.9 at least, 300 of them by 1e-14.
    assert_gradients_agree(implicit(problem, Neumann(300, 0.15)).gradient, expected, rtol=1e-10)


@both
@pytest.mark.parametrize("num_iterations", [1, 2, 3])
def test_the_residual_metric_is_that_of_the_dense_system(kind: str, num_iterations: int) -> None:
    problem = PROBLEMS[kind](rule=RULES["weak proximal, momentum"])
    actual = implicit(problem, ConjugateGradient(num_iterations, 0.0))
    expected = []
    for a, b in system(problem):
        x = best_in_krylov_space(a, b, num_iterations)
        expected.append(float(torch.linalg.vector_norm(b - a @ x) / torch.linalg.vector_norm(b)))
    assert min(expected) > 1e-6
    assert actual.metrics["solver_residual"].tolist() == pytest.approx(expected, rel=1e-8)


@both
def test_a_batch_of_tasks_gives_the_sum_of_the_tasks_alone(kind: str) -> None:
    problem = PROBLEMS[kind](rule=RULES["proximal"])
    # Few iterations and a coarse tolerance, so that the tasks stop at different places.
    solver = ConjugateGradient(num_iterations=4, tolerance=0.05)
    together = implicit(problem, solver)
    alone = [implicit(dataclasses.replace(problem, batch=one), solver) for one in problem.batch.split(1)]
    total = {name: torch.stack([part.gradient[name] for part in alone]).sum(0) for name in together.gradient}
    assert_gradients_agree(together.gradient, total, rtol=1e-12)
    for name, value in together.metrics.items():
        assert value.shape == (3,)
        assert value.dtype == torch.float64
        parts = torch.cat([part.metrics[name] for part in alone])
        torch.testing.assert_close(value, parts, rtol=1e-11, atol=1e-15)
    assert len({round(residual, 6) for residual in together.metrics["solver_residual"].tolist()}) == 3


@both
@pytest.mark.parametrize("rule", ["proximal", "proximal and decay", "clipped"])
def test_at_the_minimum_it_equals_a_long_unroll(kind: str, rule: str) -> None:
    problem = PROBLEMS[kind](rule=RULES[rule], num_steps=450, rate=0.15)
    actual = implicit(problem, EXACT_CG)
    expected = Unrolled().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert actual.metrics["stationarity"].max() < 1e-11
    # Both are off by what is left of the way to the minimum.
    assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-9)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-13, atol=0.0)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-12, atol=0.0)


@both
def test_far_from_the_minimum_it_differs_from_the_unroll_and_says_so(kind: str) -> None:
    problem = PROBLEMS[kind](rule=Sgd(GradientTerms(weight_decay=0.2, proximal=0.7)), num_steps=2, rate=0.05)
    actual = implicit(problem, EXACT_CG)
    exact = Unrolled().meta_gradient(problem.unroll, problem.meta, problem.batch)
    for name, value in exact.gradient.items():
        assert relative_error(actual.gradient[name], value) > 0.05, name
    slopes = []
    for task, phi in enumerate(problem.adapted()):
        slope = dense(problem, phi, task).inner_slope + 0.7 * (phi - problem.start()) + 0.2 * phi
        slopes.append(float(torch.linalg.vector_norm(slope)))
    assert actual.metrics["stationarity"].tolist() == pytest.approx(slopes, rel=1e-12)


def test_the_inner_loss_is_that_of_the_last_step() -> None:
    mixed = Rehearsal(ratio=0.4, num_samples=1)
    for num_steps in (2, 3):
        problem = quadratic_end_problem(rule=RULES["proximal"], num_steps=num_steps, rehearsal=mixed)
        expected = gradient_with(problem, [torch.linalg.solve(a, b) for a, b in system(problem)])
        assert_gradients_agree(implicit(problem, EXACT_CG).gradient, expected, rtol=1e-10)


def test_a_task_without_a_slope_adds_nothing_and_spoils_nothing() -> None:
    problem = quadratic_end_problem(rule=RULES["proximal"])
    inputs = problem.batch.query["inputs"].clone()
    inputs[1] = 0.0  # the query loss of this task is constant
    batch = dataclasses.replace(problem.batch, query={**problem.batch.query, "inputs": inputs})
    actual = implicit(dataclasses.replace(problem, batch=batch), EXACT_CG)
    first, _, third = batch.split(1)
    alone = [implicit(dataclasses.replace(problem, batch=one), EXACT_CG).gradient for one in (first, third)]
    total = {name: alone[0][name] + alone[1][name] for name in actual.gradient}
    assert_gradients_agree(actual.gradient, total, rtol=1e-12)
    assert actual.metrics["solver_residual"][1] == 0.0
    assert bool(actual.metrics["solver_residual"].isfinite().all())


def test_the_query_losses_weight_scales_the_whole_gradient() -> None:
    problem = quadratic_end_problem(rule=RULES["proximal"])
    halved = dataclasses.replace(
        problem, unroll=dataclasses.replace(problem.unroll, step_weights=(0, 0, 0, 0.5))
    )
    whole, half = implicit(problem, EXACT_CG), implicit(halved, EXACT_CG)
    assert_gradients_agree(half.gradient, {n: 0.5 * v for n, v in whole.gradient.items()}, rtol=1e-10)
    torch.testing.assert_close(half.losses, 0.5 * whole.losses)


def test_without_a_proximal_term_it_gives_a_backbone_alone() -> None:
    problem = quadratic_end_problem(rule=Sgd(GradientTerms(weight_decay=0.3)))
    actual = implicit(problem.learning("backbone."), EXACT_CG)
    x = [torch.linalg.solve(a, b) for a, b in system(problem)]
    expected = {problem.omega: gradient_with(problem, x)[problem.omega]}
    assert_gradients_agree(actual.gradient, expected, rtol=1e-10)
    with pytest.raises(CapabilityError, match="the initialisation through the proximal term alone"):
        implicit(problem, EXACT_CG)


def test_on_a_transformer_it_gives_every_backbone_weight_and_the_lora_initialisation() -> None:
    problem = gpt_problem(
        step_weights=last(2),
        rule=Sgd(GradientTerms(proximal=3.0)),
        backbone=True,
        tied_embeddings=True,
        num_tasks=3,
    )
    estimator = Implicit(ConjugateGradient(80, 1e-11))
    together = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert together.metrics["solver_residual"].max() < 1e-10
    assert together.metrics["negative_curvature"].sum() == 0.0
    # An inner problem that is nearly at rest: a longer one gives what `unrolled` does.
    long = gpt_problem(
        step_weights=last(80),
        rule=Sgd(GradientTerms(proximal=3.0)),
        backbone=True,
        tied_embeddings=True,
        num_tasks=3,
    )
    at_rest = estimator.meta_gradient(long.unroll, long.meta, long.batch)
    exact = Unrolled().meta_gradient(long.unroll, long.meta, long.batch)
    assert at_rest.metrics["stationarity"].max() < 1e-9
    assert_gradients_agree(at_rest.gradient, exact.gradient, rtol=1e-7)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("grain", ["shared", "per_tensor", "per_tensor_per_step"])
def test_learned_rates_are_refused(grain: str) -> None:
    problem = quadratic_end_problem(rule=RULES["proximal"], grain=grain)  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="implicit gives no gradient of learned inner rates: a minimum"):
        implicit(problem, EXACT_CG)


def test_a_meta_loss_with_terms_at_earlier_steps_is_refused() -> None:
    problem = quadratic_end_problem(rule=RULES["proximal"])
    unroll = dataclasses.replace(problem.unroll, step_weights=(0.0, 0.5, 0.0, 0.5))
    with pytest.raises(CapabilityError, match="implicit looks at the fully adapted weights alone"):
        Implicit().meta_gradient(unroll, problem.meta, problem.batch)


def test_a_decoupled_decay_is_refused() -> None:
    problem = quadratic_end_problem(rule=Decoupled(GradientTerms(proximal=0.5)))
    with pytest.raises(CapabilityError, match=r"a decoupled weight decay of 0\.01 is no term of what is"):
        implicit(problem, EXACT_CG)


@dataclasses.dataclass(frozen=True)
class Decoupled(Sgd):
    """Gradient descent that claims to decay beside the gradient."""

    @property
    def penalties(self) -> Penalties:
        return Penalties(proximal=self.terms.proximal, decoupled_decay=0.01)


# ---------------------------------------------------------------- negative curvature


class HillAdapter(Adapter):
    """One fast weight, with loss `1.5 + cos(phi - b)`: curved downwards near phi = b."""

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        return {"init.phi": torch.full((1,), 0.1, dtype=torch.float64)}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init({"phi": torch.zeros(1, dtype=torch.float64)}, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        losses = 1.5 + torch.cos(fast["phi"] - inputs[..., 0])
        return Readout(torch.stack([torch.zeros_like(losses), -torch.log(torch.expm1(losses))], dim=-1))


@pytest.mark.parametrize("solver", [EXACT_CG, Neumann(5, 0.1)], ids=["conjugate_gradient", "neumann"])
def test_negative_curvature_is_told_for_the_task_that_has_it(solver: Solver) -> None:
    adapter = HillAdapter()
    # phi stays near 0.1: the first task sits on the hill, the second in the valley.
    inputs = torch.tensor([0.0, torch.pi], dtype=torch.float64).view(2, 1, 1)
    part = {"inputs": inputs, "targets": torch.ones(2, 1, dtype=torch.int64)}
    unroll = Unroll(
        Learner(adapter, Precision("float64")),
        Sgd(GradientTerms(proximal=0.5)),
        Rates(0.01, "none", 1),
        (0.0, 1.0),
    )
    meta = adapter.meta_parameters(init=True, backbone=False)
    result = Implicit(solver).meta_gradient(unroll, meta, TaskBatch((0, 1), part, part))
    assert result.metrics["negative_curvature"].tolist() == [1.0, 0.0]
    assert bool(result.gradient["init.phi"].isfinite().all())
    if solver is EXACT_CG:
        assert result.metrics["solver_residual"].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)


# ---------------------------------------------------------------- the solvers, on matrices


def matrices(condition: float, *, dim: int = 12, num_tasks: int = 4) -> tuple[Tensor, Tensor]:
    """Random symmetric A `[T, D, D]` with eigenvalues from 1 / `condition` to 1, and b `[T, D]`."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn((num_tasks, dim, dim), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(noise)[0]
    values = torch.logspace(-1, 0, dim, dtype=torch.float64, base=condition)
    a = vectors @ torch.diag(values) @ vectors.transpose(1, 2)
    return a, torch.randn((num_tasks, dim), generator=generator, dtype=torch.float64)


def solve(solver: Solver, a: Tensor, b: Tensor) -> Solution:
    return solver.solve(lambda v: torch.einsum("tij,tj->ti", a, v), b)


def best_in_krylov_space(a: Tensor, b: Tensor, num_iterations: int) -> Tensor:
    """argmin of `x A x / 2 - b x` over the span of b, A b, ..., A^(N-1) b."""
    powers = torch.stack([torch.linalg.matrix_power(a, j) @ b for j in range(num_iterations)], dim=1)
    basis = torch.linalg.qr(powers)[0]
    best: Tensor = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ b)
    return best


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_each_iterate_of_conjugate_gradients_is_the_best_of_its_krylov_space(num_iterations: int) -> None:
    a, b = matrices(30.0)
    solution = solve(ConjugateGradient(num_iterations, 0.0), a, b)
    for task in range(len(b)):
        expected = best_in_krylov_space(a[task], b[task], num_iterations)
        # Krylov bases of powers lose about a digit each.
        assert relative_error(solution.x[task], expected) < 1e-9


@pytest.mark.parametrize(("condition", "num_iterations"), [(1.0, 1), (10.0, 12), (1e3, 16), (1e5, 60)])
def test_conjugate_gradients_converge_to_the_dense_solution(condition: float, num_iterations: int) -> None:
    a, b = matrices(condition)
    solution = solve(ConjugateGradient(num_iterations, 1e-11), a, b)
    residuals = torch.linalg.vector_norm(torch.einsum("tij,tj->ti", a, solution.x) - b, dim=1)
    assert (residuals / torch.linalg.vector_norm(b, dim=1)).max() < 1e-9
    # A residual counts for the condition times as much in the solution.
    error = relative_error(solution.x, torch.linalg.solve(a, b[..., None])[..., 0])
    assert error < 1e-10 * condition
    assert not bool(solution.negative_curvature.any())


def test_a_task_that_has_converged_stops_moving_while_the_others_go_on() -> None:
    a, b = matrices(1e3)
    a[1] = 2.0 * torch.eye(12, dtype=torch.float64)  # one iteration is enough
    b[2] = 0.0  # none is needed
    short, long = (solve(ConjugateGradient(n, 1e-8), a, b) for n in (1, 30))
    assert torch.equal(long.x[1], short.x[1])
    torch.testing.assert_close(long.x[1], b[1] / 2.0, rtol=1e-14, atol=0.0)
    assert bool((long.x[2] == 0.0).all())
    assert relative_error(long.x[0], short.x[0]) > 0.1
    # Each is what it is alone, bit for bit.
    for task in range(4):
        alone = solve(ConjugateGradient(30, 1e-8), a[[task]], b[[task]])
        torch.testing.assert_close(long.x[[task]], alone.x, rtol=1e-9, atol=0.0)


def test_conjugate_gradients_count_no_product_after_all_have_converged() -> None:
    a, b = matrices(1.0)
    calls = []

    def multiply(vectors: Tensor) -> Tensor:
        calls.append(1)
        return torch.einsum("tij,tj->ti", a, vectors)

    ConjugateGradient(50, 1e-8).solve(multiply, b)
    assert len(calls) == 1


@pytest.mark.parametrize("worst", [-0.5, 0.0])
def test_a_direction_without_positive_curvature_stops_its_task_alone(worst: float) -> None:
    a, b = matrices(10.0)
    a[2] = torch.diag(torch.tensor([worst, *(1.0,) * 11]))
    b[2] = torch.eye(12, dtype=torch.float64)[0]  # the first direction is the bad one
    a[3] = torch.diag(torch.tensor([-1.0, *(1.0,) * 11]))
    b[3] = 1.0  # met later: the first direction has curvature 10 / 12
    solution = solve(ConjugateGradient(40, 1e-12), a, b)
    assert solution.negative_curvature.tolist() == [False, False, True, True]
    assert bool((solution.x[2] == 0.0).all())
    torch.testing.assert_close(solution.x[3], torch.full((12,), 1.2, dtype=torch.float64))
    dense_solution = torch.linalg.solve(a[:2], b[:2, :, None])[..., 0]
    assert relative_error(solution.x[:2], dense_solution) < 1e-10


@pytest.mark.parametrize("solver", [ConjugateGradient(40, 1e-12), Neumann(400, 1.0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_own_task(solver: Solver, bad: float) -> None:
    a, b = matrices(10.0)
    b[1, 3] = bad
    x = solve(solver, a, b).x
    # A zero instead would pass for a gradient.
    assert not bool(x[1].isfinite().all())
    assert not bool(solve(solver, a[[1]], b[[1]]).x.isfinite().all())
    rest = [0, 2, 3]
    assert relative_error(x[rest], torch.linalg.solve(a, b[..., None])[rest, :, 0]) < 1e-10


def test_a_neumann_series_with_too_large_a_step_diverges() -> None:
    a, b = matrices(10.0)
    x = solve(Neumann(200, 2.5), a, b).x
    assert float(torch.linalg.vector_norm(x)) > 1e10
    converged = solve(Neumann(400, 1.9), a, b).x
    assert relative_error(converged, torch.linalg.solve(a, b[..., None])[..., 0]) < 1e-9


def test_a_rule_must_say_what_it_adds_to_the_inner_loss() -> None:
    assert "penalties" in InnerRule.__abstractmethods__
    assert Sgd(GradientTerms(weight_decay=0.1, proximal=0.2)).penalties == Penalties(
        proximal=0.2, weight_decay=0.1
    )
