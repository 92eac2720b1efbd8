"""What an estimator tells of before it ends is what it returns, and is told while it still computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaloom.engine.capabilities import Kind, kind_of
from metaloom.engine.hypergradients.sweep import Adjoint, End
from metaloom.engine.unroll import leaves
from tests.numerics.problems import Problem
from tests.numerics.ways import WAYS

# Kinds of meta-parameters whose gradients are told of early. Those of learned rates need the inner gradients.
# Without second derivatives the last pass is not one over the model, and nothing is final before the end.
TOLD: dict[str, set[Kind]] = {
    "unrolled": {"init", "backbone", "rates", "loss"},
    "unrolled, every weight fast": {"init", "rates"},
    "rematerialized": {"init", "backbone", "loss"},
    "rematerialized, proximal": {"init", "backbone"},
    "rematerialized, scaled": {"init", "backbone"},
    "rematerialized, every weight fast": {"init"},
    "rematerialized, recomputed": {"init", "backbone"},
    "mixed_mode, recomputed": {"init", "backbone"},
    "some graphs": {"init", "backbone"},
    "all graphs": {"init", "backbone", "rates", "loss"},
    "rematerialized, symmetries": {"init", "backbone"},
    "mixed_mode": {"init", "backbone", "loss"},
    "mixed_mode, clipped": {"init", "backbone"},
    "mixed_mode, every weight fast": {"init"},
    "rematerialized, head fast": {"init", "backbone"},
    "mixed_mode, norms and head fast": {"init", "backbone"},
    "mixed_mode, soft prompt": {"init", "backbone"},
    "truncated": {"init", "backbone"},
    "truncated, with earlier losses": set(),
    "first_order": set(),
    "implicit": {"init", "backbone", "loss"},
    "implicit, neumann": {"init", "backbone"},
    "finite_difference": {"init", "backbone", "loss"},
    "reptile": set(),
}


def told_by(way: str, problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was told, as it was then, and what was returned."""
    told: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        assert name not in told, f"{name} was told of twice"
        assert not gradient.requires_grad
        told[name] = gradient.clone()

    estimator = WAYS[way][0]
    result = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch, on_final=take)
    return told, result.gradient


@pytest.mark.parametrize("way", WAYS)
def test_what_is_told_early_is_what_is_returned_bit_for_bit(way: str) -> None:
    estimator, make = WAYS[way]
    problem = make(2)
    told, returned = told_by(way, problem)
    silent = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
    for name, value in silent.gradient.items():
        assert torch.equal(returned[name], value), name
        if name in told:
            assert torch.equal(told[name], value), name
    assert {kind_of(name) for name in told} == TOLD[way]
    # Of a kind that is told early, everything is: one that lags behind would hold up what is sent after it.
    assert told.keys() == {name for name in problem.meta if kind_of(name) in TOLD[way]}


@pytest.mark.parametrize("way", [way for way, kinds in TOLD.items() if kinds])
def test_it_is_told_before_the_last_pass_over_the_model_ends(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plain = torch.autograd.grad

    def recording(*args: Any, **options: Any) -> Any:
        events.append("begin")
        result = plain(*args, **options)
        events.append("end")
        return result

    estimator, make = WAYS[way]
    problem = make(2)
    monkeypatch.setattr(torch.autograd, "grad", recording)
    estimator.meta_gradient(
        problem.unroll, problem.meta, problem.batch, on_final=lambda name, gradient: events.append(name)
    )
    told = [place for place, event in enumerate(events) if event not in ("begin", "end")]
    assert told
    assert "end" in events[told[-1] :]
    # In passes that are not over: more have begun than ended.
    for place in told if "implicit" not in way and "difference" not in way else told[-1:]:
        assert events[:place].count("begin") > events[:place].count("end")


def test_what_starts_both_weights_and_state_waits_for_the_adjoints_of_both() -> None:
    # With a proximal term s_0 holds phi_0; its adjoint may come after that of phi_0, or before.
    problem = WAYS["rematerialized, proximal"][1](2)
    theta = leaves(problem.meta)
    fast, state = problem.unroll.start(theta, 2)
    adjoint = Adjoint(
        {name: torch.full_like(value, 2.0) for name, value in fast.items()},
        {name: torch.full_like(value, 3.0) for name, value in state.items()},
    )
    name = next(iter(fast))
    for keys in ([f"fast/{name}", f"state/anchor/{name}"], [f"state/anchor/{name}", f"fast/{name}"]):
        told: dict[str, Tensor] = {}
        end = End(problem.unroll, theta, 2, {}, told.__setitem__)
        for key in keys:
            assert not told
            end.take(key, adjoint.state[key[6:]] if key.startswith("state/") else adjoint.fast[name])
        assert told.keys() == {f"init.{name}"}
        assert bool((told[f"init.{name}"] == 10.0).all())  # 2 + 3 for each of two tasks
        gradient = end.gradient(adjoint)
        assert all(bool((gradient[f"init.{each}"] == 10.0).all()) for each in fast)
