"""Whole-model adaptation under `vmap` and as a loop over tasks: two ways, one hypergradient.

Torch's normalisations are silently wrong in some compositions of vmap with derivatives, so every exact
estimator is compared in float64.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.unroll import adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import (
    HEAVY,
    Problem,
    assert_gradients_agree,
    conv4_problem,
    logits_of,
    relative_error,
)
from tests.numerics.token_problems import (
    EXACT,
    hypergradient,
    recomputing,
    transformer_problem,
    with_learner,
)

WEIGHTS = (0.3, 0.0, 0.5, 1.2)


def under_vmap(problem: Problem, model: nn.Module | None = None) -> Problem:
    """The same problem, its tasks in one vectorised pass."""
    adapter = FullAdapter(model or problem.model, tasks="vmap")
    return with_learner(problem, dataclasses.replace(problem.unroll.learner, adapter=adapter))


def images(rule: InnerRule = HEAVY, num_tasks: int = 3) -> Problem:
    return conv4_problem(step_weights=WEIGHTS, grain="per_tensor", rule=rule, num_tasks=num_tasks)


def tokens() -> Problem:
    return transformer_problem("full", step_weights=WEIGHTS, rule=HEAVY, numbers=(1, 2, 3))


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("rule", [HEAVY, Sgd(), Adam(eps_root=1e-4)], ids=["momentum", "sgd", "adam"])
def test_vmap_equals_the_loop_on_a_network_with_batch_norm(estimator: str, rule: InnerRule) -> None:
    problem = images(rule)
    expected = hypergradient(problem)
    # Sums in another order, amplified by batch norm of small statistics.
    assert_gradients_agree(hypergradient(under_vmap(problem), EXACT[estimator]), expected, rtol=1e-9)


@pytest.mark.parametrize("estimator", EXACT)
def test_vmap_equals_the_loop_on_a_transformer_with_layer_norm(estimator: str) -> None:
    problem = tokens()
    assert_gradients_agree(
        hypergradient(under_vmap(problem), EXACT[estimator]), hypergradient(problem), rtol=1e-9
    )


@pytest.mark.parametrize("name", ["images", "tokens"])
def test_vmap_and_loop_adapt_alike(name: str) -> None:
    problem = images() if name == "images" else tokens()
    paths = [
        list(adapt(one.unroll, one.meta, one.batch, num_steps=3)) for one in (problem, under_vmap(problem))
    ]
    for by_loop, by_vmap in zip(*paths, strict=True):
        for key, value in by_loop.fast.items():
            assert relative_error(by_vmap.fast[key], value) < 1e-11, key


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("estimator", EXACT)
def test_sixteen_tasks_together_give_the_sum_of_each_alone(tasks: str, estimator: str) -> None:
    problem = images(num_tasks=16)
    if tasks == "vmap":
        problem = under_vmap(problem)
    parts = [
        hypergradient(dataclasses.replace(problem, batch=batch), EXACT[estimator])
        for batch in problem.batch.split(1)
    ]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in problem.meta}
    assert_gradients_agree(hypergradient(problem, EXACT[estimator]), total, rtol=1e-9)


def test_logits_under_vmap_are_those_of_the_loop() -> None:
    problem = tokens()
    learner = problem.unroll.learner
    fast = learner.init(problem.meta, 3)
    inputs = problem.batch.query["inputs"]
    vectorized = under_vmap(problem).unroll.learner.adapter
    torch.testing.assert_close(
        logits_of(vectorized, {}, fast, inputs),
        logits_of(learner.adapter, {}, fast, inputs),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize(("blocks", "head_chunk"), [(True, None), (False, 4), (True, 4)])
def test_recomputation_under_vmap_is_refused(blocks: bool, head_chunk: int | None) -> None:
    problem = recomputing(under_vmap(images()), blocks=blocks, head_chunk=head_chunk)
    with pytest.raises(CapabilityError, match="inside vmap nothing can be recomputed: set adaptation"):
        hypergradient(problem)


class Noisy(nn.Module):
    """A model that draws for itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs)
        return logits + 0.1 * torch.randn_like(logits)


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_a_model_that_draws_is_refused_by_either_way(tasks: str) -> None:
    problem = images()
    adapter = FullAdapter(Noisy(problem.model), tasks="vmap" if tasks == "vmap" else "loop")
    noisy = with_learner(problem, dataclasses.replace(problem.unroll.learner, adapter=adapter))
    meta = adapter.meta_parameters(init=True, backbone=False) | noisy.unroll.rates.meta_parameters(
        adapter.init({}, 1)
    )
    with pytest.raises(CapabilityError, match=r"the model calls torch\.randn_like, whose draws"):
        hypergradient(dataclasses.replace(noisy, meta=meta))


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_a_weight_that_is_one_number_is_adapted_too(estimator: str, tasks: str) -> None:
    problem = images()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
            self.model = problem.model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.scale * self.model(inputs)
            return logits

    def of(kind: str) -> Problem:
        adapter = FullAdapter(Scaled(), tasks="vmap" if kind == "vmap" else "loop")
        learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
        meta = adapter.meta_parameters(init=True, backbone=False)
        meta |= problem.unroll.rates.meta_parameters(adapter.init({}, 1))
        return dataclasses.replace(with_learner(problem, learner), meta=meta)

    assert_gradients_agree(hypergradient(of(tasks), EXACT[estimator]), hypergradient(of("loop")), rtol=1e-9)
