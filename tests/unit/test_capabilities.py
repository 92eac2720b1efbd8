"""The table of what each estimator gives: complete, obeyed by the engine, shown in the documentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaloom.build import Choices, build_hypergradient
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.capabilities import (
    ESTIMATORS,
    KIND_NAMES,
    KINDS,
    Kind,
    givers,
    kind_of,
    refusals,
    require,
    step_weights_refusal,
)
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import Hypergradient, MetaGradient, OnGradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Neumann
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import TaskBatch
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import ComputeFormat, LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from metaloom.recipe import load_recipe
from tests.numerics.problems import Problem, gpt_problem, last, relative_error
from tests.unit.test_engine_step import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "hypergradients.md"


def problem_of(kind: Kind) -> Problem:
    """A problem where one kind of meta-parameter is learned."""
    return gpt_problem(
        step_weights=last(3),
        grain="per_tensor" if kind == "rates" else "none",
        init=kind == "init",
        backbone=kind == "backbone",
        rule=Sgd(GradientTerms(proximal=0.3)),
    )


def gradient_of(estimator: str, problem: Problem) -> dict[str, Tensor]:
    estimated = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    return estimated.gradient


def test_the_table_has_every_estimator_and_every_kind() -> None:
    assert HYPERGRADIENTS.keys() <= ESTIMATORS.keys()
    for name, row in ESTIMATORS.items():
        assert set(row.of) == set(KINDS), name
        for capability in row.of.values():
            assert bool(capability.because) == (capability.degree != "exact"), name
    assert {name: estimator.name for name, estimator in HYPERGRADIENTS.items()} == {
        name: name for name in HYPERGRADIENTS
    }


@pytest.mark.parametrize("kind", ["backbone", "rates", "init"])
@pytest.mark.parametrize("estimator", HYPERGRADIENTS)
def test_an_estimator_gives_a_kind_as_exactly_as_the_table_says(estimator: str, kind: Kind) -> None:
    capability, problem = ESTIMATORS[estimator].of[kind], problem_of(kind)
    if capability.degree == "refused":
        with pytest.raises(CapabilityError, match=f"{estimator} gives no gradient of {KIND_NAMES[kind]}: "):
            gradient_of(estimator, problem)
        return
    exact, actual = gradient_of("unrolled", problem), gradient_of(estimator, problem)
    errors = {name: relative_error(actual[name], value) for name, value in exact.items()}
    assert all(bool(value.isfinite().all()) and bool((value != 0).any()) for value in actual.values())
    if capability.degree == "exact":
        assert max(errors.values()) < 1e-9, errors
    else:
        assert max(errors.values()) > 1e-3, errors


@pytest.mark.parametrize("estimator", ["first_order", "reptile"])
def test_loss_parameters_are_refused_before_anything_is_computed(estimator: str) -> None:
    problem = problem_of("init")
    meta = problem.meta | {"loss.temperature": torch.ones(())}
    with pytest.raises(CapabilityError, match=f"^{estimator} gives no gradient of loss parameters: .*; unr"):
        HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, meta, problem.batch)


@pytest.mark.parametrize("estimator", HYPERGRADIENTS)
def test_terms_at_earlier_steps_are_refused_where_the_table_says(estimator: str) -> None:
    problem = problem_of("init")
    unroll = dataclasses.replace(problem.unroll, step_weights=(0.0, 0.5, 0.0, 0.5))
    if ESTIMATORS[estimator].end_only:
        with pytest.raises(CapabilityError, match="the last inner step only; set step_weights to last"):
            HYPERGRADIENTS[estimator]().meta_gradient(unroll, problem.meta, problem.batch)
        assert step_weights_refusal(estimator) is not None
    else:
        HYPERGRADIENTS[estimator]().meta_gradient(unroll, problem.meta, problem.batch)
        assert step_weights_refusal(estimator) is None


def test_all_that_is_refused_is_told_at_once_with_reasons_and_ways_out() -> None:
    with pytest.raises(CapabilityError) as caught:
        require(
            "implicit", ["init.a", "rates.a", "rates.b", "backbone.c"], has_proximal=False, end_only=False
        )
    initialisation, rates, steps = str(caught.value).split(". ")
    assert initialisation == (
        "implicit gives the gradient of the initialisation through the proximal term alone, and the inner "
        "rule has none; give it one (proximal above 0), or take one of unrolled, rematerialized, mixed_mode, "
        "auto, first_order, truncated, finite_difference, reptile"
    )
    assert rates == (
        "implicit gives no gradient of learned inner rates: a minimum does not depend on the rates that led "
        "to it; unrolled, rematerialized, mixed_mode, auto, first_order, truncated do"
    )
    assert steps.startswith("implicit looks at the fully adapted weights alone")


def test_what_is_given_is_not_refused() -> None:
    require("implicit", ["init.a", "backbone.c", "loss.d"], has_proximal=True, end_only=True)
    require("unrolled", ["init.a", "rates.a", "backbone.c", "loss.d"], has_proximal=False, end_only=False)
    assert refusals("reptile", ["init"], has_proximal=False) == []
    assert givers("loss") == [name for name in ESTIMATORS if name not in ("first_order", "reptile")]


def test_a_name_of_no_kind_is_refused() -> None:
    assert kind_of("init.head.rates.weight") == "init"
    for name in ("initial.a", "init", "a.rates."):
        with pytest.raises(CapabilityError, match=r"is of no kind; a name begins with one of 'init\.'"):
            kind_of(name)


class Unlisted(Hypergradient):
    """An estimator that nobody wrote into the table."""

    name = "unlisted"

    def estimate(
        self,
        unroll: Unroll,
        meta: Mapping[str, Tensor],
        batch: TaskBatch,
        on_final: OnGradient | None,
    ) -> MetaGradient:
        raise AssertionError("not reached")


def test_an_estimator_without_a_row_is_refused() -> None:
    problem = problem_of("init")
    with pytest.raises(CapabilityError, match=r"'unlisted' has no row in metaloom\.engine\.capab"):
        Unlisted().meta_gradient(problem.unroll, problem.meta, problem.batch)


@pytest.mark.parametrize("estimator", HYPERGRADIENTS)
def test_a_batch_of_tasks_gives_the_sum_of_the_tasks_alone(estimator: str) -> None:
    problem = problem_of("init")
    chosen = HYPERGRADIENTS[estimator]()
    together = chosen.meta_gradient(problem.unroll, problem.meta, problem.batch)
    alone = [chosen.meta_gradient(problem.unroll, problem.meta, one) for one in problem.batch.split(1)]
    for name, value in together.gradient.items():
        # Matrix products of other sizes add in another order; solvers carry that on.
        assert relative_error(value, torch.stack([p.gradient[name] for p in alone]).sum(0)) < 1e-9, name
    assert together.metrics.keys() == {"meta_loss", *chosen.metric_names(problem.unroll.learner)} - {
        "meta_loss"
    }
    for values in (together.losses, *together.metrics.values()):
        assert values.shape == (2,)
        assert values.dtype == torch.float64
        assert not values.requires_grad


@pytest.mark.parametrize(
    ("estimator", "compute"),
    [
        ("implicit", "float32"),
        ("implicit", "bfloat16"),
        ("finite_difference", "float32"),
        ("reptile", "float32"),
        ("reptile", "bfloat16"),
    ],
)
def test_gradients_are_in_the_storage_dtype_and_near_those_of_float64(
    estimator: str, compute: ComputeFormat
) -> None:
    def problem_in(compute: ComputeFormat) -> Problem:
        backbone, rule = estimator != "reptile", Sgd(GradientTerms(proximal=2.0))
        return gpt_problem(step_weights=last(3), backbone=backbone, rule=rule, compute=compute)

    rounded, exactly = problem_in(compute), problem_in("float64")
    meta = {name: value.double() for name, value in rounded.meta.items()}
    chosen = HYPERGRADIENTS[estimator]()
    result = chosen.meta_gradient(rounded.unroll, rounded.meta, rounded.batch)
    exact = chosen.meta_gradient(exactly.unroll, meta, exactly.batch)
    assert {value.dtype for value in result.gradient.values()} == {torch.float32}
    assert {value.dtype for value in (result.losses, *result.metrics.values())} == {torch.float64}
    one, other = (
        torch.cat([value.double().flatten() for value in estimated.gradient.values()])
        for estimated in (result, exact)
    )
    # float32 rounds at 6e-8, and at 1e-5 in a difference over 0.02; a product in bfloat16 at 0.4 %, which
    # conjugate gradients multiply by the condition of what they solve.
    bound = {"float32": 1e-4, "bfloat16": 0.15 if estimator == "implicit" else 0.05}
    assert relative_error(one, other) < bound[compute]


@pytest.mark.parametrize("estimator", HYPERGRADIENTS)
def test_an_outer_step_logs_the_estimators_own_metrics(estimator: str) -> None:
    problem = problem_of("init")
    chosen = HYPERGRADIENTS[estimator]()
    combiner = Mean(problem.meta, Replicated(), metric_names=chosen.metric_names(problem.unroll.learner))
    outer = OuterOptimizer(problem.meta, SETTINGS, Replicated())
    tasks, scaler = StepTasks(problem.batch, 2, 1), LossScaler(Precision("float64"))
    metrics = outer_step(tasks, Maml(problem.unroll, chosen), combiner, outer, scaler)
    assert metrics.keys() >= {"meta_loss", *chosen.metric_names(problem.unroll.learner)}
    whole = chosen.meta_gradient(problem.unroll, problem.meta, problem.batch)
    for name in chosen.metric_names(problem.unroll.learner):
        assert metrics[name] == pytest.approx(float(whole.metrics[name].mean()), rel=1e-6, abs=1e-15)


def test_the_documentation_shows_the_table_as_it_is() -> None:
    rows = ["| estimator | " + " | ".join(KIND_NAMES.values()) + " | query losses at earlier steps |"]
    rows.append("|---|" + "---|" * (len(KINDS) + 1))
    for name, row in ESTIMATORS.items():
        cells = [f"`{name}`"]
        for capability in row.of.values():
            cells.append(capability.degree + (f": {capability.because}" if capability.because else ""))
        cells.append("refused" if row.end_only else "yes")
        rows.append("| " + " | ".join(cells) + " |")
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8"), "put this there:\n" + "\n".join(rows)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("unrolled", Unrolled()),
        ("reptile", Reptile()),
        ("{kind: finite_difference, epsilon: 0.25}", FiniteDifference(0.25)),
        (
            "{kind: implicit, damping: 0.5, solver: {num_iterations: 7, tolerance: 0.1}}",
            Implicit(ConjugateGradient(7, 0.1), 0.5),
        ),
        (
            "{kind: implicit, solver: {kind: neumann, num_terms: 3, step_size: 0.2}}",
            Implicit(Neumann(3, 0.2), 0.0),
        ),
        ("implicit", Implicit()),
        ("finite_difference", FiniteDifference()),
    ],
)
def test_a_recipe_gives_an_estimator_its_options(section: str, expected: Hypergradient) -> None:
    smoke = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    overrides = [f"algorithm.hypergradient={section}", "adaptation.rule={kind: sgd, lr: 1, proximal: 0.5}"]
    overrides.append("adaptation.num_steps=3")
    if "epsilon" in section:  # has no effect on the initialisation
        overrides.append("adaptation.loss.learned=[temperature]")
    recipe = load_recipe(smoke, overrides)
    built = build_hypergradient(recipe, Choices(), torch.device("cpu"))
    assert type(built) is type(expected)
    assert vars(built) == vars(expected)


class Lockstep(Replicated):
    """Ranks that iterate together."""

    is_lockstep = True


def test_in_lockstep_a_solver_asks_the_other_ranks_whether_to_go_on() -> None:
    smoke = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    overrides = ["algorithm.hypergradient=implicit", "adaptation.rule={kind: sgd, lr: 1, proximal: 0.5}"]
    recipe = load_recipe(smoke, overrides)
    for sharding in (Replicated(), Lockstep()):
        built = build_hypergradient(recipe, Choices(), torch.device("cpu"), sharding=sharding)
        assert isinstance(built, Implicit)
        assert isinstance(built.solver, ConjugateGradient)
        assert built.solver.any_rank == (sharding.any_rank if sharding.is_lockstep else bool)
