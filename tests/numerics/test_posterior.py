"""Gaussian meta-parameters against closed forms of a linear regression, and against differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.algorithms.posterior import POSTERIOR, Posterior
from metaloom.engine.draws import standard_normal
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from tests.numerics import test_protonet
from tests.numerics.problems import gpt_problem, last, perturbed

T, S, Q, D = 3, 5, 4, 3
RATE, BETA, PRIOR, STEP = 0.1, 0.7, 1.5, 6
NAME = "init.weight"
Samples = Literal["per_step", "per_task"]
Tensors = Mapping[str, Tensor]


def regression(*, seed: int = 1) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def part(count: int) -> dict[str, Tensor]:
        shape = (T, count)
        return {
            "inputs": torch.randn(*shape, D, generator=generator).double(),
            "targets": torch.randn(*shape, 1, generator=generator).double(),
        }

    return TaskBatch(tuple(range(20, 20 + T)), part(S), part(Q))


def linear_maml() -> Maml:
    model = nn.Linear(D, 1, bias=False).double()
    learner = Learner(FullAdapter(model), Precision("float64"), criterion=MeanSquaredError())
    unroll = Unroll(learner, Sgd(), Rates(RATE, "none", 1), last(1))
    return Maml(unroll, HYPERGRADIENTS["unrolled"]())


def over_the_start(samples: Samples = "per_step") -> Posterior:
    return Posterior(linear_maml(), ("init.",), BETA, prior_std=PRIOR, samples=samples, seed=3)


def somewhere(algorithm: Posterior) -> dict[str, Tensor]:
    """Means and standard deviations of which no two are alike."""
    return perturbed(algorithm.meta_parameters(), scale=0.3)


def closed_form(data: TaskBatch, task: int, start: Tensor) -> tuple[float, Tensor]:
    """Meta-loss and gradient of one task after one step of gradient descent on a squared error, `[D]`."""
    x, y = data.support["inputs"][task], data.support["targets"][task][:, 0]
    xq, yq = data.query["inputs"][task], data.query["targets"][task][:, 0]
    adapted = start - RATE * 2.0 / S * x.T @ (x @ start - y)
    error = xq @ adapted - yq
    jacobian = torch.eye(D, dtype=torch.float64) - RATE * 2.0 / S * x.T @ x
    return float(error.square().mean()), jacobian @ (2.0 / Q * xq.T @ error)


@pytest.mark.parametrize("samples", ["per_step", "per_task"])
def test_the_gradient_is_that_of_the_closed_form(samples: Samples) -> None:
    algorithm, data = over_the_start(samples), regression()
    meta = somewhere(algorithm)
    found = algorithm.meta_gradient(meta, data, outer_step=STEP)
    mu, rho = meta[NAME][0], meta[POSTERIOR + NAME][0]
    price = float(kl_divergence(Normal(mu, rho.exp()), Normal(torch.zeros_like(mu), PRIOR)).sum())
    by_mu, by_rho = T * BETA * mu / PRIOR**2, T * BETA * ((2 * rho).exp() / PRIOR**2 - 1.0)
    for task in range(T):
        key = (3, STEP, NAME) if samples == "per_step" else (3, STEP, data.numbers[task], NAME)
        deviation = rho.exp() * standard_normal(meta[NAME], *key)[0]
        loss, gradient = closed_form(data, task, mu + deviation)
        by_mu = by_mu + gradient
        by_rho = by_rho + gradient * deviation
        assert float(found.losses[task]) == pytest.approx(loss + BETA * price, rel=1e-12)
        assert float(found.metrics["kl"][task]) == pytest.approx(price, rel=1e-12)
        assert float(found.metrics["loss_after"][task]) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found.gradient[NAME][0], by_mu, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradient[POSTERIOR + NAME][0], by_rho, rtol=1e-12, atol=1e-14)
    assert set(found.metrics) == set(algorithm.metric_names)


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
def test_over_shared_weights_the_gradient_equals_differences_with_the_noise_held(estimator: str) -> None:
    problem = gpt_problem(step_weights=last(2), backbone=True)
    inner = Maml(problem.unroll, HYPERGRADIENTS[estimator](), backbone=True)
    algorithm = Posterior(inner, ("backbone.",), 1e-3, initial_std=0.1)
    meta = somewhere(algorithm)
    found = algorithm.meta_gradient(meta, problem.batch, outer_step=STEP)
    assert {name for name in meta if name.startswith(POSTERIOR)} == {
        POSTERIOR + name for name in meta if name.startswith("backbone.")
    }
    assert_slope(algorithm, meta, problem.batch, found.gradient)


def test_an_algorithm_without_steps_is_regularised_alike() -> None:
    inner = test_protonet.algorithm(test_protonet.model())
    algorithm = Posterior(inner, ("backbone.",), 1e-3, initial_std=0.1, samples="per_task")
    data, meta = test_protonet.batch(), somewhere(algorithm)
    found = algorithm.meta_gradient(meta, data, outer_step=STEP)
    assert_slope(algorithm, meta, data, found.gradient)


def assert_slope(algorithm: Posterior, meta: Tensors, data: TaskBatch, gradient: Tensors) -> None:
    """The gradient along a random direction is the difference of the summed meta-losses at the same draws."""
    generator = torch.Generator().manual_seed(2)
    along = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in meta.items()
    }

    def total(step: float) -> float:
        moved = {name: value + step * along[name] for name, value in meta.items()}
        return float(algorithm.meta_gradient(moved, data, outer_step=STEP).losses.sum())

    # Two distances cancel the third derivative's part.
    near, far = ((total(h) - total(-h)) / (2 * h) for h in (1e-5, 2e-5))
    difference = (4.0 * near - far) / 3.0
    slope = sum(float((gradient[name] * along[name]).sum()) for name in meta)
    assert slope == pytest.approx(difference, rel=1e-7)  # rounding, over a distance of 1e-5


def test_micro_batches_share_the_draw_of_their_outer_step_and_another_step_has_another() -> None:
    algorithm, data = over_the_start(), regression()
    meta = somewhere(algorithm)
    whole = algorithm.meta_gradient(meta, data, outer_step=STEP)
    parts = [algorithm.meta_gradient(meta, part, outer_step=STEP) for part in data.split(1)]
    for name, value in whole.gradient.items():
        torch.testing.assert_close(sum(part.gradient[name] for part in parts), value, rtol=1e-12, atol=1e-14)
    other = algorithm.meta_gradient(meta, data, outer_step=STEP + 1)
    assert bool((other.losses != whole.losses).all())


def test_a_draw_per_task_does_not_depend_on_the_other_tasks() -> None:
    algorithm, data = over_the_start("per_task"), regression()
    meta = somewhere(algorithm)
    whole = algorithm.meta_gradient(meta, data, outer_step=STEP)
    alone = [algorithm.meta_gradient(meta, part, outer_step=STEP) for part in data.split(1)]
    assert whole.losses.tolist() == [float(part.losses) for part in alone]


@pytest.mark.parametrize("samples", ["per_step", "per_task"])
def test_what_is_told_early_is_what_is_returned(samples: Samples) -> None:
    algorithm, data = over_the_start(samples), regression()
    meta = somewhere(algorithm)
    told: dict[str, Tensor] = {}
    found = algorithm.meta_gradient(meta, data, outer_step=STEP, on_final=told.__setitem__)
    assert told.keys() == meta.keys()
    for name, value in told.items():
        torch.testing.assert_close(value, found.gradient[name], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("samples", ["per_step", "per_task"])
def test_a_dummy_has_no_part(samples: Samples) -> None:
    algorithm, data = over_the_start(samples), regression()
    meta = somewhere(algorithm)
    (first, *_) = data.split(1)
    alone = algorithm.meta_gradient(meta, first, outer_step=STEP)
    masked = algorithm.meta_gradient(
        meta, dataclasses.replace(data, weights=torch.tensor([1.0, 0.0, 0.0])), outer_step=STEP
    )
    for name, value in alone.gradient.items():
        torch.testing.assert_close(masked.gradient[name], value, rtol=1e-12, atol=1e-14)
    assert masked.losses.tolist() == pytest.approx([float(alone.losses), 0.0, 0.0])
    assert masked.metrics["kl"].tolist() == pytest.approx([float(alone.metrics["kl"]), 0.0, 0.0])


def test_adaptation_for_its_own_sake_starts_at_the_means() -> None:
    algorithm, data = over_the_start(), regression()
    meta = somewhere(algorithm)
    measured = algorithm.curve(meta, data, num_steps=1)
    for task in range(T):
        assert float(measured["loss"][task, 1]) == pytest.approx(closed_form(data, task, meta[NAME][0])[0])


def test_what_needs_all_tasks_of_a_step_is_told_of_them_at_the_means() -> None:
    told: list[tuple[set[str], int]] = []

    class Looking(Maml):
        def at_step(
            self,
            meta: Tensors,
            batches: Sequence[TaskBatch],
            gather: Callable[[list[Any]], list[Any]],
        ) -> Looking:
            told.append((set(meta), len(batches)))
            return self

    inner = linear_maml()
    looking = Looking(inner.unroll, inner.hypergradient)
    algorithm = dataclasses.replace(over_the_start(), inner=looking)
    meta, data = somewhere(over_the_start()), regression()
    found = algorithm.at_step(meta, data.split(1), list)
    assert isinstance(found, Posterior)
    assert told == [(set(inner.meta_parameters()), data.num_tasks)]


def test_standard_deviations_start_where_they_are_told_to() -> None:
    meta = Posterior(linear_maml(), ("init.",), BETA, initial_std=0.05).meta_parameters()
    assert meta[POSTERIOR + NAME].tolist() == [[pytest.approx(math.log(0.05))] * D]


def test_a_kind_that_is_not_learned_is_refused() -> None:
    with pytest.raises(
        CapabilityError, match=r"regularisation.kinds: backbone; nothing of that kind is lear"
    ):
        Posterior(linear_maml(), ("backbone.",), BETA).meta_parameters()


def test_draws_are_standard_normal_and_a_function_of_their_key() -> None:
    like = torch.empty(200, 500, dtype=torch.float64)
    draws = standard_normal(like, 0, 1, "a")
    assert torch.equal(draws, standard_normal(like, 0, 1, "a"))
    for key in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b")):
        correlation = float((draws * standard_normal(like, *key)).mean())
        assert abs(correlation) < 0.02  # 6 standard errors
    # 6 standard errors of the first, second and fourth moment of 100000 draws.
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.square().mean()) == pytest.approx(1.0, abs=0.03)
    assert float(draws.pow(4).mean()) == pytest.approx(3.0, abs=0.2)
