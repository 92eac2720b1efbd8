"""A small convolutional network whose weights are made of symmetries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.msr import Dense, Kronecker, MsrAdapter, Symmetry
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.rates import Grain
from tests.numerics.problems import PLAIN, Problem, conv4_problem, perturbed

SYMMETRIES: dict[str, Symmetry] = {"dense": Dense(rank=5, std=0.3), "kronecker": Kronecker()}


def msr_problem(
    symmetry: str,
    *,
    step_weights: tuple[float, ...],
    grain: Grain = "per_tensor",
    rule: InnerRule = PLAIN,
    num_tasks: int = 2,
    layers: Sequence[str] | Literal["all"] = "all",
    tasks: Literal["loop", "vmap"] = "loop",
) -> Problem:
    """The images of `conv4_problem`; v and what is no layer's weight is fast, U is learned."""
    problem = conv4_problem(step_weights=step_weights, grain=grain, rule=rule, num_tasks=num_tasks)
    adapter = MsrAdapter(
        problem.model,
        symmetry=SYMMETRIES[symmetry],
        layers=layers,
        generator=torch.Generator().manual_seed(2),
        structure=Structure(("blocks.0", "blocks.1", "blocks.2"), "head"),
        tasks=tasks,
    )
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    unroll = dataclasses.replace(problem.unroll, learner=learner)
    meta = adapter.meta_parameters(init=True, backbone=True)
    meta |= unroll.rates.meta_parameters(adapter.init({}, 1))
    return dataclasses.replace(problem, unroll=unroll, meta=perturbed(meta, scale=0.1))
