"""The head on its own way: from zero in every task, and ahead of the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.zero_head import ZeroHeadAdapter
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.head_first import HeadFirst
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.snapshots import Binomial, HostMemory, SnapshotPlan
from metaloom.engine.unroll import adapt, first_snapshot
from tests.numerics.problems import Problem, assert_gradients_agree, conv4_problem, last, relative_error

HEAD = ("head.weight", "head.bias")
ALL_TERMS = GradientTerms(weight_decay=0.05, clip_norm=0.05, proximal=0.3)
RULES: dict[str, InnerRule] = {
    "momentum, all terms": Sgd(ALL_TERMS, momentum=0.7),
    "without memory": Sgd(),
    "adam, all terms": Adam(ALL_TERMS, eps_root=1e-4),
    "adamw": Adam(GradientTerms(proximal=0.2), eps_root=1e-4, decoupled_weight_decay=0.1),
    "rmsprop": RmsProp(ALL_TERMS, momentum=0.5, centered=True, eps_root=1e-4),
}


def head_first(rule: InnerRule, *, num_head_steps: int = 2, num_steps: int = 4) -> Problem:
    problem = conv4_problem(step_weights=last(num_steps), rule=rule, grain="per_tensor")
    first = HeadFirst(frozenset(HEAD), num_head_steps)
    return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, head_first=first))


def zero_headed() -> Problem:
    problem = conv4_problem(step_weights=last(3), grain="per_tensor")
    adapter = ZeroHeadAdapter(FullAdapter(problem.model, structure=Structure((), "head")), None)
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    meta = {name: value for name, value in problem.meta.items() if not name.startswith("init.head")}
    return dataclasses.replace(
        problem, unroll=dataclasses.replace(problem.unroll, learner=learner), meta=meta
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_first_steps_are_those_of_the_head_alone_and_the_others_start_anew(rule: str) -> None:
    problem = head_first(RULES[rule])
    unroll, batch = problem.unroll, problem.batch
    actual = list(adapt(unroll, problem.meta, batch, num_steps=4))
    # The head alone, on a backbone that is where all starts.
    shared = {
        name.replace("init.", "backbone."): value
        for name, value in problem.meta.items()
        if name.startswith("init.") and name.removeprefix("init.") not in HEAD
    }
    adapter = PartAdapter(problem.model, names=HEAD, tasks="loop", structure=Structure((), "head"))
    learner = dataclasses.replace(unroll.learner, adapter=adapter)
    alone = dataclasses.replace(unroll, learner=learner, head_first=None)
    probed = list(adapt(alone, problem.meta | shared, batch, num_steps=2))[-1].fast
    # Then all, without a memory of it, pulled to where all started.
    everything = dataclasses.replace(unroll, head_first=None)
    start = first_snapshot(everything, problem.meta, batch.num_tasks)
    fast, state = start.fast | probed, start.state
    for step in (2, 3):
        leaves = {name: value.detach().requires_grad_() for name, value in fast.items()}
        fast, state = everything.inner_step(problem.meta, leaves, state, batch, step, create_graph=False)
    for name, value in fast.items():
        # The same sums: of all weights in one pass, or of the head alone.
        torch.testing.assert_close(actual[-1].fast[name], value.detach(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_the_head_moves_in_its_steps_nor_does_what_the_rule_remembers(rule: str) -> None:
    problem = head_first(RULES[rule])
    path = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=3))
    for step in (1, 2, 3):
        for name, value in path[step].fast.items():
            is_still = name not in HEAD and step < 3
            assert torch.equal(value, path[0].fast[name]) == is_still, (name, step)
        for name, value in path[step].state.items():
            if name.partition("/")[2] not in (*HEAD, "") and step < 3:
                assert torch.equal(value, path[0].state[name]), (name, step)


@pytest.mark.parametrize("rule", RULES)
def test_every_exact_estimator_equals_unrolled_and_differences_of_the_meta_loss(rule: str) -> None:
    problem = head_first(RULES[rule], num_steps=3)
    expected = HYPERGRADIENTS["unrolled"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    for estimator in ("rematerialized", "mixed_mode"):
        actual = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
        assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-8)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in problem.meta.items()
    }
    slope = sum(float((expected.gradient[name] * value).sum()) for name, value in direction.items())
    above, below = (_meta_loss(problem, direction, sign * 1e-6) for sign in (1.0, -1.0))
    # Truncation falls as the square of the distance, rounding rises as its inverse: both are near 1e-9.
    assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("plan", [Binomial(1), HostMemory(torch.device("cpu"))], ids=["binomial", "host"])
@pytest.mark.parametrize("rule", ["adam, all terms", "momentum, all terms"])
def test_states_that_stay_at_first_and_move_later_are_kept_by_every_plan(
    rule: str, plan: SnapshotPlan
) -> None:
    problem = head_first(RULES[rule])
    expected = Rematerialized().meta_gradient(problem.unroll, problem.meta, problem.batch)
    actual = Rematerialized(plan).meta_gradient(problem.unroll, problem.meta, problem.batch)
    for name, value in expected.gradient.items():
        assert torch.equal(actual.gradient[name], value), name


def _meta_loss(problem: Problem, direction: dict[str, Tensor], distance: float) -> float:
    meta = {name: value + distance * direction[name] for name, value in problem.meta.items()}
    end = list(adapt(problem.unroll, meta, problem.batch, num_steps=problem.unroll.num_steps))[-1]
    losses, _ = problem.unroll.learner.losses("query", meta, end.fast, problem.batch, 0)
    return float(losses.sum())


@pytest.mark.parametrize("estimator", ["rematerialized", "mixed_mode"])
def test_a_head_that_starts_at_zero_has_an_exact_hypergradient(estimator: str) -> None:
    problem = zero_headed()
    actual = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    expected = HYPERGRADIENTS["unrolled"]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    assert_gradients_agree(actual.gradient, expected.gradient, rtol=1e-9)


def test_a_head_of_zero_prefers_nothing_is_not_learned_and_moves_first() -> None:
    problem = zero_headed()
    learner = problem.unroll.learner
    assert not any("head" in name for name in learner.adapter.meta_parameters(init=True, backbone=False))
    path = list(adapt(problem.unroll, problem.meta, problem.batch, num_steps=2))
    losses, _ = learner.losses("support", problem.meta, path[0].fast, problem.batch, 0)
    # Of three classes, all alike.
    torch.testing.assert_close(losses, torch.full_like(losses, 3.0).log(), rtol=1e-14, atol=0)
    for name, value in path[1].fast.items():
        assert torch.equal(value, path[0].fast[name]) == (name not in HEAD), name
    assert all(relative_error(path[2].fast[name], value) > 0.0 for name, value in path[1].fast.items())


def test_reptile_moves_all_that_is_learned_beside_a_head_of_zero() -> None:
    problem = zero_headed()
    meta = {name: value for name, value in problem.meta.items() if name.startswith("init.")}
    unroll = dataclasses.replace(
        problem.unroll, rates=dataclasses.replace(problem.unroll.rates, grain="none")
    )
    gradient = Reptile().meta_gradient(unroll, meta, problem.batch).gradient
    assert gradient.keys() == meta.keys()
    assert all(bool(value.any()) for value in gradient.values())
