"""Norms with weights and statistics of their own for each inner step, against a network written out by hand.

Shape letters: T tasks, N examples, K inner steps, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.norms import PerStepNorms
from metaloom.engine.adapters.zero_head import ZeroHeadAdapter
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.capabilities import PER_STEP
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.outer import OuterOptimizer, update_rule
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError
from tests.numerics.problems import RATE, Problem, conv4_problem
from tests.unit.test_engine_step import SETTINGS

K = 2
UNIFORM = (0.0, 0.5, 0.5)
WEIGHTS = PerStepNorms(K, weights=True, statistics=False)
STATISTICS = PerStepNorms(K, weights=False, statistics=True)
BOTH = PerStepNorms(K, weights=True, statistics=True)
Statistics = dict[str, list[Tensor]]


def spread(problem: Problem) -> Problem:
    """The same with rows that differ: all alike, a wrong row would go unnoticed."""
    generator = torch.Generator().manual_seed(3)
    meta = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in problem.meta.items()
    }
    return dataclasses.replace(problem, meta=meta)


def by_hand(
    fast: dict[str, Tensor],
    shared: dict[str, Tensor],
    images: Tensor,
    row: int,
    used: Statistics | None = None,
    met: Statistics | None = None,
) -> Tensor:
    """The logits of `Conv4`, with row `row` of what norms have."""
    hidden = images
    for block in range(3):
        name = f"blocks.{block}"
        hidden = F.conv2d(hidden, fast[f"{name}.conv.weight"], stride=2, padding=1)
        dims = (0, 2, 3)
        mean, variance = hidden.mean(dims), hidden.var(dims, unbiased=False)
        if met is not None:
            moments = torch.stack([mean, hidden.var(dims, unbiased=True)]).detach()
            met.setdefault(f"{name}.norm", []).append(moments)
        if used is not None:
            mean, variance = used[f"{name}.norm"][row]
        normed = (hidden - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        gamma, beta = (
            shared[f"{name}.norm.{kind}"][row]
            if f"{name}.norm.{kind}" in shared
            else fast[f"{name}.norm.{kind}"]
            for kind in ("weight", "bias")
        )
        hidden = F.relu(normed * gamma[:, None, None] + beta[:, None, None])
    return hidden.mean((2, 3)) @ fast["head.weight"].T + fast["head.bias"]


def losses_by_hand(
    problem: Problem, meta: dict[str, Tensor], task: int, *, used: Statistics | None = None
) -> tuple[list[Tensor], list[Statistics]]:
    """The query loss of a task after 0 .. K steps of gradient descent, and what norms met at each step."""
    initial = {name.removeprefix("init."): value for name, value in meta.items() if name.startswith("init.")}
    shared = {name.removeprefix(PER_STEP): value for name, value in meta.items() if name.startswith(PER_STEP)}
    fast, losses = dict(initial), []
    met: list[Statistics] = []
    for step in range(K + 1):
        met.append({})
        query = by_hand(fast, shared, problem.batch.query["inputs"][task], step, used, met[-1])
        losses.append(F.cross_entropy(query, problem.batch.query["targets"][task]))
        if step < K:
            support = by_hand(fast, shared, problem.batch.support["inputs"][task], step, used, met[-1])
            loss = F.cross_entropy(support, problem.batch.support["targets"][task])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                name: value - RATE * grad for (name, value), grad in zip(fast.items(), grads, strict=True)
            }
    return losses, met


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode"])
@pytest.mark.parametrize("norms", [WEIGHTS, BOTH])
def test_hypergradients_of_rows_equal_those_of_a_network_by_hand(estimator: str, norms: PerStepNorms) -> None:
    problem = spread(conv4_problem(step_weights=UNIFORM, norms=norms))
    algorithm = Maml(problem.unroll, HYPERGRADIENTS[estimator]())
    found = algorithm.meta_gradient(problem.meta, problem.batch).gradient
    meta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    total = sum(
        weight * loss
        for task in range(problem.batch.num_tasks)
        for weight, loss in zip(UNIFORM, losses_by_hand(problem, meta, task)[0], strict=True)
    )
    assert isinstance(total, Tensor)
    expected = torch.autograd.grad(total, list(meta.values()))
    assert any(name.startswith(f"{PER_STEP}blocks.0.norm") for name in meta)
    for name, value in zip(meta, expected, strict=True):
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name


def test_rows_are_not_adapted_and_everything_else_is() -> None:
    problem = conv4_problem(step_weights=UNIFORM, norms=WEIGHTS)
    fast = problem.unroll.learner.init(problem.meta, 2)
    assert not any("norm" in name for name in fast)
    rows = {name: value for name, value in problem.meta.items() if name.startswith("backbone.")}
    assert {name: len(value) for name, value in rows.items()} == dict.fromkeys(rows, K + 1)
    assert len(rows) == 6


def test_vmap_takes_the_same_rows_as_the_loop() -> None:
    found = []
    ways: tuple[Literal["loop", "vmap"], ...] = ("loop", "vmap")
    for tasks in ways:
        problem = spread(conv4_problem(step_weights=UNIFORM, norms=WEIGHTS, tasks=tasks))
        found.append(
            Maml(problem.unroll, HYPERGRADIENTS["unrolled"]()).meta_gradient(problem.meta, problem.batch)
        )
    for name, value in found[0].gradient.items():
        assert torch.allclose(value, found[1].gradient[name], rtol=1e-9, atol=1e-11)


def test_a_step_beyond_the_last_has_the_last_row() -> None:
    problem = spread(conv4_problem(step_weights=UNIFORM, norms=WEIGHTS))
    learner = problem.unroll.learner
    fast = learner.init(problem.meta, 2)
    at = {
        step: learner.losses("query", problem.meta, fast, problem.batch, step)[0]
        for step in (K - 1, K, K + 3)
    }
    assert torch.equal(at[K], at[K + 3])
    assert not torch.allclose(at[K], at[K - 1])


@pytest.mark.parametrize("estimator", ["unrolled", "rematerialized", "mixed_mode", "first_order"])
def test_what_norms_meet_is_counted_once_for_each_step(estimator: str) -> None:
    problem = spread(conv4_problem(step_weights=UNIFORM, norms=BOTH))
    algorithm = Maml(problem.unroll, HYPERGRADIENTS[estimator]())
    counted = algorithm.meta_gradient(problem.meta, problem.batch).tracked
    meta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    met = [losses_by_hand(problem, meta, task)[1] for task in range(problem.batch.num_tasks)]
    assert counted.keys() == {f"tracked.blocks.{block}.norm" for block in range(3)}
    for name, rows in counted.items():
        for step in range(K + 1):
            expected = sum(torch.stack(task[step][name.removeprefix("tracked.")]).mean(0) for task in met)
            if step == 0:  # the query loss there has the weight 0, and is not computed
                expected = sum(task[0][name.removeprefix("tracked.")][1] for task in met)
            assert torch.allclose(rows[step], expected, rtol=1e-9), (name, step)  # type: ignore[arg-type]


def test_blocks_that_are_computed_again_count_once() -> None:
    problem = conv4_problem(step_weights=UNIFORM, norms=STATISTICS)
    recomputing = dataclasses.replace(
        problem.unroll, learner=dataclasses.replace(problem.unroll.learner, recompute_blocks=True)
    )
    plain, again = (
        Maml(unroll, HYPERGRADIENTS["rematerialized"]()).meta_gradient(problem.meta, problem.batch).tracked
        for unroll in (problem.unroll, recomputing)
    )
    for name, value in plain.items():
        assert torch.equal(value, again[name])


def test_a_dummy_is_not_counted() -> None:
    problem = conv4_problem(step_weights=UNIFORM, norms=STATISTICS)
    algorithm = Maml(problem.unroll, HYPERGRADIENTS["rematerialized"]())
    first, _ = problem.batch.split(1)
    masked = dataclasses.replace(problem.batch, weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    alone = algorithm.meta_gradient(problem.meta, first).tracked
    for name, value in algorithm.meta_gradient(problem.meta, masked).tracked.items():
        assert torch.allclose(value, alone[name], rtol=1e-12)


def test_padding_is_not_counted() -> None:
    problem = conv4_problem(step_weights=UNIFORM, norms=STATISTICS)
    algorithm = Maml(problem.unroll, HYPERGRADIENTS["rematerialized"]())

    def padded(part: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = torch.ones(part["targets"].shape, dtype=torch.float64)
        return {
            "inputs": torch.cat([part["inputs"], 9.0 + part["inputs"][:, :2]], dim=1),
            "targets": torch.cat([part["targets"], part["targets"][:, :2]], dim=1),
            "weights": torch.cat([ones, torch.zeros_like(ones[:, :2])], dim=1),
        }

    batch = dataclasses.replace(
        problem.batch, support=padded(dict(problem.batch.support)), query=padded(dict(problem.batch.query))
    )
    plain = algorithm.meta_gradient(problem.meta, problem.batch).tracked
    for name, value in algorithm.meta_gradient(problem.meta, batch).tracked.items():
        assert torch.allclose(value, plain[name], rtol=1e-9)


def test_evaluation_normalises_by_the_statistics_of_the_step() -> None:
    problem = spread(conv4_problem(step_weights=UNIFORM, norms=BOTH))
    algorithm = Maml(problem.unroll, HYPERGRADIENTS["unrolled"]())
    tracked = algorithm.meta_gradient(problem.meta, problem.batch).tracked
    tracked = {name: value / problem.batch.num_tasks for name, value in tracked.items()}
    curve = algorithm.curve(problem.meta | tracked, problem.batch, num_steps=K)["loss"]
    used = {name.removeprefix("tracked."): list(value) for name, value in tracked.items()}
    meta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    for task in range(problem.batch.num_tasks):
        losses, _ = losses_by_hand(problem, meta, task, used=used)
        assert curve[task].tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-9)
    # A prediction then does not depend on the examples beside it: of one query image the loss is its own.
    query = {name: value[:, :1] for name, value in problem.batch.query.items()}
    alone = algorithm.curve(
        problem.meta | tracked, dataclasses.replace(problem.batch, query=query), num_steps=K
    )
    pair = {name: value[:, :2] for name, value in problem.batch.query.items()}
    second = {name: value[:, 1:2] for name, value in problem.batch.query.items()}
    both, other = (
        algorithm.curve(problem.meta | tracked, dataclasses.replace(problem.batch, query=part), num_steps=K)
        for part in (pair, second)
    )
    assert torch.allclose(both["loss"], (alone["loss"] + other["loss"]) / 2, rtol=1e-12)


def test_running_means_move_by_a_tenth_and_survive_a_checkpoint() -> None:
    meta, start = {"init.w": torch.ones(2)}, {"tracked.norm": torch.tensor([[0.0, 1.0]])}
    outer = OuterOptimizer(meta, SETTINGS, Replicated(), tracked=start)
    outer.count({"tracked.norm": torch.tensor([[2.0, 6.0]])})
    outer.count({"tracked.norm": torch.tensor([[2.0, 6.0]])})
    outer.update({"init.w": torch.ones(2)}, num_tasks=4)
    assert torch.allclose(outer.evaluation_parameters()["tracked.norm"], torch.tensor([[0.1, 1.2]]))
    assert "tracked.norm" not in outer.meta
    outer.count({"tracked.norm": torch.full((1, 2), 100.0)})
    outer.update({"init.w": torch.full((2,), torch.nan)}, num_tasks=4, is_expected=True)
    outer.update({"init.w": torch.zeros(2)}, num_tasks=4)  # of the skipped step nothing is left
    expected = 0.9 * torch.tensor([[0.1, 1.2]])
    assert torch.allclose(outer.evaluation_parameters()["tracked.norm"], expected)
    other = OuterOptimizer(meta, SETTINGS, Replicated(), tracked=start)
    other.load(outer.tensors(), outer.scalars())
    assert torch.equal(
        other.evaluation_parameters()["tracked.norm"], outer.evaluation_parameters()["tracked.norm"]
    )


def test_a_head_from_zero_leaves_what_is_counted() -> None:
    problem = conv4_problem(step_weights=UNIFORM, norms=BOTH)
    adapter = problem.unroll.learner.adapter
    assert ZeroHeadAdapter(adapter, None).tracked().keys() == adapter.tracked().keys() != set()


def test_rows_of_norms_are_not_decayed_as_norms_are_not() -> None:
    meta = conv4_problem(step_weights=UNIFORM, norms=WEIGHTS).meta
    rule = update_rule(meta, dataclasses.replace(SETTINGS, weight_decay=0.1))
    decayed = {name for name in meta if rule.weight_decay[name] != 0.0}
    assert decayed == {f"init.blocks.{block}.conv.weight" for block in range(3)} | {"init.head.weight"}


def test_models_without_such_norms_and_vmap_are_refused() -> None:
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(CapabilityError, match="weights: per_step; and this model has no norm with weights"):
        FullAdapter(linear, norms=WEIGHTS)
    with pytest.raises(CapabilityError, match="counts what batch norms meet, and this model has none"):
        FullAdapter(linear, norms=STATISTICS)
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(CapabilityError, match="is not counted inside vmap"):
        FullAdapter(norm, norms=STATISTICS, tasks="vmap")
