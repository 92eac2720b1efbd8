"""The estimators against the closed form on a quadratic problem, computed with dense matrices.

The inner and outer losses of a task are mean squares, `1/N sum_n (a_n phi + c_n omega - b_n)^2 / 2`, so
that each inner step is linear and its Jacobian by all meta-parameters is a product of dense matrices,
carried forward here: another method (forward, not reverse), by another library (numpy).

Shape letters: T tasks, N examples, D fast weights, E backbone weights, P meta-parameters, K inner steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaloom.engine.adapters.base import Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import Readout
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from tests.numerics.problems import FOR_EVERYTHING, assert_gradients_agree, relative_error

Array = NDArray[np.float64]
FAST = {"x": 3, "y": 2}
D = sum(FAST.values())
E = 2
RATE = 0.3
OFFSET = 0.5
HAS_SECOND_ORDER = ("init.x", "init.y", "backbone.omega")


class QuadraticAdapter(Adapter):
    """Two classes, with logits whose cross-entropy is `(a phi + c omega - b)^2 / 2 + OFFSET`.

    With q that loss, logits (0, -log(e^q - 1)) and the second class as target: the cross-entropy is
    log(1 + e^q - 1) = q. So the library's own loss is part of what is tested.
    """

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        names = [*(f"init.{name}" for name in FAST if init), *(["backbone.omega"] if backbone else [])]
        return {name: torch.zeros(FAST.get(name[5:], E), dtype=torch.float64) for name in names}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        initial = {name: torch.zeros(size, dtype=torch.float64) for name, size in FAST.items()}
        return broadcast_init(initial, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        a, c, b = inputs[..., :D], inputs[..., D : D + E], inputs[..., D + E]
        phi = torch.cat([fast[name] for name in FAST], dim=1)
        residuals = torch.einsum("tnd,td->tn", a, phi) + c @ meta["backbone.omega"] - b
        losses = 0.5 * residuals**2 + OFFSET
        return Readout(torch.stack([torch.zeros_like(losses), -torch.log(torch.expm1(losses))], dim=-1))


@dataclasses.dataclass(frozen=True)
class Quadratic:
    unroll: Unroll
    meta: dict[str, Tensor]
    batch: TaskBatch


def quadratic(
    weights: tuple[float, ...],
    *,
    grain: Grain = "none",
    rule: Sgd | None = None,
    rehearsal: Rehearsal | None = None,
    num_tasks: int = 2,
) -> Quadratic:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return 0.8 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def part(num_examples: int) -> dict[str, Tensor]:
        targets = torch.ones((num_tasks, num_examples), dtype=torch.int64)
        return {"inputs": noise(num_tasks, num_examples, D + E + 1), "targets": targets}

    adapter = QuadraticAdapter()
    rates = Rates(RATE, grain, len(weights) - 1)
    meta = adapter.meta_parameters(init=True, backbone=True)
    meta |= rates.meta_parameters(adapter.init({}, 1))
    batch = TaskBatch(
        tuple(range(num_tasks)),
        support=part(4),
        query=part(3),
        rehearsal=None if rehearsal is None else part(5),
    )
    unroll = Unroll(Learner(adapter, Precision("float64"), rehearsal), rule or Sgd(), rates, weights)
    return Quadratic(unroll, {name: value + 0.5 * noise(*value.shape) for name, value in meta.items()}, batch)


def dense_hypergradient(problem: Quadratic, *, first_order: bool) -> tuple[dict[str, Tensor], list[float]]:
    """The hypergradient summed over tasks, and each task's meta-loss. Where `first_order`, the inner
    gradients count as constants."""
    columns, position = {}, 0
    for name, value in problem.meta.items():
        columns[name] = slice(position, position + value.numel())
        position += value.numel()
    total = np.zeros(position)
    losses = []
    for task in range(problem.batch.num_tasks):
        loss, gradient = _one_task(problem, task, columns, position, first_order)
        losses.append(loss)
        total += gradient
    named = {
        name: torch.from_numpy(total[columns[name]]).reshape(value.shape)
        for name, value in problem.meta.items()
    }
    return named, losses


def _one_task(
    problem: Quadratic, task: int, columns: Mapping[str, slice], num_meta: int, first_order: bool
) -> tuple[float, Array]:
    unroll, meta = problem.unroll, {name: value.numpy() for name, value in problem.meta.items()}
    rule = unroll.rule
    assert isinstance(rule, Sgd)
    omega = meta["backbone.omega"]
    j_omega = np.zeros((E, num_meta))
    j_omega[:, columns["backbone.omega"]] = np.eye(E)
    phi = np.concatenate([meta[f"init.{name}"] for name in FAST])
    j_phi = np.zeros((D, num_meta))
    j_phi[:, :D] = np.eye(D)  # init.x and init.y come first
    m, j_m = np.zeros(D), np.zeros((D, num_meta))
    loss, gradient = 0.0, np.zeros(num_meta)
    for step, weight in enumerate(unroll.step_weights):
        H, B, h, constant = _mean_square(problem.batch.query["inputs"][task].numpy(), omega)
        slope = H @ phi + h
        residual_omega = B.T @ phi + _omega_slope(problem.batch.query["inputs"][task].numpy(), omega)
        loss += weight * (0.5 * phi @ H @ phi + h @ phi + constant)
        gradient += weight * (slope @ j_phi + residual_omega @ j_omega)
        if step == unroll.num_steps:
            break
        H, B, h = _inner(problem, task, step, omega)
        g = H @ phi + h
        j_g = np.zeros_like(j_phi) if first_order else H @ j_phi + B @ j_omega
        m, j_m = (
            rule.momentum * m + g + rule.terms.weight_decay * phi,
            rule.momentum * j_m + j_g + rule.terms.weight_decay * j_phi,
        )
        eta, j_eta = _rates(problem, step, meta, columns, num_meta)
        phi, j_phi = phi - eta * m, j_phi - eta[:, None] * j_m - m[:, None] * j_eta
    return loss, gradient


def _mean_square(rows: Array, omega: Array) -> tuple[Array, Array, Array, float]:
    """H, B, h and a constant of `phi H phi / 2 + h phi + constant`; h = B omega - mean(a b)."""
    a, c, b = rows[:, :D], rows[:, D : D + E], rows[:, D + E]
    at_zero = c @ omega - b
    n = len(rows)
    return a.T @ a / n, a.T @ c / n, a.T @ at_zero / n, float(at_zero @ at_zero) / (2 * n) + OFFSET


def _omega_slope(rows: Array, omega: Array) -> Array:
    c, b = rows[:, D : D + E], rows[:, D + E]
    slope: Array = c.T @ (c @ omega - b) / len(rows)
    return slope


def _inner(problem: Quadratic, task: int, step: int, omega: Array) -> tuple[Array, Array, Array]:
    H, B, h, _ = _mean_square(problem.batch.support["inputs"][task].numpy(), omega)
    rehearsal = problem.unroll.learner.rehearsal
    if rehearsal is None:
        return H, B, h
    assert problem.batch.rehearsal is not None
    old = problem.batch.rehearsal["inputs"][task].numpy()
    rows = list(itertools.islice(itertools.cycle(range(len(old))), (step + 1) * rehearsal.num_samples))
    H2, B2, h2, _ = _mean_square(old[rows[-rehearsal.num_samples :]], omega)
    r = rehearsal.ratio
    return (1 - r) * H + r * H2, (1 - r) * B + r * B2, (1 - r) * h + r * h2


def _rates(
    problem: Quadratic, step: int, meta: Mapping[str, Array], columns: Mapping[str, slice], num_meta: int
) -> tuple[Array, Array]:
    """Each fast weight's rate `[D]` and its Jacobian `[D, P]`: the rates are kept as logarithms."""
    eta, jacobian = np.empty(D), np.zeros((D, num_meta))
    row = 0
    for name, size in FAST.items():
        grain = problem.unroll.rates.grain
        rows = slice(row, row + size)
        row += size
        if grain == "none":
            eta[rows] = RATE
            continue
        key = "rates.shared" if grain == "shared" else f"rates.{name}"
        logs = np.atleast_1d(meta[key])
        entry = step if grain == "per_tensor_per_step" else 0
        eta[rows] = math.exp(logs[entry])
        jacobian[rows, columns[key].start + entry] = eta[rows]
    return eta, jacobian


WEIGHTS = {
    "K=1": (0.0, 1.0),
    "K=3": (0.0, 0.0, 0.0, 1.0),
    "K=8": step_weights("last", 8),
    "K=3, multi-step": step_weights("uniform", 3),
    "K=3, uneven": (0.4, 0.0, 1.3, 0.6),
}
RULES = {
    "plain": Sgd(),
    "momentum": Sgd(momentum=0.8),
    "both": Sgd(GradientTerms(weight_decay=0.1), momentum=0.6),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grain", ["none", "shared", "per_tensor", "per_tensor_per_step"])
def test_the_hypergradient_on_a_quadratic_equals_the_closed_form(
    weights: str, rule: str, grain: Grain
) -> None:
    problem = quadratic(WEIGHTS[weights], grain=grain, rule=RULES[rule])
    expected, losses = dense_hypergradient(problem, first_order=False)
    for estimator in ("unrolled", "rematerialized", "mixed_mode"):
        actual = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
        # Rounding of 1e-16 in log(e^q - 1) and its derivatives, over at most 8 steps.
        assert_gradients_agree(actual.gradient, expected, rtol=1e-11)
        assert actual.losses.tolist() == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
def test_first_order_on_a_quadratic_equals_the_closed_form_with_constant_inner_gradients(
    weights: str, rule: str
) -> None:
    problem = quadratic(WEIGHTS[weights], grain="per_tensor_per_step", rule=RULES[rule])
    expected, losses = dense_hypergradient(problem, first_order=True)
    exact, _ = dense_hypergradient(problem, first_order=False)
    actual = HYPERGRADIENTS["first_order"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert_gradients_agree(actual.gradient, expected, rtol=1e-11)
    assert actual.losses.tolist() == pytest.approx(losses, rel=1e-12)
    for name in HAS_SECOND_ORDER:
        assert relative_error(expected[name], exact[name]) > 1e-2, name


def test_first_order_of_plain_gradient_descent_is_the_query_gradient_at_the_adapted_weights() -> None:
    problem = quadratic(step_weights("last", 3), num_tasks=1)
    rows, omega = problem.batch.query["inputs"][0].numpy(), problem.meta["backbone.omega"].numpy()
    phi = np.concatenate([problem.meta[f"init.{name}"].numpy() for name in FAST])
    for step in range(3):
        H, _, h = _inner(problem, 0, step, omega)
        phi = phi - RATE * (H @ phi + h)
    H, _, h, _ = _mean_square(rows, omega)
    x, y = np.split(H @ phi + h, [FAST["x"]])
    gradient = HYPERGRADIENTS["first_order"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    expected = {"init.x": torch.from_numpy(x), "init.y": torch.from_numpy(y)}
    assert_gradients_agree({name: gradient.gradient[name] for name in expected}, expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
@pytest.mark.parametrize("num_sequences", [1, 2, 5, 7])
def test_rehearsal_on_a_quadratic_mixes_the_losses_and_reads_its_data_in_cycles(
    estimator: str, num_sequences: int
) -> None:
    problem = quadratic(
        step_weights("uniform", 4),
        grain="shared",
        rule=RULES["both"],
        rehearsal=Rehearsal(ratio=0.35, num_samples=num_sequences),
    )
    expected, losses = dense_hypergradient(problem, first_order=False)
    actual = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert_gradients_agree(actual.gradient, expected, rtol=1e-11)
    assert actual.losses.tolist() == pytest.approx(losses, rel=1e-12)


def test_the_estimators_agree_on_the_metrics_after_adaptation() -> None:
    problem = quadratic((0.0, 0.5, 0.5))
    _, after = dense_hypergradient(quadratic((0.0, 0.0, 1.0)), first_order=False)
    for name in FOR_EVERYTHING:
        metrics = HYPERGRADIENTS[name]().meta_gradient(problem.unroll, problem.meta, problem.batch).metrics
        assert metrics["loss_after"].tolist() == pytest.approx(after, rel=1e-12), name
