"""Outer steps with tasks that are not finite are those without them, whatever the algorithm and the combiner.

Shape letters: T tasks, N examples, D numbers of an input, K inner steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.norms import PerStepNorms
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.algorithms.posterior import Posterior
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inequality import Measure
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.left_out import LeftOut, differentiated
from metaloom.engine.losses import MeanSquaredError
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision, Scales
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from metaloom.engine.unroll import Unroll
from tests.multirank.combiner_problems import ESTIMATOR, combiners, group_of
from tests.multirank.combiner_problems import problem as combiner_problem
from tests.numerics import test_protonet, test_set_learners
from tests.numerics.poisoned import Poison, poisoned
from tests.numerics.problems import assert_gradients_agree, conv4_problem, last
from tests.numerics.test_half_precision import scaled
from tests.numerics.token_problems import transformer_problem
from tests.unit.test_engine_step import SETTINGS

PLAIN = dataclasses.replace(SETTINGS, lr=0.05, lr_rates=0.05)
Tensors = Mapping[str, Tensor]
NAN, INF = math.nan, math.inf


def optimizer(meta: Tensors, *, tracked: Tensors | None = None) -> OuterOptimizer:
    return OuterOptimizer(meta, PLAIN, Replicated(), tracked=tracked)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one outer step has come to."""

    meta: dict[str, Tensor]
    metrics: dict[str, float]
    told: list[LeftOut]


def step(
    algorithm: Algorithm,
    batch: TaskBatch,
    *,
    meta: Tensors | None = None,
    micro_batch: int = 8,
    scaler: LossScaler | None = None,
) -> Step:
    """One outer step of the mean."""
    outer = optimizer(meta or algorithm.meta_parameters(), tracked=algorithm.tracked())
    combiner = Mean(outer.meta, Replicated(), metric_names=algorithm.metric_names)
    told: list[LeftOut] = []
    metrics = outer_step(
        StepTasks(batch, batch.num_tasks, micro_batch),
        algorithm,
        combiner,
        outer,
        scaler or LossScaler(Precision("float64")),
        on_left_out=told.extend,
    )
    return Step(outer.evaluation_parameters(), metrics, told)


def assert_same(found: Step, expected: Step, start: Tensors, *, num_left_out: int, rtol: float) -> None:
    """Both have moved by the same, and say the same of it."""
    assert found.metrics == pytest.approx(expected.metrics | {"left_out": num_left_out}, rel=rtol, abs=1e-12)
    assert expected.metrics["skipped"] == 0.0
    moved = [
        {name: result.meta[name] - value for name, value in start.items()} for result in (found, expected)
    ]
    assert_gradients_agree(moved[0], moved[1], rtol=rtol)


# ---------------------------------------------------------------- data


def regression(*, scale: float = 1.0) -> TaskBatch:
    """Three tasks, the second with inputs that large."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.tensor([1.0, scale, 1.0], dtype=torch.float64)[:, None, None]

    def part(count: int) -> dict[str, Tensor]:
        return {
            "inputs": torch.randn(3, count, 3, generator=generator).double() * factors,
            "targets": torch.randn(3, count, 1, generator=generator).double(),
        }

    return TaskBatch((20, 21, 22), part(5), part(4))


def linear_maml(estimator: str, *, tasks: Literal["loop", "vmap"] = "loop") -> Maml:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    learner = Learner(FullAdapter(model, tasks=tasks), Precision("float64"), criterion=MeanSquaredError())
    unroll = Unroll(learner, Sgd(momentum=0.5), Rates(0.1, "per_tensor", 4), last(4))
    return Maml(unroll, HYPERGRADIENTS[estimator]())


def with_part(batch: TaskBatch, part: str, data: Tensors) -> TaskBatch:
    """The same tasks with other support or query data."""
    if part == "support":
        return dataclasses.replace(batch, support=data)
    return dataclasses.replace(batch, query=data)


def changed(batch: TaskBatch, part: str, name: str, value: float) -> TaskBatch:
    """One number of the second task is another."""
    data = batch.support if part == "support" else batch.query
    tensor = data[name].clone()
    tensor[1].view(-1)[0] = value
    return with_part(batch, part, {**data, name: tensor})


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode", "first_order"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda batch: changed(batch, "support", "inputs", NAN), "support loss before adaptation"),
        (lambda batch: changed(batch, "support", "targets", INF), "support loss before adaptation"),
        (lambda batch: changed(batch, "query", "inputs", INF), "query loss after 4 inner steps"),
        (lambda batch: changed(batch, "query", "targets", NAN), "query loss after 4 inner steps"),
        # The weights grow by the square of the inputs in every step, and the loss by the square of that.
        (lambda batch: regression(scale=1e45), "support loss after 2 inner steps"),
        (lambda batch: regression(scale=1e25), "support loss after 3 inner steps"),
        (lambda batch: changed(batch, "support", "inputs", 1e160), "support loss before adaptation"),
    ],
)
def test_bad_data_and_divergence_are_found_where_they_show_first(
    estimator: str, spoil: Callable[[TaskBatch], TaskBatch], reason: str
) -> None:
    algorithm, batch = linear_maml(estimator), spoil(regression())
    start = algorithm.meta_parameters()
    found = step(algorithm, batch)
    assert found.told == [LeftOut(21, reason)]
    expected = step(algorithm, batch.picked([0, 2]))
    assert_same(found, expected, start, num_left_out=1, rtol=1e-12)


def test_weights_that_leave_the_range_of_numbers_are_named() -> None:
    # The last inner step alone is too long: all support losses are finite.
    algorithm = linear_maml("rematerialized")
    unroll = dataclasses.replace(algorithm.unroll, rates=Rates(1e200, "none", 1), step_weights=last(1))
    batch = regression(scale=1e60)
    found = step(dataclasses.replace(algorithm, unroll=unroll), batch)
    assert LeftOut(21, "fast weights after 1 inner step") in found.told


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_do_not_change_what_is_left_out(
    micro_batch: int, tasks: Literal["loop", "vmap"]
) -> None:
    algorithm, batch = linear_maml("unrolled", tasks=tasks), regression(scale=1e45)
    found = step(algorithm, batch, micro_batch=micro_batch)
    assert_same(
        found, step(algorithm, batch.picked([0, 2])), algorithm.meta_parameters(), num_left_out=1, rtol=1e-12
    )


def test_a_step_without_finite_tasks_is_skipped_and_moves_nothing() -> None:
    algorithm, batch = linear_maml("rematerialized"), regression()
    batch = batch.mapped(lambda tensor: torch.full_like(tensor, NAN))
    found = step(algorithm, batch, micro_batch=2)
    assert found.metrics["left_out"] == 3.0
    assert found.metrics["skipped"] == 1.0
    assert math.isnan(found.metrics["meta_loss"])
    for name, value in algorithm.meta_parameters().items():
        assert torch.equal(found.meta[name], value)


def test_dummies_that_repeat_a_bad_task_are_replaced_and_not_counted() -> None:
    algorithm, batch = linear_maml("mixed_mode"), changed(regression(), "support", "inputs", NAN)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    filled = dataclasses.replace(batch.picked([1, 0, 1, 1]), weights=weights)
    found = differentiated(
        algorithm,
        algorithm.meta_parameters(),
        filled,
        Scales(),
        Replicated(),
        outer_step=0,
        on_final=None,
    )
    assert [task.number for task in found.left_out] == [21]
    assert found.batch.numbers == (20,) * 4
    assert found.batch.weights is not None
    assert found.batch.weights.tolist() == [0.0, 1.0, 0.0, 0.0]
    expected = algorithm.meta_gradient(algorithm.meta_parameters(), batch.picked([0]))
    assert_gradients_agree(found.part.gradient, expected.gradient, rtol=1e-12)


def test_gradients_are_told_of_once_and_as_they_are_without_the_bad_task() -> None:
    algorithm, batch = linear_maml("unrolled"), regression(scale=1e45)
    told: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        assert name not in told
        told[name] = gradient.clone()

    meta = algorithm.meta_parameters()
    differentiated(algorithm, meta, batch, Scales(), Replicated(), outer_step=0, on_final=take)
    expected = algorithm.meta_gradient(meta, batch.picked([0, 2])).gradient
    assert_gradients_agree(told, {name: expected[name] for name in told}, rtol=1e-12)
    assert told


# ---------------------------------------------------------------- algorithms


def spoiled(data: TaskBatch, part: str) -> TaskBatch:
    """The same tasks and one more between them, whose inputs are no numbers."""
    wider = data.picked([0, 0, *range(1, data.num_tasks)])
    wider = dataclasses.replace(wider, numbers=(data.numbers[0], 99, *data.numbers[1:]))
    spoiled = dict(wider.support if part == "support" else wider.query)
    spoiled["inputs"] = spoiled["inputs"].clone()
    spoiled["inputs"][1] = NAN
    return with_part(wider, part, spoiled)


FEED_FORWARD: dict[str, Callable[[], tuple[Algorithm, TaskBatch]]] = {
    "protonet": lambda: (test_protonet.algorithm(test_protonet.model()), test_protonet.batch()),
    "cnp": lambda: (
        test_set_learners.algorithm_of("cnp", "regression"),
        test_set_learners.batch_of("regression"),
    ),
}


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("name", FEED_FORWARD)
def test_algorithms_without_inner_steps_leave_tasks_out(name: str, part: str) -> None:
    algorithm, data = FEED_FORWARD[name]()
    found = step(algorithm, spoiled(data, part))
    assert found.told == [LeftOut(99, "query loss")]
    assert_same(found, step(algorithm, data), algorithm.meta_parameters(), num_left_out=1, rtol=1e-11)


@pytest.mark.parametrize("samples", ["per_step", "per_task"])
def test_a_posterior_pays_for_the_tasks_that_count(samples: Literal["per_step", "per_task"]) -> None:
    algorithm = Posterior(linear_maml("rematerialized"), ("init.",), 0.7, samples=samples, seed=3)
    batch = regression(scale=1e45)
    found, expected = step(algorithm, batch), step(algorithm, batch.picked([0, 2]))
    assert_same(found, expected, algorithm.meta_parameters(), num_left_out=1, rtol=1e-11)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("spoil", [1e45, 1e160])  # in the midst of adaptation; before it
def test_inequality_is_that_of_the_tasks_that_count(spoil: float, micro_batch: int) -> None:
    algorithm = Inequality(linear_maml("unrolled"), Measure("theil"), 5.0)
    batch = regression(scale=spoil)
    found = step(algorithm, batch, micro_batch=micro_batch)
    assert [task.number for task in found.told] == [21]
    expected = step(algorithm, batch.picked([0, 2]))
    assert expected.metrics["inequality"] > 1e-4
    assert_same(found, expected, algorithm.meta_parameters(), num_left_out=1, rtol=1e-11)


def test_statistics_of_norms_are_those_of_the_tasks_that_count() -> None:
    norms = PerStepNorms(2, weights=False, statistics=True)
    problem = conv4_problem(step_weights=(0.0, 0.5, 0.5), norms=norms, num_tasks=3)
    algorithm = Maml(problem.unroll, HYPERGRADIENTS["rematerialized"]())
    bad = changed(problem.batch, "query", "inputs", NAN)
    found = step(algorithm, bad, meta=problem.meta)
    expected = step(algorithm, problem.batch.picked([0, 2]), meta=problem.meta)
    start = problem.meta | algorithm.tracked()
    assert any(name.startswith("tracked.") for name in start)
    assert_same(found, expected, start, num_left_out=1, rtol=1e-11)


# ---------------------------------------------------------------- combiners

LIKE = {name: torch.zeros(1) for name in ("init.a", "backbone.qkv", "rates.a")}
COMBINERS = list(combiners(LIKE, Replicated(), ()))


def course(
    name: str, steps: Sequence[tuple[int, ...]], poison: Poison
) -> tuple[Tensors, object, list[dict[str, float]]]:
    """Meta-parameters, the combiner's state and metrics after outer steps on tasks of these numbers."""
    first = combiner_problem(steps[0])
    outer = optimizer(first.meta)
    names = ESTIMATOR.metric_names(first.unroll.learner)
    combiner = combiners(outer.meta, Replicated(), names)[name]()
    metrics = []
    for numbers in steps:
        made = combiner_problem(numbers)
        batch = dataclasses.replace(made.batch, groups=tuple(map(group_of, numbers)))
        algorithm = Maml(poisoned(made.unroll, poison), ESTIMATOR)
        scaler = LossScaler(Precision("float64"))
        metrics.append(outer_step(StepTasks(batch, len(numbers), 2), algorithm, combiner, outer, scaler))
    return outer.meta, combiner.scalars(), metrics


@pytest.mark.parametrize("name", COMBINERS)
def test_combiners_know_nothing_of_tasks_that_are_left_out(name: str) -> None:
    steps = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11, 12, 13, 14)]
    poison = Poison((0, 6, 7, 14), "support", 0, INF)
    kept = [tuple(number for number in numbers if number not in poison.numbers) for numbers in steps]
    meta, state, metrics = course(name, steps, poison)
    expected, expected_state, expected_metrics = course(name, kept, Poison(()))
    assert nested(state) == pytest.approx(nested(expected_state), rel=1e-9)
    for found, plain, count in zip(metrics, expected_metrics, (1, 2, 1), strict=True):
        assert found == pytest.approx(plain | {"left_out": count}, rel=1e-9, abs=1e-12)
    start = combiner_problem(steps[0]).meta
    assert_gradients_agree(
        {key: meta[key] - value for key, value in start.items()},
        {key: expected[key] - value for key, value in start.items()},
        rtol=1e-8,  # three steps; surgery and shortest combinations carry rounding on
    )


@pytest.mark.parametrize("name", ["mean", "pcgrad", "gradnorm", "group_dro", "q_ffl", "dwa", "upweighting"])
def test_combiners_keep_their_state_in_a_step_without_finite_tasks(name: str) -> None:
    steps = [(0, 1, 2), (3, 4, 5)]
    _, before, _ = course(name, steps[:1], Poison(()))
    meta, after, metrics = course(name, steps, Poison(steps[1], "outer", None))
    assert after == before
    assert (metrics[1]["skipped"], metrics[1]["left_out"]) == (1.0, 3.0)
    assert all(value.isfinite().all() for value in meta.values())


def nested(state: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in a state, by their paths."""
    if isinstance(state, Mapping):
        found: dict[str, float] = {}
        for key, value in state.items():
            found |= nested(value, f"{prefix}/{key}")
        return found
    return {} if state is None else {prefix: float(state)}


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode", "first_order"])
def test_scaled_gradients_that_overflow_are_the_scalers_business(estimator: str) -> None:
    problem = transformer_problem("lora", compute="float16", grain="none", numbers=(0, 1, 2))
    algorithm = Maml(problem.unroll, HYPERGRADIENTS[estimator]())
    scaler = LossScaler(Precision("float16"))
    scaler.scales = Scales(2.0**24, 1.0)  # the gradients of no task fit
    found = step(algorithm, problem.batch, meta=problem.meta, scaler=scaler)
    assert found.told == []
    assert (found.metrics["left_out"], found.metrics["skipped"]) == (0.0, 1.0)
    assert found.metrics["not_finite"] == 1.0
    assert scaler.scales.loss == 2.0**23


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode", "first_order"])
def test_a_loss_that_is_not_finite_in_half_precision_is_left_out_and_leaves_the_scales(
    estimator: str,
) -> None:
    problem = scaled(
        transformer_problem("lora", compute="float16", grain="none", numbers=(0, 1, 2)),
        Scales(2.0**4, 2.0**4),
    )
    poison = Poison((1,), "support", 1)
    algorithm = Maml(poisoned(problem.unroll, poison), HYPERGRADIENTS[estimator]())
    scaler = LossScaler(Precision("float16"))
    scaler.scales = Scales(2.0**4, 2.0**4)
    found = step(algorithm, problem.batch, meta=problem.meta, scaler=scaler)
    assert found.told == [LeftOut(1, "support loss after 1 inner step")]
    assert (found.metrics["left_out"], found.metrics["skipped"]) == (1.0, 0.0)
    everything = dataclasses.replace(
        algorithm, unroll=poisoned(problem.unroll, Poison((0, 1, 2), "outer", None))
    )
    found = step(everything, problem.batch, meta=problem.meta, scaler=scaler)
    assert (found.metrics["left_out"], found.metrics["skipped"]) == (3.0, 1.0)
    assert scaler.scales == Scales(2.0**4, 2.0**4)
