"""Choosing between exact ways by measuring them; what is measured is injected, since no test takes time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from metaloom.engine import choice
from metaloom.engine.adapters.base import Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import Readout
from metaloom.engine.choice import (
    EstimatorChoice,
    _graph_sizes,
    choose_estimator,
    fastest,
    graph_bytes,
    shortened,
)
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.inner_loops.head_first import HeadFirst
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.snapshots import Binomial, KeepAll
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, assert_gradients_agree, conv4_problem
from tests.numerics.token_problems import hypergradient, recomputing, transformer_problem

CPU = torch.device("cpu")
GRAPH = "graph of all steps"
_Value = TypeVar("_Value")


class OneOfSeveral(Replicated):
    """A rank whose partners' lists are known: `gather` joins them, in the order of calls."""

    def __init__(self, others: list[list[Any]]) -> None:
        super().__init__()
        self._others = iter(others)

    def gather(self, values: list[_Value]) -> list[_Value]:
        return [*values, *next(self._others)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, float]], list[str]]:
    """Sets how long each way takes, by name; ways run all the same, and are recorded."""

    def inject(seconds: Mapping[str, float]) -> list[str]:
        calls: list[str] = []
        turns: Iterator[str] = iter(list(seconds) * 100)

        def measure(way: Callable[[], object], device: torch.device) -> float:
            name = next(turns)
            calls.append(name)
            way()
            return seconds[name]

        monkeypatch.setattr(choice, "_timed", measure)
        return calls

    return inject


def nothing() -> None:
    """A way that does nothing."""


Timed = Callable[[Mapping[str, float]], list[str]]


def test_the_faster_of_two_ways_is_taken_and_both_are_told(timed: Timed) -> None:
    calls = timed({"one": 3.0, "other": 2.0})
    measured = fastest({"one": nothing, "other": nothing}, CPU, Replicated(), has_tasks=True)
    assert (measured.name, measured.seconds, measured.failures) == ("other", {"one": 3.0, "other": 2.0}, {})
    assert measured.in_words() == "one 3 s, other 2 s"
    # The first warms up, the repeats take turns.
    assert calls == ["one", "other"] * (1 + choice.NUM_REPEATS)


def test_the_warm_up_does_not_count_and_of_the_repeats_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 5.0, 4.0, 3.0, 2.0, 9.0])  # warm-ups of both, then turns
    monkeypatch.setattr(choice, "_timed", lambda way, device: next(times))
    measured = fastest({"one": nothing, "other": nothing}, CPU, Replicated(), has_tasks=True)
    assert measured.seconds == {"one": 2.0, "other": 3.0}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no memory\nand more"), NotImplementedError("no memory"), CapabilityError("no memory")],
)
def test_a_way_that_fails_is_not_taken_and_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tries = []

    def fail() -> None:
        num_tries.append(1)
        raise error

    def measure(way: Callable[[], object], device: torch.device) -> float:
        way()
        return 1.0

    monkeypatch.setattr(choice, "_timed", measure)
    measured = fastest({"one": fail, "other": nothing}, CPU, Replicated(), has_tasks=True)
    assert (measured.name, measured.seconds) == ("other", {"other": 1.0})
    assert measured.in_words() == "other 1 s, one not possible (no memory)"
    assert len(num_tries) == 1
    with pytest.raises(CapabilityError, match="one: no memory"):
        fastest({"one": fail}, CPU, Replicated(), has_tasks=True)
    with pytest.raises(CapabilityError, match=r"^no memory$"):
        fastest({"one": fail, "other": fail}, CPU, Replicated(), has_tasks=True)


def test_a_defect_is_not_taken_for_a_way_that_is_not_possible() -> None:
    def broken() -> None:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        fastest({"one": broken, "other": nothing}, CPU, Replicated(), has_tasks=True)


def test_all_ranks_take_the_way_that_is_fastest_on_all_together(timed: Timed) -> None:
    measurements = [{"one": 1.0, "other": 2.0}, {"one": 5.0, "other": 2.0}, {"one": 1.0, "other": 2.0}]
    chosen = []
    for rank, seconds in enumerate(measurements):
        timed(seconds)
        others: list[Any] = [(other, {}) for at, other in enumerate(measurements) if at != rank]
        measured = fastest({"one": nothing, "other": nothing}, CPU, OneOfSeveral([others]), has_tasks=True)
        chosen.append((measured.name, measured.seconds))
    assert chosen == [("other", {"one": 7.0, "other": 6.0})] * 3


def test_a_way_that_fails_on_another_rank_is_not_taken(timed: Timed) -> None:
    timed({"one": 1.0, "other": 2.0})
    others: list[Any] = [({"one": math.inf, "other": 2.0}, {"one": "no memory there"})]
    measured = fastest({"one": nothing, "other": nothing}, CPU, OneOfSeveral([others]), has_tasks=True)
    assert (measured.name, measured.failures) == ("other", {"one": "no memory there"})


def test_a_rank_without_tasks_takes_what_the_others_take() -> None:
    def broken() -> None:
        raise AssertionError("it has nothing to time")

    others: list[Any] = [({"one": 2.0, "other": 1.0}, {})]
    measured = fastest({"one": broken, "other": broken}, CPU, OneOfSeveral([others]), has_tasks=False)
    assert measured.name == "other"


# --- the size of a graph -----------------------------------------------------------------------------------

T, N, C = 2, 5, 3
NUMBER = 8  # bytes of a float64 and of an int64


class Powers(Adapter):
    """Logits `exp(exp(... w * x))`: each `exp` keeps its result."""

    def __init__(self, num_exp: int) -> None:
        self._num_exp = num_exp

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        return {"init.w": torch.full((C,), 0.1, dtype=torch.float64)}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self.meta_parameters(init=True, backbone=False), meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        logits = fast["init.w"].unsqueeze(1) * inputs
        for _ in range(self._num_exp):
            logits = logits.exp()
        return Readout(logits)


def powers(num_exp: int, num_steps: int = 0) -> Problem:
    def part() -> dict[str, Tensor]:
        inputs = torch.rand(T, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"inputs": inputs, "targets": torch.zeros(T, N, dtype=torch.int64)}

    adapter = Powers(num_exp)
    learner = Learner(adapter, Precision("float64"))
    unroll = Unroll(learner, Sgd(), Rates(0.1, "none", num_steps), (*(0.0,) * num_steps, 1.0))
    meta = adapter.meta_parameters(init=True, backbone=False)
    return Problem(unroll, meta, TaskBatch((0, 1), part(), part()), torch.nn.Identity())


def size_of(problem: Problem) -> int:
    return graph_bytes(problem.unroll, problem.meta, problem.batch)


def test_the_bytes_of_a_known_graph_are_counted_exactly() -> None:
    # The product keeps the inputs alone, which need no gradient; cross-entropy keeps its log-softmax, the
    # targets and the total of its weights, one number.
    kept = [T * N * C, T * N * C, T * N, 1]
    assert size_of(powers(0)) == NUMBER * sum(kept)


@pytest.mark.parametrize("num_exp", [1, 2, 5])
def test_every_activation_that_is_kept_counts_once(num_exp: int) -> None:
    assert size_of(powers(num_exp)) - size_of(powers(0)) == num_exp * NUMBER * T * N * C


def test_more_inner_steps_keep_a_larger_graph_by_the_same_amount_each() -> None:
    sizes = [size_of(powers(1, num_steps)) for num_steps in range(5)]
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    assert steps[0] > 0
    # The data are shared by the steps, so that the first alone adds the support data.
    assert steps[1] == steps[2] == steps[3]


def test_what_is_freed_on_the_way_does_not_count() -> None:
    problem = transformer_problem(num_sequences=20)
    smaller = recomputing(problem, blocks=True, head_chunk=4)
    # Recomputed blocks save the same activations while they run, and free them.
    assert size_of(smaller) < 0.5 * size_of(problem)


# --- the choice --------------------------------------------------------------------------------------------

NUM_STEPS = 4
FLAT_IS_FASTER = {"rematerialized": 2.0, "mixed_mode": 1.0, GRAPH: 3.0}
GRAPH_IS_FASTER = {"rematerialized": 2.0, "mixed_mode": 3.0, GRAPH: 1.0}


def problem() -> Problem:
    return transformer_problem(step_weights=(0.0, 0.2, 0.0, 0.3, 1.0))


def chosen(
    limit: int, sharding: Replicated | None = None, *, has_tasks: bool = True
) -> tuple[EstimatorChoice, str]:
    one = problem()
    return choose_estimator(
        one.unroll,
        one.meta,
        one.batch if has_tasks else None,
        memory_limit_bytes=limit,
        sharding=sharding or Replicated(),
    )


def test_a_limit_of_nothing_keeps_no_graph_and_a_huge_one_all(timed: Timed) -> None:
    timed(GRAPH_IS_FASTER)
    assert chosen(0)[0] == EstimatorChoice("rematerialized", 0)
    timed(GRAPH_IS_FASTER)
    assert chosen(10**15)[0] == EstimatorChoice("rematerialized", NUM_STEPS)


def test_a_limit_between_keeps_as_many_graphs_as_fit(timed: Timed) -> None:
    one = problem()
    query, with_one_step = (_end_bytes(one, count) for count in (0, 1))
    step = with_one_step - query
    for fitting in (1, 2, 3):
        for limit, expected in (
            (query + (fitting + 1) * step, fitting),
            (query + (fitting + 1) * step - 1, fitting - 1),
        ):
            timed(GRAPH_IS_FASTER)
            choice_made, why = chosen(limit)
            assert choice_made == EstimatorChoice("rematerialized", expected)
            assert f"so {expected} of 4 fit into the limit" in why
            # Where none fits, none is timed either.
            assert (f"keeping the graph of the last {expected} inner steps" in why) == (expected > 0)
            assert (GRAPH in why) == (expected > 0)


def _end_bytes(one: Problem, num_steps: int) -> int:
    """What the graph of the last steps keeps, with their terms of the meta-loss."""
    end = dataclasses.replace(one.unroll, step_weights=one.unroll.step_weights[-1 - num_steps :])
    return graph_bytes(end, one.meta, one.batch)


def test_graphs_that_are_kept_fit_the_limit_where_every_step_has_a_query_loss(timed: Timed) -> None:
    one = transformer_problem(step_weights=(0.2,) * (NUM_STEPS + 1))
    limit = _end_bytes(one, 2)
    timed(GRAPH_IS_FASTER)
    made, _ = choose_estimator(
        one.unroll,
        one.meta,
        one.batch,
        memory_limit_bytes=limit,
        sharding=Replicated(),
    )
    # One more step's worth is needed while the last graph is differentiated.
    assert _end_bytes(one, made.num_graph_steps + 1) <= limit


def test_where_a_graph_cannot_be_built_none_is_kept_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(way: Any, device: torch.device) -> float:
        (estimator,) = way.args
        if type(estimator) is not choice.EXACT_AND_FLAT["mixed_mode"]:
            raise torch.OutOfMemoryError("out of memory")
        return 1.0

    def broken(*args: Any) -> tuple[int, int]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(choice, "_timed", measure)
    monkeypatch.setattr(choice, "graph_bytes", broken)
    choice_made, why = chosen(10**9)
    assert choice_made == EstimatorChoice("mixed_mode", 0)
    assert "the graph of a step cannot be built" in why
    assert "rematerialized not possible (out of memory)" in why


def test_where_neither_flat_way_is_possible_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(way: Any, device: torch.device) -> float:
        (estimator,) = way.args
        if estimator.num_graph_steps == 0:
            raise NotImplementedError("no rule")
        return 1.0

    monkeypatch.setattr(choice, "_timed", measure)
    with pytest.raises(CapabilityError, match=r"neither exact way over single steps is possible .*no rule"):
        chosen(10**15)


def test_where_a_flat_estimator_is_fastest_no_graph_is_kept(timed: Timed) -> None:
    timed(FLAT_IS_FASTER)
    choice_made, why = chosen(10**15)
    assert choice_made == EstimatorChoice("mixed_mode", 0)
    assert why.startswith("mixed_mode (timed on 3 inner steps: rematerialized 2 s, mixed_mode 1 s, graph")


def test_an_estimator_that_is_not_possible_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(way: Any, device: torch.device) -> float:
        (estimator,) = way.args
        if type(estimator) is choice.EXACT_AND_FLAT["mixed_mode"]:
            raise NotImplementedError("no forward-mode rule for silu_backward")
        return 2.0

    monkeypatch.setattr(choice, "_timed", measure)
    choice_made, why = chosen(0)
    assert choice_made.kind == "rematerialized"
    assert "mixed_mode not possible (no forward-mode rule for silu_backward)" in why


def test_ranks_with_other_times_sizes_and_limits_choose_alike(timed: Timed) -> None:
    seconds = [GRAPH_IS_FASTER, {"rematerialized": 2.0, "mixed_mode": 1.5, GRAPH: 1.0}]
    sizes, limits = [(1000, 100), (5000, 400)], [10**9, 5000 + 3 * 400]
    one = problem()
    made = []
    for rank in (0, 1):
        other = 1 - rank
        timed(seconds[rank])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "_graph_sizes", lambda *args, at=rank: sizes[at])
            sharding = OneOfSeveral([[sizes[other]], [limits[other]], [(seconds[other], {})]])
            made.append(chosen(limits[rank], sharding)[0])
    # A rank without tasks.
    sharding = OneOfSeveral([sizes, limits, [(each, {}) for each in seconds]])
    made.append(chosen(10**9, sharding, has_tasks=False)[0])
    # 4 + 4.5 seconds: rematerialized 4, mixed_mode 4.5; the larger sizes and the smaller limit: 2 steps fit.
    assert made == [EstimatorChoice("rematerialized", 2)] * 3
    assert one.unroll.num_steps == NUM_STEPS


@pytest.mark.parametrize("kind", ["rematerialized", "mixed_mode"])
@pytest.mark.parametrize("num_graph_steps", [0, 2, NUM_STEPS])
def test_the_chosen_estimators_hypergradient_equals_unrolled(kind: str, num_graph_steps: int) -> None:
    one = problem()
    for snapshots in (KeepAll(), Binomial(2)):
        estimator = EstimatorChoice(kind, num_graph_steps).build(snapshots)
        assert estimator.snapshots == snapshots
        assert_gradients_agree(hypergradient(one, estimator), hypergradient(one), rtol=1e-9)


def test_measuring_for_real_chooses_an_exact_estimator() -> None:
    choice_made, why = chosen(10**15)
    assert choice_made.kind in choice.EXACT_AND_FLAT
    assert "not possible" not in why


def test_a_shortened_unroll_is_no_longer_than_the_whole() -> None:
    unroll = problem().unroll
    assert shortened(unroll, 2).step_weights == (0.0, 0.0, 1.0)
    assert shortened(unroll, 99).step_weights == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert dataclasses.replace(shortened(unroll, 2), step_weights=unroll.step_weights) == unroll


def test_steps_of_the_head_alone_are_not_what_is_measured() -> None:
    one = conv4_problem(step_weights=(0.0, 0.0, 0.0, 1.0))
    first = HeadFirst(frozenset(("head.weight", "head.bias")), 2)
    unroll = dataclasses.replace(one.unroll, head_first=first)
    assert shortened(unroll, 2).head_first is None
    assert _graph_sizes(unroll, one.meta, one.batch) == _graph_sizes(one.unroll, one.meta, one.batch)
