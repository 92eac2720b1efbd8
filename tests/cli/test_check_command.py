"""`metaloom check`: the hypergradient of a recipe on its own model and data."""

from pathlib import Path

import pytest

from metaloom.cli import main
from tests.commands import ADDED, RECIPES, run, run_well

SMALL = ("model.width=4", "data.n_query=1")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of a test put what they need for a while."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setitem(ADDED, "TMPDIR", str(folder))
    return folder


def test_a_sound_recipe_passes_with_a_table_and_leaves_nothing_behind(
    tmp_path: Path, glyphs: Path, temporary: Path
) -> None:
    output = run_well("check", RECIPES / "smoke.yaml", f"data.url={glyphs}", cwd=tmp_path)
    table = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith("init.")}
    assert table.keys() == {
        *(f"init.blocks.*.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")),
        "init.head.weight",
        "init.head.bias",
    }
    assert table["init.head.weight"][1] == "24"
    for row in table.values():
        assert row[-1] == "exact"
        assert float(row[3]) <= 1e-7
        assert float(row[4]) <= 1e-5
    assert "with 1 inner step\n" in output
    assert "error to unrolled" in output
    assert "coupling: changing one of 2 tasks leaves the others as they were" in output
    assert "passed: rematerialized is exact on this recipe" in output
    assert list(tmp_path.iterdir()) == [temporary]
    assert list(temporary.glob("metaloom-check-*")) == []


def test_lora_and_rates_pass_with_fewer_inner_steps_under_mixed_mode(tmp_path: Path, stdlib: Path) -> None:
    output = run_well(
        "check",
        RECIPES / "stdlib-lora.yaml",
        f"data.url={stdlib}",
        "model.num_layers=1",
        "model.width=8",
        "data.sequence_length=16",
        "adaptation.fast.rank=2",
        "algorithm.hypergradient=mixed_mode",
        cwd=tmp_path,
    )
    assert "with 3 of 4 inner steps (--full takes all)" in output
    assert "with 3 inner steps" in output
    assert "(pre-training is not run)" in output
    assert "rates.blocks.*.mlp.fc_in.lora_b" in output
    assert "passed: mixed_mode is exact on this recipe" in output


def test_an_approximate_estimator_is_reported_over_all_inner_steps(tmp_path: Path, glyphs: Path) -> None:
    words = ["adaptation.num_steps=4", "algorithm.hypergradient=first_order", *SMALL]
    recipe = RECIPES / "smoke.yaml"
    output = run_well("check", recipe, f"data.url={glyphs}", *words, "--full", cwd=tmp_path)
    assert "with 4 inner steps" in output
    assert "cosine to unrolled" in output
    assert "passed: first_order is approximate by design" in output


def test_a_hypergradient_that_is_not_finite_is_refused_with_the_table(
    tmp_path: Path, glyphs: Path, temporary: Path
) -> None:
    words = ["adaptation.rule.lr=1e300", "adaptation.num_steps=2", *SMALL]
    finished = run("check", RECIPES / "smoke.yaml", f"data.url={glyphs}", *words, cwd=tmp_path)
    assert finished.code == 2
    assert "wrong" in finished.output
    assert "error: this recipe is refused:" in finished.errors
    assert "is not finite" in finished.errors
    assert "passed" not in finished.output
    assert list(temporary.glob("metaloom-check-*")) == []


def test_mistakes_of_values_and_data_are_told_before_anything_starts(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "smoke.yaml")
    assert main(["check", recipe, "outer.num_stepz=3"]) == 2
    assert "did you mean 'num_steps'" in capsys.readouterr().err
    assert main(["check", recipe, f"data.url={tmp_path / 'nothing'}"]) == 3
    assert main(["check", recipe, f"data.url={glyphs}", "data.n_way=13"]) == 3
