"""Which states of an unroll are kept, and that the hypergradient does not depend on it."""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter

import pytest
import torch

from metaloom.engine.hypergradients.sweep import AdjointSweep
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.snapshots import Binomial, HostMemory, KeepAll, SnapshotPlan, num_reversed, split
from metaloom.engine.unroll import Snapshot
from tests.numerics.problems import assert_gradients_agree, conv4_problem
from tests.numerics.token_problems import EXACT, hypergradient, transformer_problem


class Visit:
    """Runs a plan over states that hold their own number, and records what it does."""

    def __init__(self, plan: SnapshotPlan, num_steps: int) -> None:
        self._alive: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.order: list[int] = []
        self.computed: Counter[int] = Counter()
        self.alive_at_each: list[int] = []
        self.alive_after_each: list[int] = []
        self.most_alive_within = 0
        for at in plan.backwards(self._state(0), num_steps, self._advance):
            self.order.append(int(at.fast["k"]))
            self.alive_at_each.append(len(self._alive))
            del at
            self.alive_after_each.append(len(self._alive))

    def _state(self, number: int) -> Snapshot:
        state = Hashable({"k": torch.tensor(number)}, {})
        self._alive.add(state)
        return state

    def _advance(self, at: Snapshot, step: int) -> Snapshot:
        assert int(at.fast["k"]) == step
        self.computed[step] += 1
        after = self._state(step + 1)
        self.most_alive_within = max(self.most_alive_within, len(self._alive))
        return after


class Hashable(Snapshot):
    """A snapshot that a weak set can hold."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@functools.cache
def fewest_steps(num_steps: int, num_slots: int) -> int:
    """Of all ways to reverse, by dynamic programming: one place m for the next state, then both parts."""
    if num_steps == 0:
        return 0
    if num_slots == 0:
        return num_steps + fewest_steps(num_steps - 1, 0)
    return min(
        m + fewest_steps(num_steps - m, num_slots - 1) + fewest_steps(m - 1, num_slots)
        for m in range(1, num_steps + 1)
    )


@functools.cache
def fewest_repeats(num_steps: int, num_slots: int) -> int:
    """How often the step that is computed most is computed, by dynamic programming."""
    if num_steps == 0:
        return 0
    if num_slots == 0:
        return num_steps
    return min(
        max(fewest_repeats(num_steps - m, num_slots - 1), 1 + fewest_repeats(m - 1, num_slots))
        for m in range(1, num_steps + 1)
    )


@pytest.mark.parametrize("num_slots", range(1, 7))
def test_binomial_visits_every_state_backwards_and_repeats_no_more_than_it_must(num_slots: int) -> None:
    for num_steps in range(60):
        visit = Visit(Binomial(num_slots), num_steps)
        assert visit.order == list(range(num_steps, -1, -1))
        assert visit.computed.total() == fewest_steps(num_steps, num_slots), num_steps


@pytest.mark.parametrize("num_slots", range(1, 7))
def test_binomial_never_holds_more_states_than_its_slots_the_first_and_the_one_given_out(
    num_slots: int,
) -> None:
    for num_steps in (0, 1, 2, 5, 13, 40, 59):
        visit = Visit(Binomial(num_slots), num_steps)
        assert max(visit.alive_at_each) <= num_slots + 2
        # While a step is computed: those kept, the first, where it starts and where it ends.
        assert visit.most_alive_within <= num_slots + 3


def test_keep_all_computes_every_step_once() -> None:
    for num_steps in (0, 1, 7):
        visit = Visit(KeepAll(), num_steps)
        assert visit.order == list(range(num_steps, -1, -1))
        assert visit.computed == Counter(range(num_steps))


def test_keep_all_copies_each_state_and_lets_go_of_the_one_that_the_step_made() -> None:
    visit = Visit(KeepAll(), 5)
    assert set(visit.alive_at_each) == {1}  # the first, which nobody computed
    assert visit.most_alive_within <= 2


def test_keep_all_keeps_each_tensor_of_all_states_in_one_block() -> None:
    def advance(at: Snapshot, step: int) -> Snapshot:
        return Snapshot({"w": at.fast["w"] + 1}, {"momentum": at.state["momentum"] * 2})

    start = Snapshot({"w": torch.zeros(2, 3)}, {"momentum": torch.ones(2, dtype=torch.float64)})
    states = list(KeepAll().backwards(start, 4, advance))
    assert states.pop() is start
    for name, of in (("w", [at.fast["w"] for at in states]), ("m", [at.state["momentum"] for at in states])):
        assert len({value.untyped_storage().data_ptr() for value in of}) == 1, name
    assert [float(at.fast["w"][1, 2]) for at in states] == [4, 3, 2, 1]
    assert [float(at.state["momentum"][1]) for at in states] == [16, 8, 4, 2]
    assert states[0].state["momentum"].dtype == torch.float64


@pytest.mark.parametrize("num_slots", range(1, 5))
@pytest.mark.parametrize("num_repeats", range(1, 4))
def test_num_reversed_is_the_longest_unroll_of_so_many_repeats(num_slots: int, num_repeats: int) -> None:
    longest = num_reversed(num_slots, num_repeats)
    assert longest == math.comb(num_slots + num_repeats + 1, num_repeats) - 1
    assert fewest_repeats(longest, num_slots) == num_repeats
    assert fewest_repeats(longest + 1, num_slots) == num_repeats + 1
    assert max(Visit(Binomial(num_slots), longest).computed.values()) == num_repeats


def test_nine_slots_suffice_for_65_steps_computed_twice() -> None:
    assert num_reversed(9, 2) == 65
    assert max(Visit(Binomial(9), 65).computed.values()) == 2


def test_a_split_leaves_both_parts_inside() -> None:
    assert all(1 <= split(n, s) <= n for n in range(1, 60) for s in range(1, 7))


def test_keep_all_keeps_what_steps_pass_on_once_and_copies_what_they_make() -> None:
    def advance(at: Snapshot, step: int) -> Snapshot:
        # `late` is passed on by the first steps and made by the others, `early` the other way round.
        late = at.state["late"] if step < 2 else at.state["late"] + 1
        early = at.state["early"] if step >= 2 else at.state["early"] + 1
        return Snapshot({"w": at.fast["w"] + 1}, {"anchor": at.state["anchor"], "late": late, "early": early})

    weight = torch.zeros(2, 3)
    start = Snapshot({"w": weight}, {"anchor": weight, "late": torch.zeros(2), "early": torch.zeros(2)})
    for plan in (KeepAll(), HostMemory(torch.device("cpu"))):
        states = list(plan.backwards(start, 4, advance))
        assert [float(at.fast["w"][1, 2]) for at in states] == [4, 3, 2, 1, 0]
        assert [float(at.state["late"][1]) for at in states] == [2, 1, 0, 0, 0]
        assert [float(at.state["early"][1]) for at in states] == [2, 2, 2, 1, 0]
        assert all(torch.equal(at.state["anchor"], weight) for at in states)
        assert len({at.state["anchor"].data_ptr() for at in states}) == 1
        assert len({at.state["late"].data_ptr() for at in states[2:]}) == 1
        assert len({at.state["early"].data_ptr() for at in states[:3]}) == 1


def test_host_memory_computes_every_step_once_and_lets_go_of_each_state() -> None:
    for num_steps in (0, 1, 7):
        visit = Visit(HostMemory(torch.device("cpu")), num_steps)
        assert visit.order == list(range(num_steps, -1, -1))
        assert visit.computed == Counter(range(num_steps))
        assert visit.most_alive_within <= 2
        assert max(visit.alive_after_each) <= 1  # the last, which the plan has no copy of


FLAT = [type(EXACT[name]) for name in ("rematerialized", "mixed_mode")]


# On a CPU a copy to the host's memory is made at once; its order is tested in test_host_snapshots.py.
PLANS = [Binomial(1), Binomial(2), Binomial(5), HostMemory(torch.device("cpu"))]


@pytest.mark.parametrize("estimator", FLAT)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_sweep_over_any_plan_equals_one_over_all_bit_for_bit(
    estimator: type[AdjointSweep], plan: SnapshotPlan
) -> None:
    for problem in (
        conv4_problem(step_weights=(0.1, 0.0, 0.0, 0.4, 0.0, 1.0), grain="per_tensor"),
        conv4_problem(step_weights=(0.0, 0.0, 0.5, 1.0), rule=Adam(GradientTerms(proximal=0.3))),
        transformer_problem(step_weights=(0.0, 0.0, 0.3, 0.0, 1.0), dropout=0.3),
    ):
        expected = hypergradient(problem, estimator(KeepAll()))
        actual = hypergradient(problem, estimator(plan))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("estimator", FLAT)
@pytest.mark.parametrize("snapshots", [KeepAll(), Binomial(1)], ids=["all", "binomial"])
def test_any_number_of_kept_graphs_gives_the_hypergradient_of_the_whole_one(
    estimator: type[AdjointSweep], snapshots: SnapshotPlan
) -> None:
    # A term at every step but one: kept and swept steps both add theirs.
    problem = transformer_problem(step_weights=(0.2, 0.5, 0.0, 0.3, 1.0), backbone=True)
    expected = EXACT["unrolled"].meta_gradient(problem.unroll, problem.meta, problem.batch)
    for num_graph_steps in range(6):  # 4 inner steps: more than all is all
        sweep = estimator(snapshots, num_graph_steps)
        actual = sweep.meta_gradient(problem.unroll, problem.meta, problem.batch)
        # Sums in another order.
        assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-9)
        torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-12, atol=0.0)
        assert actual.metrics.keys() == expected.metrics.keys()
