"""Recipes that say what they change of another one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metaloom.errors import RecipeError
from metaloom.recipe import Recipe, json_schema, load_recipe
from tests.commands import RECIPES

SMOKE = (RECIPES / "smoke.yaml").read_text(encoding="utf-8")


def written(folder: Path, **files: str) -> Path:
    """The folder with `smoke.yaml` and these files in it; the path of the last one."""
    (folder / "smoke.yaml").write_text(SMOKE, encoding="utf-8")
    path = folder
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_another_one_with_its_changes(tmp_path: Path) -> None:
    path = written(tmp_path, other="extends: smoke.yaml\nname: other\nadaptation:\n  num_steps: 3\n")
    expected = load_recipe(RECIPES / "smoke.yaml", ["name=other", "adaptation.num_steps=3"])
    assert load_recipe(path) == expected
    assert load_recipe(path, ["adaptation.num_steps=1", "name=smoke"]) == load_recipe(RECIPES / "smoke.yaml")


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ("algorithm: protonet", ["algorithm=protonet"]),
        ("algorithm: {kind: protonet}", ["algorithm=protonet"]),
        ("algorithm: maml", []),
        ("algorithm: {kind: maml, step_weights: uniform}", ["algorithm.step_weights=uniform"]),
        ("algorithm: {hypergradient: reptile}", ["algorithm.hypergradient=reptile"]),
        ("adaptation: {rule: {kind: adam, lr: 0.2}}", ["adaptation.rule={kind: adam, lr: 0.2}"]),
        ("adaptation: {fast: {tasks: vmap}}", ["adaptation.fast.tasks=vmap"]),
        ("outer: {optimizer: {lr: 0.5}}", ["outer.optimizer.lr=0.5"]),
        ("evaluation: {tuning: {rate_factors: [2.0]}}", ["evaluation.tuning.rate_factors=[2.0]"]),
        ("validation: {every_steps: null}", ["validation.every_steps=null"]),
    ],
)
def test_sections_change_key_by_key_and_other_kinds_as_a_whole(
    tmp_path: Path, changes: str, overrides: list[str]
) -> None:
    path = written(tmp_path, changed=f"extends: smoke.yaml\n{changes}\n")
    assert load_recipe(path) == load_recipe(RECIPES / "smoke.yaml", overrides)


def test_recipes_extend_each_other_over_several_files(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        one="extends: smoke.yaml\nname: one\nseed: 1\n",
        two="extends: one.yaml\nname: two\nouter: {num_steps: 9}\n",
    )
    assert load_recipe(path) == load_recipe(
        RECIPES / "smoke.yaml", ["name=two", "seed=1", "outer.num_steps=9"]
    )


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    return str(raised.value)


def test_a_mistake_is_told_with_the_file_that_it_is_in(tmp_path: Path) -> None:
    wrong = SMOKE.replace("lr: 0.1", "lr: -0.1", 1)
    path = written(tmp_path, base=wrong, other="extends: base.yaml\nname: other\nouter: {num_steps: -1}\n")
    message = refusal(path)
    line = 1 + wrong[: wrong.index("lr: -0.1")].count("\n")
    assert re.search(rf"line {line} of base.yaml +adaptation.rule.lr: -0.1", message)
    assert re.search(r"line 3 +outer.num_steps: -1", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: smok.yaml\n", "smok.yaml: no such file; did you mean {folder}/smoke.yaml? (extended by"),
        ("extends: 3\n", "extends: 3; must be the name of another recipe's file"),
        ("extends: broken.yaml\nname: x\n", "line 1 of broken.yaml  not YAML"),
        ("extends: empty.yaml\n", "extends: empty.yaml is empty, or no recipe"),
        ("extends: changed.yaml\n", "extends changed.yaml, which extends it: one of them has to stand alone"),
        ("extends: round.yaml\n", "extends changed.yaml, which extends it"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, broken="a: [", empty="", round="extends: changed.yaml\n", changed=text)
    assert message.format(folder=tmp_path) in refusal(path)


def test_editors_know_the_key() -> None:
    assert "another recipe's file" in json_schema()["properties"]["extends"]["description"]
    assert "extends" not in Recipe.model_fields
