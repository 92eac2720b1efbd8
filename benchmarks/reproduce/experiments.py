"""The experiments, as `experiments.yaml` lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

HERE = Path(__file__).parent
Measure = Literal["metric", "worst_group", "forgetting", "gain"]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row of the table: one of the contenders of a run.

    Attributes:
        method: in words.
        contender: its name in the run's evaluation.
        step: adaptation steps after which it is read; -1 for the last.
        measure: what is read: the evaluation's own metric, that of the worst group, by how much the loss on
            data of the pre-training kind rises, or by how much adaptation improves the metric.
        published: the paper's figure, in words; empty where it has none.
        group: the group of tasks that the metric is read of; None for all tasks.
        per: what the figure is divided by.
    """

    method: str
    contender: str = "meta-trained"
    step: int = -1
    measure: Measure = "metric"
    published: str = ""
    group: str | None = None
    per: float = 1.0


@dataclasses.dataclass(frozen=True)
class Panel:
    """A part of a figure.

    Attributes:
        measure: what is read of the trainings.
        label: of its axis, with the unit.
        against: another measure, in the place of the number that trainings differ in, which is then written
            beside each point.
        against_label: of the other axis.
    """

    measure: Measure
    label: str
    against: Measure | None = None
    against_label: str = ""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of an experiment: what trainings of some series come to over a number that they differ in.

    Attributes:
        x: label of that number's axis.
        panels: one beside the other.
    """

    x: str
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe that is trained and evaluated once for each seed, or a program that prints methods.

    Attributes:
        name: among those of its experiment.
        recipe: path of the recipe, from the root of the repository; empty for a program.
        overrides: of the recipe.
        seeds: of the recipe.
        rows: what is shown of it.
        program: a module of this repository that takes `--seed` and prints them as JSON; None for a recipe.
        evaluated_with: further overrides for its evaluation, where that is of other tasks.
        at: its series and its place in the experiment's figure; None where it is in none.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Shown, ...]
    program: str | None = None
    evaluated_with: tuple[str, ...] = ()
    at: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Trainings that belong into one table.

    Attributes:
        name: of its file of results.
        title: in words.
        paper: which, and where in it.
        metric: what the figures are.
        data: the built-in data set that has to be made first; None for none.
        trainings: its runs.
        drawing: its figure; None for none.
    """

    name: str
    title: str
    paper: str
    metric: str
    data: str | None
    trainings: tuple[Training, ...]
    drawing: Drawing | None = None


def read_experiments(path: Path = HERE / "experiments.yaml") -> list[Experiment]:
    """All experiments, in the order of the file."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_experiment(name, values) for name, values in listed.items()]


def _experiment(name: str, values: Mapping[str, Any]) -> Experiment:
    common = tuple(values.get("overrides", ()))
    seeds = tuple(values.get("seeds", (0,)))
    trainings = []
    for own_name, own in values["trainings"].items():
        rows = tuple(Shown(**({"method": own_name} | row)) for row in own.get("rows", [{}]))
        overrides = (*common, *own.get("overrides", ()))
        trainings.append(
            Training(
                own_name,
                own.get("recipe", ""),
                overrides,
                tuple(own.get("seeds", seeds)),
                rows,
                own.get("program"),
                tuple(own.get("evaluated_with", ())),
                None if "at" not in own else (own["at"]["series"], float(own["at"]["x"])),
            )
        )
    figure = values.get("figure")
    return Experiment(
        name,
        values["title"],
        values["paper"],
        values["metric"],
        values.get("data"),
        tuple(trainings),
        None if figure is None else Drawing(figure["x"], tuple(Panel(**panel) for panel in figure["panels"])),
    )
