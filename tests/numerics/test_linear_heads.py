"""Linear heads against dense implementations in numpy, and their gradients against differences.

Shape letters: T tasks, S support examples, Q query examples, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.linear_head import LinearHead
from metaloom.engine.backbone import Backbone
from metaloom.engine.heads.base import HeadSolver, Support
from metaloom.engine.heads.logistic import LogisticSolver
from metaloom.engine.heads.parameters import HeadParameters
from metaloom.engine.heads.quadratic_program import minimum
from metaloom.engine.heads.ridge import RidgeSolver
from metaloom.engine.heads.svm import SvmSolver
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import IGNORE, CrossEntropy, MeanSquaredError
from metaloom.engine.precision import ComputeFormat, Precision
from metaloom.models.mlp import Mlp

Array = npt.NDArray[np.float64]
T, C, Q = 2, 3, 5
LAMBDA, SCALE = 0.7, 1.6
SOLVERS: dict[str, HeadSolver] = {
    "ridge": RidgeSolver(),
    "logistic": LogisticSolver(num_steps=3),
    "svm": SvmSolver(),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)
# Fewer examples than dims, and more.
both_forms = pytest.mark.parametrize(("num_support", "width"), [(6, 9), (12, 4)])


def algorithm(
    name: str, width: int, *, num_outputs: int = C, compute: ComputeFormat = "float64"
) -> LinearHead:
    torch.manual_seed(0)
    network = Mlp(num_inputs=4, width=width, num_layers=2, num_outputs=C, activation="tanh")
    network.to(Precision(compute).storage_dtype)
    backbone = Backbone(
        network, Structure(("blocks.0", "blocks.1"), network.heads), "tasks", Precision(compute)
    )
    parameters = HeadParameters(LAMBDA, SCALE, learned=("regulariser", "scale"))
    return LinearHead(backbone, SOLVERS[name], parameters, CrossEntropy(), num_outputs)


def batch(num_support: int, *, num_classes: int = C) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(targets: Tensor) -> dict[str, Tensor]:
        shape = (T, targets.shape[1], 4)
        return {
            "inputs": torch.randn(shape, dtype=torch.float64, generator=generator),
            "targets": targets % num_classes,
        }

    query = torch.randint(C, (T, Q), generator=generator)
    return TaskBatch(tuple(range(T)), part(torch.arange(num_support).expand(T, -1)), part(query))


def features(num_support: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(T, num_support + Q, width, dtype=torch.float64, generator=generator)
    return both[:, :num_support], both[:, num_support:]


# ---------------------------------------------------------------- dense implementations


def ridge_by_least_squares(X: Array, Y: Array, regulariser: float) -> Array:
    """With further rows sqrt(lambda) I, whose targets are 0."""
    D, C = X.shape[1], Y.shape[1]
    rows, targets = np.vstack([X, math.sqrt(regulariser) * np.eye(D)]), np.vstack([Y, np.zeros((D, C))])
    solution: Array = np.linalg.lstsq(rows, targets)[0]
    return solution


def logistic_by_weighted_least_squares(X: Array, Y: Array, regulariser: float) -> Array:
    """The paper's steps as they stand: weights s, targets X w + (t - m) / s."""
    columns = []
    for t in Y.T:
        w = np.zeros(X.shape[1])
        for _ in range(3):
            m = 1.0 / (1.0 + np.exp(-X @ w))
            s = m * (1.0 - m)
            z = X @ w + (t - m) / s
            w = np.linalg.inv((X.T * s) @ X + regulariser * np.eye(X.shape[1])) @ (X.T * s) @ z
        columns.append(w)
    return np.stack(columns, axis=1)


def svm_by_projected_gradients(X: Array, Y: Array, regulariser: float) -> Array:
    """The dual's maximum by accelerated projected gradients."""
    K, price = X @ X.T, 1.0 / regulariser
    upper, rate = price * Y, 1.0 / np.linalg.norm(K, 2)

    def projected(a: Array) -> Array:
        """The nearest point that is allowed, `min(a - shift, upper)`; the shift of a row by bisection."""
        low, high = (a - upper).min(1, keepdims=True) - 1.0 - price, a.max(1, keepdims=True) + 1.0
        for _ in range(55):
            middle = (low + high) / 2
            is_above = np.minimum(a - middle, upper).sum(1, keepdims=True) > 0.0
            low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
        nearest: Array = np.minimum(a - high, upper)
        return nearest

    a = ahead = np.zeros_like(Y)
    momentum = 1.0
    for _ in range(600):
        following = projected(ahead - rate * (K @ ahead - Y))
        if float(((ahead - following) * (following - a)).sum()) > 0.0:
            momentum, ahead = 1.0, following  # start again where it overshoots
        else:
            further = (1.0 + math.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
            ahead = following + (momentum - 1.0) / further * (following - a)
            momentum = further
        a = following
    weights: Array = X.T @ a
    return weights


DENSE: dict[str, Callable[[Array, Array, float], Array]] = {
    "ridge": ridge_by_least_squares,
    "logistic": logistic_by_weighted_least_squares,
    "svm": svm_by_projected_gradients,
}


def dense_losses(
    name: str, support: Array, query: Array, data: TaskBatch, regulariser: float, scale: float
) -> list[float]:
    losses = []
    for task in range(T):
        Y = np.eye(C)[data.support["targets"][task].numpy()]
        logits = scale * query[task] @ DENSE[name](support[task], Y, regulariser)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-float(log_p[np.arange(Q), data.query["targets"][task].numpy()].mean()))
    return losses


# ---------------------------------------------------------------- what is claimed


@every_solver
@both_forms
def test_losses_equal_those_of_a_dense_implementation(name: str, num_support: int, width: int) -> None:
    data, (support, query) = batch(num_support), features(num_support, width)
    losses, _ = algorithm(name, width).losses_of_features({}, support, query, data)
    expected = dense_losses(name, support.numpy(), query.numpy(), data, LAMBDA, SCALE)
    # Projected gradients get no nearer.
    assert losses.tolist() == pytest.approx(expected, rel=1e-7 if name == "svm" else 1e-12)


@every_solver
@both_forms
def test_gradients_by_features_and_own_parameters_equal_differences(
    name: str, num_support: int, width: int
) -> None:
    data, (support, query) = batch(num_support), features(num_support, width)
    head = algorithm(name, width)
    leaves = {
        "support": support,
        "query": query,
        "regulariser": torch.tensor(math.log(LAMBDA), dtype=torch.float64),
        "scale": torch.tensor(math.log(SCALE), dtype=torch.float64),
    }
    leaves = {key: value.clone().requires_grad_() for key, value in leaves.items()}
    meta = {f"head.{key}": leaves[key] for key in ("regulariser", "scale")}
    losses, _ = head.losses_of_features(meta, leaves["support"], leaves["query"], data)
    gradient = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))
    generator = torch.Generator().manual_seed(3)

    def total(key: str, direction: Tensor, step: float) -> float:
        at = {other: value.detach() for other, value in leaves.items()}
        at[key] = at[key] + step * direction
        if name == "svm":  # projected gradients have not the digits
            own = {f"head.{other}": at[other] for other in ("regulariser", "scale")}
            return float(head.losses_of_features(own, at["support"], at["query"], data)[0].sum())
        parts = at["support"].numpy(), at["query"].numpy()
        return sum(
            dense_losses(name, *parts, data, math.exp(float(at["regulariser"])), math.exp(float(at["scale"])))
        )

    for key, value in leaves.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        difference = (total(key, direction, 1e-5) - total(key, direction, -1e-5)) / 2e-5
        # The third derivative's part of the difference; of an SVM, the last digits of the solution too.
        assert float((gradient[key] * direction).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-9), key


@every_solver
def test_the_gradient_by_the_model_equals_differences_of_the_summed_losses(name: str) -> None:
    data, learner = batch(6), algorithm(name, 9)
    meta = learner.meta_parameters()
    assert {key for key in meta if key.startswith("head.")} == {"head.regulariser", "head.scale"}
    found = learner.meta_gradient(meta, data)
    generator = torch.Generator().manual_seed(4)
    along = {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in meta.items()
    }

    def total(step: float) -> float:
        moved = {key: value + step * along[key] for key, value in meta.items()}
        return float(learner.curve(moved, data, num_steps=0)["loss"].sum())

    slope = sum(float((found.gradient[key] * along[key]).sum()) for key in meta)
    assert slope == pytest.approx((total(1e-5) - total(-1e-5)) / 2e-5, rel=1e-6)
    assert set(found.metrics) == set(learner.metric_names)


@every_solver
@both_forms
def test_padding_and_classes_that_no_task_has_change_nothing(name: str, num_support: int, width: int) -> None:
    data, (support, query) = batch(num_support, num_classes=2), features(num_support, width)
    fewer = algorithm(name, width, num_outputs=2)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(T, 2, width, dtype=torch.float64, generator=generator)
    padded = dataclasses.replace(
        data,
        support={
            "inputs": data.support["inputs"],
            "targets": torch.nn.functional.pad(data.support["targets"], (0, 2)),
            "weights": torch.tensor([[1.0] * num_support + [0.0] * 2] * T),
        },
        num_ways=torch.full((T,), 2),
    )
    results = []
    for learner, features_of_support, tasks in (
        (fewer, support, data),
        (algorithm(name, width), torch.cat([support, noise], dim=1), padded),
    ):
        leaves = [features_of_support.clone().requires_grad_(), query.clone().requires_grad_()]
        losses, scores = learner.losses_of_features({}, leaves[0], leaves[1], tasks)
        gradients = torch.autograd.grad(losses.sum(), leaves)
        results.append((losses, scores["accuracy"], gradients[0][:, :num_support], gradients[1]))
    # Of an SVM, the last digits of the solution.
    for alone, among_others in zip(*results, strict=True):
        torch.testing.assert_close(alone, among_others, rtol=1e-6, atol=1e-9)
    assert gradients[0][:, num_support:].abs().max() == 0.0


@every_solver
def test_an_ignored_class_counts_for_nothing(name: str) -> None:
    data, (support, query) = batch(6), features(6, 9)
    head = algorithm(name, 9)
    ignoring = dataclasses.replace(
        data, support={"targets": data.support["targets"].index_fill(1, torch.tensor([5]), IGNORE)}
    )
    shorter = dataclasses.replace(data, support={"targets": data.support["targets"][:, :5]})
    losses, _ = head.losses_of_features({}, support, query, ignoring)
    expected, _ = head.losses_of_features({}, support[:, :5], query, shorter)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0.0)


@both_forms
def test_ridge_regression_of_numbers_equals_least_squares(num_support: int, width: int) -> None:
    generator = torch.Generator().manual_seed(6)
    support, query = features(num_support, width)
    numbers = torch.randn(T, num_support + Q, 2, dtype=torch.float64, generator=generator)
    data = TaskBatch((0, 1), {"targets": numbers[:, :num_support]}, {"targets": numbers[:, num_support:]})
    parameters = HeadParameters(LAMBDA, SCALE, 0.3, ("bias",))
    head = dataclasses.replace(
        algorithm("ridge", width), parameters=parameters, criterion=MeanSquaredError(), num_outputs=2
    )
    bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    losses, scores = head.losses_of_features({"head.bias": bias}, support, query, data)
    assert scores == {}
    errors = []
    for task in range(T):
        X, Y = support[task].numpy(), data.support["targets"][task].numpy()
        fitted = SCALE * query[task].numpy() @ ridge_by_least_squares(X, Y, LAMBDA) + 0.3
        errors.append(fitted - data.query["targets"][task].numpy())
    assert losses.tolist() == pytest.approx([float((each**2).mean()) for each in errors], rel=1e-12)
    (slope,) = torch.autograd.grad(losses.sum(), bias)
    assert float(slope) == pytest.approx(sum(2.0 * float(each.mean()) for each in errors), rel=1e-12)


@pytest.mark.parametrize("padded", ["support", "query"])
def test_ridge_regression_of_numbers_takes_padding_of_either_part_alone(padded: str) -> None:
    generator = torch.Generator().manual_seed(7)

    def part(num_examples: int) -> dict[str, Tensor]:
        return {
            name: torch.randn(T, num_examples, size, dtype=torch.float64, generator=generator)
            for name, size in (("inputs", 4), ("targets", 2))
        }

    data = TaskBatch((0, 1), part(6), part(Q))
    own = data.support if padded == "support" else data.query
    num_examples = own["inputs"].shape[1]
    junk = {name: torch.full_like(value[:, :2], 9.0) for name, value in own.items()}
    longer = {name: torch.cat([value, junk[name]], dim=1) for name, value in own.items()}
    longer["weights"] = torch.tensor([[1.0] * num_examples + [0.0] * 2] * T)
    ragged = (
        dataclasses.replace(data, support=longer)
        if padded == "support"
        else dataclasses.replace(data, query=longer)
    )
    head = dataclasses.replace(algorithm("ridge", 4), criterion=MeanSquaredError(), num_outputs=2)
    gradients = []
    for tasks in (data, ragged):
        found = head.meta_gradient(head.meta_parameters(), tasks)
        gradients.append((found.losses, found.gradient))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)


def test_newton_steps_end_where_the_logistic_losses_slope_vanishes() -> None:
    for num_support, width in ((6, 9), (12, 4)):
        X, _ = features(num_support, width)
        Y = torch.eye(C, dtype=torch.float64)[torch.arange(num_support) % C].expand(T, -1, -1)
        support = Support(X, Y, torch.ones(T, num_support) > 0, torch.ones(T, C) > 0)
        weights = LogisticSolver(num_steps=12).weights(support, LAMBDA)
        slope = X.mT @ ((X @ weights).sigmoid() - Y) + LAMBDA * weights
        assert slope.abs().max() < 1e-13


def test_support_examples_that_are_the_same_leave_the_machines_derivative_as_it_is() -> None:
    # The dual variables are then not determined, the weights are.
    data, (support, query) = batch(6), features(6, 9)
    support = torch.cat([support[:, :3], support[:, :3]], dim=1)
    head, leaf = algorithm("svm", 9), support.clone().requires_grad_()
    losses, _ = head.losses_of_features({}, leaf, query, data)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    direction = torch.randn(T, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    direction = torch.cat([direction, direction], dim=1)  # which keeps them the same

    def total(step: float) -> float:
        return float(head.losses_of_features({}, support + step * direction, query, data)[0].sum())

    difference = (total(1e-5) - total(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-6)


def test_a_quadratic_programs_derivative_by_its_linear_term_equals_differences() -> None:
    generator = torch.Generator().manual_seed(8)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root, c = numbers(3, 4, 5, 2), numbers(3, 4, 5).requires_grad_()  # singular, but for the equations
    G, A, h = root @ root.mT, torch.ones(3, 4, 5, dtype=torch.float64), numbers(3, 4, 5).abs()
    A[0, 1] = 0.0
    along, by = numbers(3, 4, 5), numbers(3, 4, 5)
    x = minimum(G + torch.diag_embed(1.0 - A), c, A, h)
    assert (A * x).sum(1).abs().max() < 1e-9
    assert ((h - x) > -1e-9).all()
    assert ((h - x) < 1e-9).any(), "a program without an active bound tells nothing"
    (gradient,) = torch.autograd.grad((x * along).sum(), c)
    ahead, behind = (
        (minimum(G + torch.diag_embed(1.0 - A), c.detach() + step * by, A, h) * along).sum()
        for step in (1e-5, -1e-5)
    )
    assert float((gradient * by).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-6)


@every_solver
def test_features_that_are_not_finite_make_a_loss_that_is_not(name: str) -> None:
    data, (support, query) = batch(6), features(6, 9)
    support = support.clone()
    support[0, 0, 0] = math.nan
    losses, _ = algorithm(name, 9).losses_of_features({}, support, query, data)
    assert losses.isfinite().tolist() == [False, True]


def test_a_system_that_rounding_makes_indefinite_is_told_by_a_loss_that_is_not_finite() -> None:
    data, (support, query) = batch(6), features(6, 9)
    support = torch.cat([support[:, :3], -support[:, :3]], dim=1).float() * 1e4
    head = dataclasses.replace(algorithm("ridge", 9), parameters=HeadParameters(1e-12))
    losses, _ = head.losses_of_features({}, support, query.float(), data)
    assert not losses.isfinite().all()


@every_solver
def test_heads_are_solved_in_float32_at_least_where_features_are_of_half_precision(name: str) -> None:
    data = batch(6).mapped(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    learner = algorithm(name, 9, compute="bfloat16")
    found = learner.meta_gradient(learner.meta_parameters(), data)
    assert all(value.dtype == torch.float32 for value in found.gradient.values())
    support, query = (part.bfloat16() for part in features(6, 9))
    losses, _ = learner.losses_of_features({}, support, query, data)
    expected, _ = algorithm(name, 9).losses_of_features({}, support.double(), query.double(), batch(6))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0.0)
