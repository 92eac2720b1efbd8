"""Combined gradients are the same on any number of ranks, and what the equations say on one."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from metaloom.engine.combiners.pcgrad import PCGrad
from tests.multirank.combiner_problems import (
    ESTIMATOR,
    STEPS,
    Outcome,
    group_of,
    numbers_of,
    outcomes,
    problem,
)
from tests.multirank.processes import run_ranks
from tests.numerics.problems import assert_gradients_agree
from tests.numerics.test_combiner_rules import closed_form, records, surgery_on_vectors

TASKS = 5
# In turns, without, with weights within turns, without any: shards are slow on few cores.
SHARDED = (
    "pcgrad",
    "pcgrad of the initialisation",
    "gradnorm",
    "gradnorm by the initialisation",
    "uncertainty",
)


@functools.cache
def on_one_rank(num_tasks: int) -> dict[str, Outcome]:
    return outcomes("replicated", num_tasks, num_tasks, None, (), STEPS)


@functools.cache
def alone(number: int) -> tuple[dict[str, Tensor], float]:
    """The gradient and the meta-loss of one task."""
    made = problem((number,))
    found = ESTIMATOR.meta_gradient(made.unroll, made.meta, made.batch)
    return found.gradient, float(found.losses)


def flat(gradient: dict[str, Tensor], kinds: tuple[str, ...]) -> Tensor:
    return torch.cat([value.flatten() for name, value in gradient.items() if name.startswith(kinds)])


# Of five tasks two ranks have three and two, three have two, two and one; of two, four ranks have none twice.
@pytest.mark.parametrize(
    ("kind", "world_size", "num_tasks", "micro_batch", "shard_size"),
    [
        ("replicated", 2, TASKS, 3, None),
        ("replicated", 4, 2, 1, None),
        pytest.param("lockstep", 3, TASKS, 1, None, marks=pytest.mark.slow),
        pytest.param("sharded", 2, TASKS, 2, None, marks=pytest.mark.slow),
        ("sharded", 4, TASKS, 1, 2),
    ],
)
def test_neither_ranks_nor_shards_change_what_is_combined(
    kind: str, world_size: int, num_tasks: int, micro_batch: int, shard_size: int | None
) -> None:
    only, num_steps = (SHARDED, 2) if kind == "sharded" else ((), STEPS)
    expected = on_one_rank(num_tasks)
    arguments = (kind, num_tasks, micro_batch, shard_size, only, num_steps)
    ranks = run_ranks(world_size, outcomes, *arguments)
    assert list(ranks[0]) == [name for name in expected if name in only or not only]
    for name, steps in ranks[0].items():
        assert len(steps) == num_steps
        for step, (gradient, metrics) in enumerate(expected[name][:num_steps]):
            for results in ranks:
                there, metrics_there = results[name][step]
                # Sums in another order, in float64; surgery and the shortest combination pass errors of inner
                # products on times the ratio of the gradients' norms.
                assert_gradients_agree(there, gradient, rtol=1e-9)
                assert metrics_there == pytest.approx(metrics, rel=1e-9, abs=1e-9), f"{name}, step {step}"
                # What ranks decide by is the same bit for bit.
                assert metrics_there == ranks[0][name][step][1], f"{name}, step {step}"


def test_combiners_differ_from_the_mean_where_they_should() -> None:
    found = on_one_rank(TASKS)
    mean = found["mean"]
    assert_gradients_agree(found["mean with cosines"][2][0], mean[2][0], rtol=1e-12)
    for name, steps in found.items():
        if not name.startswith("mean"):
            other = flat(steps[STEPS - 1][0], ("",)) - flat(mean[STEPS - 1][0], ("",))
            assert float(other.norm()) > 1e-3 * float(flat(mean[STEPS - 1][0], ("",)).norm()), name
        # The meta-loss that is logged is not weighted.
        for (_, metrics), (_, plain) in zip(steps, mean, strict=True):
            assert metrics["meta_loss"] == pytest.approx(plain["meta_loss"], rel=1e-12), name
            assert metrics["loss_after"] == pytest.approx(plain["loss_after"], rel=1e-12), name


@pytest.mark.parametrize(
    ("name", "combined"),
    [
        ("pcgrad", ("init.", "backbone.", "rates.")),
        ("pcgrad of the initialisation", ("init.",)),
    ],
)
def test_surgery_of_an_outer_step_is_that_of_the_tasks_alone(name: str, combined: tuple[str, ...]) -> None:
    for step, (gradient, metrics) in enumerate(on_one_rank(TASKS)[name]):
        numbers = numbers_of(step, TASKS)
        gradients = torch.stack([flat(alone(number)[0], combined) for number in numbers])
        tasks = records([1.0] * TASKS, first=numbers[0])
        orders = [PCGrad(3)._order(place, tasks) for place in range(TASKS)]
        expected = surgery_on_vectors(gradients, orders)
        torch.testing.assert_close(flat(gradient, combined), expected, rtol=1e-10, atol=1e-12)
        cosines = [
            float(torch.cosine_similarity(gradients[one], gradients[other], dim=0))
            for one in range(TASKS)
            for other in range(one)
        ]
        assert metrics["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
        assert metrics["conflict_share"] == sum(cosine < 0 for cosine in cosines) / len(cosines)
        others = tuple({"init.", "backbone.", "rates."} - set(combined))
        if others:
            mean = torch.stack([flat(alone(number)[0], others) for number in numbers]).mean(0)
            torch.testing.assert_close(flat(gradient, others), mean, rtol=1e-10, atol=1e-12)


def test_the_shortest_combination_of_an_outer_step_is_that_of_the_tasks_alone() -> None:
    for step, (gradient, _) in enumerate(on_one_rank(2)["mgda"]):
        one, other = (flat(alone(number)[0], ("",)) for number in numbers_of(step, 2))
        weight = closed_form(one, other)
        torch.testing.assert_close(
            flat(gradient, ("",)), weight * one + (1.0 - weight) * other, rtol=1e-10, atol=1e-12
        )


def test_fair_gradients_are_those_of_the_fair_objective() -> None:
    for step, (gradient, _) in enumerate(on_one_rank(TASKS)["q_ffl"]):
        tasks = [alone(number) for number in numbers_of(step, TASKS)]
        expected = sum(loss**2.0 * flat(each, ("",)) for each, loss in tasks) / TASKS
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(flat(gradient, ("",)), expected, rtol=1e-10, atol=1e-12)


def test_uncertain_groups_weigh_less_from_the_second_step_on() -> None:
    log_variances: dict[str, float] = {}
    for step, (gradient, metrics) in enumerate(on_one_rank(TASKS)["uncertainty"]):
        numbers = numbers_of(step, TASKS)
        weights = {n: 0.5 * math.exp(-log_variances.get(group_of(n), 0.0)) for n in numbers}
        expected = sum(weights[n] * flat(alone(n)[0], ("",)) for n in numbers) / TASKS
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(flat(gradient, ("",)), expected, rtol=1e-10, atol=1e-12)
        for group, value in log_variances.items():
            assert metrics[f"weight/{group}"] == pytest.approx(0.5 * math.exp(-value), rel=1e-10)
        for group in {group_of(n) for n in numbers}:
            losses = [alone(n)[1] for n in numbers if group_of(n) == group]
            before = log_variances.get(group, 0.0)
            loss = sum(losses) / len(losses)
            log_variances[group] = before - 0.3 * 0.5 * (1.0 - math.exp(-before) * loss)
    assert len(log_variances) > 1
