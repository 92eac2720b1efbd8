"""The list of reproductions: every recipe in it is valid; what is stored, and how it is shown."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.reproduce.drawing import draw
from benchmarks.reproduce.experiments import (
    Drawing,
    Experiment,
    Panel,
    Shown,
    Training,
    read_experiments,
)
from benchmarks.reproduce.running import ROOT, Result, read_results, store
from benchmarks.reproduce.table import BEGIN, END, as_markdown, figure, write_into
from metaloom.recipe import load_recipe

EXPERIMENTS = read_experiments()
TRAININGS = [(experiment, training) for experiment in EXPERIMENTS for training in experiment.trainings]


@pytest.mark.parametrize(
    ("experiment", "training"), TRAININGS, ids=[f"{e.name}-{t.name}" for e, t in TRAININGS]
)
def test_every_training_is_a_valid_recipe(experiment: Experiment, training: Training) -> None:
    if training.program is not None:
        assert importlib.util.find_spec(training.program) is not None
        return
    recipe = load_recipe(ROOT / training.recipe, training.overrides)
    load_recipe(ROOT / training.recipe, (*training.overrides, *training.evaluated_with))
    # What `metaloom evaluate` takes.
    free = ("evaluation.", "data.n_shot=", "data.n_query=")
    assert all(override.startswith(free) for override in training.evaluated_with)
    if training.rows and any(row.contender.startswith("ordinary") for row in training.rows):
        assert "ordinary_equal_data" in recipe.baselines


def result(mean: float, seed: int = 0) -> Result:
    method = {
        "name": "meta-trained",
        "mean": [9.0, mean],
        "ci95": [1.0, 0.25],
        "rehearsal": [1.0, 1.5],
        "higher_is_better": False,
        "groups": [{"name": "a", "mean": 0.25, "ci95": 0.2}, {"name": "b", "mean": 0.5, "ci95": 0.1}],
    }
    return Result("MAML", seed, ("metaloom train x",), "abc", "2026-11-29", 3600.0, (method,))


TRAINING = Training("MAML", "recipes/smoke.yaml", (), (0,), (Shown("MAML", published="2.1"),))
EXPERIMENT = Experiment("one", "One", "A paper", "mean squared error", None, (TRAINING,))


@pytest.mark.parametrize(
    ("results", "shown", "words"),
    [
        ([], Shown("MAML"), "not run"),
        ([result(2.0)], Shown("MAML"), "2 ± 0.25 (seed 0)"),
        ([result(2.0)], Shown("MAML", step=0), "9 ± 1 (seed 0)"),
        ([result(2.0)], Shown("MAML", measure="forgetting"), "0.5 (seed 0)"),
        ([result(2.0)], Shown("MAML", measure="worst_group"), "0.5 ± 0.1 (seed 0)"),
        ([result(2.0)], Shown("MAML", group="a"), "0.25 ± 0.2 (seed 0)"),
        ([result(2.0)], Shown("MAML", group="c"), "not run"),
        ([result(2.0)], Shown("MAML", group="a", per=10.0), "0.025 ± 0.02 (seed 0)"),
        ([result(2.0)], Shown("MAML", contender="random init"), "not run"),
        # Student's t of two degrees of freedom: 4.30 * 1 / sqrt(3).
        ([result(1.0), result(2.0, 1), result(3.0, 2)], Shown("MAML"), "2 ± 2.48 (3 seeds)"),
    ],
)
def test_a_figure_has_its_interval_and_seeds(results: list[Result], shown: Shown, words: str) -> None:
    assert figure(results, shown, TRAINING, is_share=False) == words


def test_shares_are_shown_in_per_cent() -> None:
    assert figure([result(0.913)], Shown("MAML"), TRAINING, is_share=True) == "91.3 ± 25 % (seed 0)"


def test_results_are_stored_by_training_and_seed(tmp_path: Path) -> None:
    for each in (result(1.0, 1), result(2.0), result(3.0)):
        store(EXPERIMENT, each, tmp_path)
    assert read_results(EXPERIMENT, tmp_path) == [result(3.0), result(1.0, 1)]
    assert read_results(dataclasses.replace(EXPERIMENT, name="other"), tmp_path) == []


def test_the_table_stands_between_the_marks_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    section = as_markdown(EXPERIMENT, [result(2.0)])
    assert "| MAML | 2.1 | 2 ± 0.25 (seed 0) |" in section
    assert "Run 2026-11-29, 1.0 hours by the clock" in section
    write_into(page, [section])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")


def test_the_page_has_what_is_stored() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    between = re.search(f"{BEGIN}\n\n(.*)\n{END}", page, flags=re.DOTALL)
    assert between is not None
    assert between.group(1) == "\n".join(as_markdown(each, read_results(each)) for each in EXPERIMENTS)


def test_a_figure_is_drawn_of_what_was_run(tmp_path: Path) -> None:
    trainings = tuple(
        dataclasses.replace(TRAINING, name=f"{series} {x}", at=(series, float(x)))
        for series in ("LoRA", "all weights")
        for x in (0, 10)
    )
    drawing = Drawing(
        "share",
        (
            Panel("forgetting", "rise"),
            Panel("metric", "loss on the module"),
            Panel("forgetting", "rise", "gain", "fall"),
        ),
    )
    experiment = dataclasses.replace(EXPERIMENT, trainings=trainings, drawing=drawing)
    results = [dataclasses.replace(result(2.0), training=name) for name in ("LoRA 0", "LoRA 10")]
    draw(experiment, [], tmp_path)
    assert list(tmp_path.iterdir()) == []
    draw(experiment, results, tmp_path)
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn.count('id="axes_') == 3
    draw(experiment, results, tmp_path)
    assert (tmp_path / "one.svg").read_text(encoding="utf-8") == drawn
    assert "![One](images/one.svg)" in as_markdown(experiment, results)


def test_every_figure_of_the_page_is_there() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(images/(.+?)\)", page):
        assert (ROOT / "docs" / "images" / name).exists()
