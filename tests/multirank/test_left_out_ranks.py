"""Tasks that are not finite, wherever they are: all ranks leave them out, in step with each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.datasets import share_of_rank
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.combiners.pcgrad import PCGrad
from metaloom.engine.combiners.per_task import PerTask
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.solvers import ConjugateGradient
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inequality import Measure
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.left_out import LeftOut
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Sharded
from metaloom.engine.step import StepTasks, outer_step
from tests.multirank.processes import run_ranks
from tests.multirank.sharded_problems import CPU, full, in_shards
from tests.multirank.test_task_batches import Lockstep
from tests.numerics.poisoned import Poison, poisoned
from tests.numerics.problems import Problem, assert_gradients_agree
from tests.numerics.token_problems import transformer_problem
from tests.unit.test_engine_step import SETTINGS

NUMBERS = (3, 8, 1, 6, 2)
ESTIMATORS: dict[str, Hypergradient] = {
    "rematerialized": Rematerialized(),
    "mixed_mode": MixedMode(),
    "unrolled": Unrolled(),
    "implicit": Implicit(ConjugateGradient(3, 0.0)),  # of one rank alone
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Two outer steps on the same tasks.

    Attributes:
        estimator: its name.
        micro_batch: tasks side by side.
        poison: what is not finite.
        per_task: whether gradients are combined by surgery.
        coupled: whether the meta-loss couples the tasks.
    """

    estimator: str
    micro_batch: int
    poison: Poison
    per_task: bool = False
    coupled: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What two steps have come to on a rank, with whole meta-parameters."""

    meta: dict[str, Tensor]
    metrics: list[dict[str, float]]
    told: list[list[LeftOut]]
    num_reduced: int


def problem(numbers: tuple[int, ...], estimator: str) -> Problem:
    is_implicit = estimator == "implicit"
    return transformer_problem(
        numbers=numbers,
        step_weights=(0.0, 0.0, 1.0) if is_implicit else (0.0, 0.4, 1.1),
        rule=Sgd(GradientTerms(proximal=0.3)) if is_implicit else None,
        grain="none" if is_implicit else "shared",
        backbone=True,
    )


def steps(case: Case, sharding: Sharding, numbers: tuple[int, ...]) -> Outcome:
    """Trains on this rank's share of the tasks of these numbers."""
    share = share_of_rank(len(numbers), sharding.rank, sharding.world_size, is_lockstep=sharding.is_lockstep)
    own = tuple(numbers[position] for position in share.positions)
    made = problem(own or numbers[:1], case.estimator)
    if isinstance(sharding, Sharded):
        made = in_shards(made, sharding)
    estimator = ESTIMATORS[case.estimator]
    if sharding.is_lockstep and isinstance(estimator, Implicit):
        estimator = Implicit(ConjugateGradient(3, 0.0, sharding.any_rank))
    maml = Maml(poisoned(made.unroll, case.poison), estimator, backbone=True)
    algorithm: Algorithm = Inequality(maml, Measure("theil"), 5.0) if case.coupled else maml
    outer = OuterOptimizer(made.meta, dataclasses.replace(SETTINGS, lr=0.05, lr_rates=0.05), sharding)
    combiner: Combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    if case.per_task:
        combiner = PerTask(PCGrad(3), outer.meta, sharding, metric_names=algorithm.metric_names)
    batch = None
    if own:
        weights = torch.ones(len(own), dtype=torch.float64)
        weights[len(own) - share.num_dummies :] = 0.0
        batch = dataclasses.replace(made.batch, weights=weights if share.num_dummies else None)
    told: list[list[LeftOut]] = []
    num_reduced = 0
    plain = dist.all_reduce

    def all_reduce(*args: Any, **options: Any) -> Any:
        nonlocal num_reduced
        num_reduced += 1
        return plain(*args, **options)

    dist.all_reduce = all_reduce
    try:
        metrics = [
            outer_step(
                StepTasks(batch, len(numbers), case.micro_batch),
                algorithm,
                combiner,
                outer,
                LossScaler(Precision("float64")),
                on_left_out=lambda left_out: told.append(list(left_out)),
            )
            for _ in range(2)
        ]
    finally:
        dist.all_reduce = plain
    meta = outer.meta
    if isinstance(sharding, Sharded):
        meta = {name: full(sharding, name, value) for name, value in meta.items()}
    return Outcome(meta, metrics, told, num_reduced)


def on_this_rank(kind: str, shard_size: int | None, cases: list[Case]) -> list[Outcome]:
    found = []
    for case in cases:
        sharding: Sharding
        if kind == "sharded":
            sharding = Sharded(CPU, shard_size=shard_size)
        else:
            sharding = Lockstep() if kind == "lockstep" else Replicated()
        found.append(steps(case, sharding, NUMBERS))
    return found


@functools.cache
def without_them(case: Case) -> Outcome:
    """What one rank comes to that never had the bad tasks."""
    kept = tuple(number for number in NUMBERS if number not in case.poison.numbers)
    return steps(dataclasses.replace(case, poison=Poison(()), micro_batch=len(kept)), Replicated(), kept)


SUPPORT, LATE, QUERY = Poison(()), Poison((), step=1, factor=torch.inf), Poison((), "outer", 1)
# Of one rank; all of a rank's; the first, which dummies repeat; and some of all ranks.
SETS = {"one": (8,), "all of the first": (3, 8, 1), "the first": (3,), "the last": (6, 2), "of all": (3, 6)}


def cases_of(kind: str) -> list[Case]:
    found = [
        Case("rematerialized", 2, dataclasses.replace(SUPPORT, numbers=numbers)) for numbers in SETS.values()
    ]
    found += [
        Case("mixed_mode", 1, dataclasses.replace(LATE, numbers=SETS["one"])),
        Case("mixed_mode", 2, dataclasses.replace(LATE, numbers=SETS["all of the first"])),
        # Found in the midst of the sweep, where a meta-loss has a part before the end.
        Case("rematerialized", 2, dataclasses.replace(QUERY, numbers=SETS["of all"])),
        Case("unrolled", 3, dataclasses.replace(QUERY, numbers=SETS["the last"])),
        Case("implicit", 2, dataclasses.replace(SUPPORT, numbers=SETS["of all"])),
        Case("rematerialized", 2, dataclasses.replace(LATE, numbers=SETS["of all"]), per_task=True),
        Case("rematerialized", 2, dataclasses.replace(LATE, numbers=SETS["all of the first"]), coupled=True),
    ]
    return found if kind != "sharded" else [case for case in found if not case.coupled]


@pytest.mark.parametrize(
    ("kind", "world_size", "shard_size"),
    [
        ("replicated", 1, None),
        ("replicated", 2, None),
        pytest.param("replicated", 4, None, marks=pytest.mark.slow),
        pytest.param("lockstep", 2, None, marks=pytest.mark.slow),
        pytest.param("sharded", 2, None, marks=pytest.mark.slow),
        ("sharded", 4, 2),
    ],
)
def test_ranks_come_to_what_one_rank_does_without_the_bad_tasks(
    kind: str, world_size: int, shard_size: int | None
) -> None:
    cases = cases_of(kind)
    if world_size == 1:
        ranks = [on_this_rank(kind, shard_size, cases)]
    else:
        ranks = run_ranks(world_size, on_this_rank, kind, shard_size, cases, timeout_s=600.0)
    for place, case in enumerate(cases):
        expected = without_them(case)
        start = problem(NUMBERS[:1], case.estimator).meta
        moved = {name: value - start[name] for name, value in expected.meta.items()}
        for results in ranks:
            found = results[place]
            # Sums in another order, in float64, twice; conjugate gradients and surgery carry it on.
            there = {name: value - start[name] for name, value in found.meta.items()}
            assert_gradients_agree(there, moved, rtol=1e-8)
            for metrics, plain in zip(found.metrics, expected.metrics, strict=True):
                left_out = {"left_out": float(len(case.poison.numbers))}
                assert metrics == pytest.approx(plain | left_out, rel=1e-8), case
            # Told of all ranks' on every rank, each once, in both steps.
            assert len(found.told) == 2
            for told in found.told:
                assert sorted(task.number for task in told) == sorted(case.poison.numbers)
            assert found.metrics == ranks[0][place].metrics
            assert found.num_reduced == ranks[0][place].num_reduced
            for name, value in found.meta.items():
                assert torch.equal(value, ranks[0][place].meta[name]), name


def without_any(kind: str) -> Outcome:
    case = Case("rematerialized", 2, Poison(NUMBERS, "outer", None))
    sharding: Sharding = Sharded(CPU) if kind == "sharded" else Replicated()
    return steps(case, sharding, NUMBERS)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_step_without_any_finite_task_moves_nothing_on_any_rank(kind: str) -> None:
    start = problem(NUMBERS[:1], "rematerialized").meta
    for found in run_ranks(2, without_any, kind):
        assert [metrics["skipped"] for metrics in found.metrics] == [1.0, 1.0]
        assert [metrics["left_out"] for metrics in found.metrics] == [5.0, 5.0]
        for name, value in found.meta.items():
            assert torch.equal(value, start[name]), name


def flags_of_a_step(kind: str) -> int:
    """How many flags ranks tell each other where every task is finite, in three micro-batches."""
    num_flags = 0
    sharding: Sharding = Lockstep() if kind == "lockstep" else Replicated()
    plain = type(sharding).any_rank

    def any_rank(self: Sharding, flag: bool) -> bool:
        nonlocal num_flags
        num_flags += 1
        return plain(self, flag)

    type(sharding).any_rank = any_rank  # type: ignore[method-assign]
    steps(Case("rematerialized", 1, Poison(())), sharding, NUMBERS)
    return num_flags


def test_ranks_ask_each_other_in_lockstep_alone() -> None:
    assert run_ranks(2, flags_of_a_step, "replicated") == [0, 0]
    # Once before each sweep, and once in it: the meta-loss has a part after the first step. Two steps.
    assert run_ranks(2, flags_of_a_step, "lockstep") == [2 * 2 * 3] * 2
