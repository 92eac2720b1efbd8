"""The terms of task-agnostic meta-learning against naive formulas and differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.inequality import Measure, MeasureName
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import IGNORE, PredictionEntropy
from metaloom.engine.terms import EntropyReduction
from metaloom.engine.unroll import Unroll, adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import (
    Problem,
    assert_gradients_agree,
    conv4_problem,
    gpt_problem,
    last,
    logits_of,
    relative_error,
)

WEIGHT = 0.8
EXACT = ("unrolled", "rematerialized", "mixed_mode")
NUM_TASKS = 4


# ---------------------------------------------------------------- entropy


def naive_entropy(logits: Sequence[float]) -> float:
    total = sum(math.exp(z) for z in logits)
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits)


def test_an_entropy_is_that_of_the_formula() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, IGNORE], [2, 0, 3]])
    (found,) = PredictionEntropy().of_targets(logits, targets)
    for task in range(2):
        for row in range(3):
            expected = 0.0 if targets[task, row] == IGNORE else naive_entropy(logits[task, row].tolist())
            assert float(found[task, row]) == pytest.approx(expected, rel=1e-12)


def test_classes_that_a_task_has_not_have_no_entropy() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf, targets = logits.clone().requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)
    (found,) = PredictionEntropy().of_targets(leaf, targets, num_ways=torch.tensor([2, 4]))
    (slopes,) = torch.autograd.grad(found.sum(), leaf)
    found = found.detach()
    for row in range(3):
        assert float(found[0, row]) == pytest.approx(naive_entropy(logits[0, row, :2].tolist()), rel=1e-12)
        assert float(found[1, row]) == pytest.approx(naive_entropy(logits[1, row].tolist()), rel=1e-12)
    assert bool(slopes.isfinite().all())
    assert slopes[0, :, 2:].tolist() == [[0.0, 0.0]] * 3


def with_entropy(problem: Problem) -> Unroll:
    return dataclasses.replace(problem.unroll, terms=(EntropyReduction(WEIGHT),))


def image_problem(step_weights: tuple[float, ...] = last(2)) -> Problem:
    return conv4_problem(step_weights=step_weights, grain="per_tensor", num_tasks=NUM_TASKS)


def text_problem() -> Problem:
    return gpt_problem(step_weights=last(2), backbone=True, grain="shared")


def naive_total(problem: Problem, meta: dict[str, Tensor]) -> float:
    """The summed meta-losses by the model's own logits."""
    unroll, batch = problem.unroll, problem.batch
    first, *_, final = adapt(unroll, meta, batch, num_steps=unroll.num_steps)
    before, after = (
        logits_of(unroll.learner.adapter, meta, at.fast, batch.query["inputs"]) for at in (first, final)
    )

    def entropies(logits: Tensor) -> float:
        flat = logits.flatten(0, -2).tolist()
        return sum(map(naive_entropy, flat)) / (len(flat) // logits.shape[0])

    right = after.log_softmax(-1).gather(-1, batch.query["targets"][..., None])
    return float(-right.flatten(1).mean(1).sum()) + WEIGHT * (entropies(after) - entropies(before))


def slope_error(
    gradient: dict[str, Tensor], meta: dict[str, Tensor], total: Callable[[dict[str, Tensor]], float]
) -> float:
    """How far the slope along a random direction is from differences, relatively."""
    generator = torch.Generator().manual_seed(2)
    along = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in meta.items()
    }

    def at(step: float) -> float:
        return total({name: value + step * along[name] for name, value in meta.items()})

    # Two distances cancel the third derivative's part; short ones do not reach a kink of ReLU.
    near, far = ((at(h) - at(-h)) / (2 * h) for h in (1e-6, 2e-6))
    difference = (4.0 * near - far) / 3.0
    slope = sum(float((gradient[name] * along[name]).sum()) for name in meta)
    return abs(slope - difference) / abs(difference)


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("make", [image_problem, text_problem])
def test_the_gradient_with_entropies_equals_differences(estimator: str, make: Callable[[], Problem]) -> None:
    problem = make()
    found = HYPERGRADIENTS[estimator]().meta_gradient(with_entropy(problem), problem.meta, problem.batch)
    assert float(found.losses.sum()) == pytest.approx(naive_total(problem, problem.meta), rel=1e-12)
    assert slope_error(found.gradient, problem.meta, lambda meta: naive_total(problem, meta)) < 1e-7


@pytest.mark.parametrize("estimator", ["rematerialized", "mixed_mode"])
def test_with_entropies_exact_estimators_agree_to_rounding(estimator: str) -> None:
    problem = image_problem((0.0, 0.5, 0.5))
    unroll = with_entropy(problem)
    oracle = HYPERGRADIENTS["unrolled"]().meta_gradient(unroll, problem.meta, problem.batch)
    found = HYPERGRADIENTS[estimator]().meta_gradient(unroll, problem.meta, problem.batch)
    plain = HYPERGRADIENTS["unrolled"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert_gradients_agree(found.gradient, oracle.gradient, rtol=1e-9)
    assert any(relative_error(plain.gradient[n], value) > 1e-2 for n, value in oracle.gradient.items())


def test_metrics_stay_those_of_the_query_loss() -> None:
    problem = image_problem()
    plain = HYPERGRADIENTS["unrolled"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    found = HYPERGRADIENTS["unrolled"]().meta_gradient(with_entropy(problem), problem.meta, problem.batch)
    for name, value in plain.metrics.items():
        assert found.metrics[name].tolist() == value.tolist(), name


def test_truncation_keeps_the_term_at_the_start() -> None:
    problem = image_problem()
    whole = Truncated(num_steps=2, exact=Rematerialized())
    short = Truncated(num_steps=1, exact=Rematerialized())
    oracle = HYPERGRADIENTS["unrolled"]().meta_gradient(with_entropy(problem), problem.meta, problem.batch)
    found = whole.meta_gradient(with_entropy(problem), problem.meta, problem.batch)
    assert_gradients_agree(found.gradient, oracle.gradient, rtol=1e-9)
    # The term at phi_0 has its exact gradient, whatever is truncated.
    zero = dataclasses.replace(problem.unroll, step_weights=(0.0, 0.0, 0.0))
    only = dataclasses.replace(zero, terms=(_At0(WEIGHT),))
    exact = HYPERGRADIENTS["unrolled"]().meta_gradient(only, problem.meta, problem.batch)
    cut = short.meta_gradient(only, problem.meta, problem.batch)
    starts = {name: value for name, value in exact.gradient.items() if name.startswith("init.")}
    assert_gradients_agree({name: cut.gradient[name] for name in starts}, starts, rtol=1e-9)


class _At0(EntropyReduction):
    def steps(self, num_steps: int) -> tuple[int, ...]:
        return (0,)


@pytest.mark.parametrize("estimator", ["implicit", "finite_difference", "reptile"])
def test_estimators_of_the_end_refuse_terms_at_the_start(estimator: str) -> None:
    problem = image_problem()
    chosen = FiniteDifference() if estimator == "finite_difference" else HYPERGRADIENTS[estimator]()
    with pytest.raises(CapabilityError, match="looks at the fully adapted weights alone"):
        chosen.meta_gradient(with_entropy(problem), problem.meta, problem.batch)


# ---------------------------------------------------------------- inequality


def naive_measure(measure: Measure, numbers: Sequence[float]) -> float:
    count, mean, alpha = len(numbers), sum(numbers) / len(numbers), measure.alpha
    geometric = math.prod(numbers) ** (1.0 / count)
    ratios = [number / mean for number in numbers]
    if measure.name == "gini":
        # By ranks, another formula than that of the code.
        ranked = sorted(numbers)
        weighted = sum((2 * rank - count - 1) * number for rank, number in enumerate(ranked, start=1))
        return weighted / (count * sum(numbers))
    if measure.name == "variance_of_logarithms":
        return sum(math.log(number / geometric) ** 2 for number in numbers) / count
    if measure.name == "theil" or (measure.name == "generalized_entropy" and alpha == 1.0):
        return sum(ratio * math.log(ratio) for ratio in ratios) / count
    if measure.name == "generalized_entropy":
        if alpha == 0.0:
            return math.log(mean / geometric)
        return sum(math.pow(ratio, alpha) - 1.0 for ratio in ratios) / (count * alpha * (alpha - 1.0))
    if alpha == 1.0:
        return 1.0 - geometric / mean
    power = 1.0 - alpha
    return 1.0 - math.pow(sum(math.pow(n, power) for n in numbers) / count, 1.0 / power) / mean


MEASURES = (
    Measure("theil"),
    Measure("generalized_entropy", 2.0),
    Measure("generalized_entropy", 1.0),
    Measure("generalized_entropy", 0.0),
    Measure("generalized_entropy", -1.0),
    Measure("atkinson", 0.5),
    Measure("atkinson", 1.0),
    Measure("atkinson", 2.0),
    Measure("gini"),
    Measure("variance_of_logarithms"),
)


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_a_measure_is_that_of_the_formula_and_its_slopes_are_differences(measure: Measure) -> None:
    numbers = [0.3, 1.7, 0.9, 2.2, 0.31]
    value, slopes = measure.slopes(torch.tensor(numbers))
    assert value == pytest.approx(naive_measure(measure, numbers), rel=1e-6)  # the numbers were float32
    exact, slopes = measure.slopes(torch.tensor(numbers, dtype=torch.float64))
    assert exact == pytest.approx(naive_measure(measure, numbers), rel=1e-12)
    for place in range(len(numbers)):
        up, down = ([n + h * (i == place) for i, n in enumerate(numbers)] for h in (1e-6, -1e-6))
        difference = (naive_measure(measure, up) - naive_measure(measure, down)) / 2e-6
        assert float(slopes[place]) == pytest.approx(difference, rel=1e-7, abs=1e-9)
    assert measure.slopes(torch.full((4,), 0.7))[0] == pytest.approx(0.0, abs=1e-12)
    scaled = torch.tensor(numbers, dtype=torch.float64) * 5.0
    assert measure.slopes(scaled)[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_losses_that_are_all_exactly_zero_are_equal(measure: Measure) -> None:
    value, slopes = measure.slopes(torch.zeros(3))
    assert abs(value) <= 1e-12  # rounding of logarithms of about -700
    assert slopes.tolist() == [0.0] * 3


def unequal(estimator: str, measure: Measure = MEASURES[0]) -> tuple[Inequality, Problem]:
    problem = image_problem()
    return Inequality(Maml(problem.unroll, HYPERGRADIENTS[estimator]()), measure, WEIGHT), problem


def inequality_total(problem: Problem, measure: Measure, meta: dict[str, Tensor]) -> float:
    """M times the objective: the sum of query losses, and M times the weighted measure."""
    unroll, batch = problem.unroll, problem.batch
    first, *_, final = adapt(unroll, meta, batch, num_steps=unroll.num_steps)

    def losses(fast: dict[str, Tensor]) -> list[float]:
        logits = logits_of(unroll.learner.adapter, meta, fast, batch.query["inputs"])
        right = logits.log_softmax(-1).gather(-1, batch.query["targets"][..., None])
        return [-float(value) for value in right.flatten(1).mean(1)]

    return sum(losses(final.fast)) + NUM_TASKS * WEIGHT * naive_measure(measure, losses(first.fast))


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("measure", [Measure("theil"), Measure("gini")], ids=str)
def test_the_gradient_with_inequality_equals_differences(estimator: str, measure: Measure) -> None:
    algorithm, problem = unequal(estimator, measure)
    found = algorithm.meta_gradient(problem.meta, problem.batch)
    expected = inequality_total(problem, measure, problem.meta)
    assert float(found.losses.sum()) == pytest.approx(expected, rel=1e-12)
    error = slope_error(found.gradient, problem.meta, lambda meta: inequality_total(problem, measure, meta))
    assert error < 1e-7
    assert set(found.metrics) == set(algorithm.metric_names)


def shared_out(algorithm: Inequality, problem: Problem, parts: Sequence[Sequence[TaskBatch]]) -> list[float]:
    """Gradient norms by name of an outer step whose micro-batches lie so on ranks."""
    known = [
        [pair for batch in own for pair in algorithm._initial_losses(problem.meta, batch)] for own in parts
    ]
    everything = [pair for own in known for pair in own]
    total: dict[str, Tensor] = {}
    for own in parts:
        ready = algorithm.at_step(problem.meta, own, lambda values: everything)
        for batch in own:
            for name, value in ready.meta_gradient(problem.meta, batch).gradient.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value
    return [float(torch.linalg.vector_norm(value)) for value in total.values()]


def test_ranks_and_micro_batches_do_not_matter() -> None:
    algorithm, problem = unequal("rematerialized")
    whole = [
        float(torch.linalg.vector_norm(value))
        for value in algorithm.meta_gradient(problem.meta, problem.batch).gradient.values()
    ]
    one, two, three, four = problem.batch.split(1)
    pair, rest = problem.batch.split(2)
    for parts in ([[one, two, three, four]], [[pair], [rest]], [[one, two, three], [four], []]):
        assert shared_out(algorithm, problem, parts) == pytest.approx(whole, rel=1e-11)


def test_dummies_are_not_counted() -> None:
    algorithm, problem = unequal("rematerialized")
    pair, rest = problem.batch.split(2)
    numbers = (rest.numbers[0], problem.batch.numbers[0])
    filled = dataclasses.replace(rest, numbers=numbers, weights=torch.tensor([1.0, 0.0]))
    three = problem.batch.split(3)[0]
    alone = algorithm.meta_gradient(problem.meta, three)
    ready = algorithm.at_step(problem.meta, [pair, filled], list)
    parts = [ready.meta_gradient(problem.meta, batch) for batch in (pair, filled)]
    for name, value in alone.gradient.items():
        torch.testing.assert_close(
            parts[0].gradient[name] + parts[1].gradient[name], value, rtol=1e-10, atol=1e-13
        )
    assert parts[1].metrics["inequality"].tolist() == [float(alone.metrics["inequality"][0]), 0.0]


@pytest.mark.parametrize(
    "name", ["theil", "generalized_entropy", "atkinson", "gini", "variance_of_logarithms"]
)
def test_a_task_that_is_solved_leaves_the_measure_finite(name: MeasureName) -> None:
    value, slopes = Measure(name).slopes(torch.tensor([0.0, 1.0, 2.0]))
    assert math.isfinite(value)
    assert bool(slopes.isfinite().all())
    if name != "variance_of_logarithms":  # which the smallest number alone pulls up
        assert float(slopes[2]) > float(slopes[1])
