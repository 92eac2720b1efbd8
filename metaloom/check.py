"""Whether a recipe's hypergradient is right on its own model and data, before anything is trained."""

from __future__ import annotations

import sys

from metaloom.build import (
    Choices,
    build_maml,
    build_model,
    outer_settings,
    task_batch,
)
from metaloom.engine.capabilities import ESTIMATORS, kind_of
from metaloom.engine.checking.comparison import check_hypergradient, grouped
from metaloom.engine.checking.coupling import COUPLING_TOLERANCE
from metaloom.engine.checking.differences import DIFFERENCE_TOLERANCE
from metaloom.engine.checking.report import ORACLE_TOLERANCE, CheckReport
from metaloom.engine.checking.vectors import away_from_symmetry
from metaloom.engine.choice import EXACT_AND_FLAT, EstimatorChoice
from metaloom.engine.outer import update_rule
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError
from metaloom.job import Place
from metaloom.recipe import AutoHypergradient, Precision, Recipe
from metaloom.recipe.schema import maml_of
from metaloom.sources import episode_source, open_data
from metaloom.tracking.console import Console, make_console

NUM_TASKS = 2


def check(recipe: Recipe, place: Place) -> None:
    """Compares the recipe's hypergradient with the oracle and with differences, and prints a table.

    In float64, at the recipe's random initial weights moved away from symmetry, on the first two training
    episodes; nothing is trained. One rank only.

    Raises:
        CapabilityError: terms are lost, the estimator cannot be computed, or tasks are coupled.
        StreamError: the data cannot be used.
    """
    console = make_console(error_stream=sys.stdout)
    section = maml_of(recipe)
    num_steps = recipe.adaptation.num_steps
    in_float64 = recipe.model_copy(update={"precision": Precision(compute="float64")})
    data = open_data(recipe)
    source = episode_source(recipe, data, "train", seed=recipe.seed, num_steps=num_steps)
    episodes = [source.episode(number) for number in range(NUM_TASKS)]
    data.close()
    batch = task_batch(in_float64, episodes, place.device, num_steps=num_steps)
    model = build_model(in_float64, place.device, Replicated())
    _say_what(console, recipe)
    ways = _ways(recipe)
    reports: dict[str, CheckReport] = {}
    impossible: list[str] = []
    for name, choices in ways.items():
        algorithm = build_maml(in_float64, section, model, choices, place.device, points=place.points)
        meta = away_from_symmetry(algorithm.meta_parameters(), seed=recipe.seed)
        update_rule(meta, outer_settings(recipe))
        kind = algorithm.hypergradient.name
        kinds = {kind_of(parameter) for parameter in meta}
        with console.phase(f"check {name}", total=len(grouped(meta)), unit="group") as phase:
            try:
                report = check_hypergradient(
                    algorithm.unroll,
                    algorithm.hypergradient,
                    meta,
                    batch,
                    estimator=kind,
                    is_exact=all(ESTIMATORS[kind].of[each].degree == "exact" for each in kinds),
                    seed=recipe.seed,
                    progress=lambda done, total: phase.advance(done - phase.num_done),
                )
            except CapabilityError as error:
                impossible.append(f"{name} is not possible here: {error}")
                continue
        _show(console, name, report)
        reports[name] = report
    findings = [text for report in reports.values() for text in report.findings()]
    if not reports:
        findings = impossible
    if findings:
        lines = "".join(f"\n  {text}" for text in dict.fromkeys(findings))
        raise CapabilityError(f"this recipe is refused:{lines}")
    for text in impossible:
        console.note(f"{text} (a run that chooses among several passes it over)")
    for name, report in reports.items():
        console.note(_verdict(name, report))


def _ways(recipe: Recipe) -> dict[str, Choices]:
    """All that a run of the recipe may compute its hypergradient by, by name."""
    estimator, tasks = maml_of(recipe).hypergradient, recipe.task_ways
    kinds = EXACT_AND_FLAT if isinstance(estimator, AutoHypergradient) else (estimator.kind,)
    chosen = {
        kind: EstimatorChoice(kind, 0) if isinstance(estimator, AutoHypergradient) else None for kind in kinds
    }
    return {
        kind if len(tasks) == 1 else f"{kind}, {way}": Choices(way, choice)
        for kind, choice in chosen.items()
        for way in tasks
    }


def _say_what(console: Console, recipe: Recipe) -> None:
    pretrained = "" if recipe.pretrain is None else " (pre-training is not run)"
    num_steps = recipe.adaptation.num_steps
    console.note(
        f"checking in float64 (the recipe computes in {recipe.precision.compute}), on {NUM_TASKS} training "
        f"tasks, with {num_steps} inner step{'' if num_steps == 1 else 's'}"
    )
    console.note(
        f"at random initial weights{pretrained}, with noise, so that no gradient is zero because matrices "
        "are zero or rates equal"
    )


def _show(console: Console, name: str, report: CheckReport) -> None:
    is_compared = report.oracle_failure is None
    source = "unrolled" if is_compared else report.estimator
    columns = [
        "meta-parameters",
        "numbers",
        "gradient norm",
        *(["error to unrolled"] if is_compared else []),
        *(["cosine to unrolled"] if is_compared and not report.is_exact else []),
        f"{source} to differences",
        "verdict",
    ]
    rows = [
        [
            group.name,
            str(group.num_numbers),
            f"{group.norm:.3g}",
            *([] if group.oracle_error is None else [f"{group.oracle_error:.1e}"]),
            *(
                [("-" if group.cosine is None else f"{group.cosine:.4f}")]
                if "cosine to unrolled" in columns
                else []
            ),
            f"{group.difference_error:.1e}",
            group.verdict,
        ]
        for group in report.groups
    ]
    console.table(f"hypergradient by {name}", columns, rows)
    if report.oracle_failure is not None:
        console.note(f"unrolled cannot be computed on this model: {report.oracle_failure}")
    if not report.couplings:
        console.note(
            f"coupling: changing one of {report.num_tasks} tasks leaves the others as they were "
            f"(to {COUPLING_TOLERANCE:g})"
        )


def _verdict(name: str, report: CheckReport) -> str:
    differences = f"{DIFFERENCE_TOLERANCE:g} of differences of the meta-loss"
    if report.is_exact:
        oracle = "" if report.oracle_failure is not None else f"within {ORACLE_TOLERANCE:g} of unrolled, and "
        return f"passed: {name} is exact on this recipe ({oracle}within {differences})"
    if report.oracle_failure is None:
        return (
            f"passed: {name} is approximate by design, with the errors above; the exact "
            f"hypergradient of this recipe is within {differences}"
        )
    return (
        f"passed: {name} is approximate by design; no exact hypergradient can be computed on "
        "this model, so that the errors above are those to differences of the meta-loss"
    )
