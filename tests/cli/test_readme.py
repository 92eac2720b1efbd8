"""What the README says to type works."""

import re
import shlex
from pathlib import Path

import pytest

from metaloom.cli import main
from metaloom.recipe import load_recipe
from tests.commands import REPOSITORY, run_well

PAGES = [
    "README.md",
    "docs/algorithms.md",
    "docs/extending.md",
    "docs/operations.md",
    "docs/data.md",
    "docs/scaling.md",
    "CONTRIBUTING.md",
]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The indented lines that call metaloom, without what stands behind them as explanation."""
    lines = re.findall(r"^    (?:\.venv/bin/)?metaloom (.+)$", text, flags=re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}|\s+#", line)[0]) for line in lines]


def test_the_first_recipe_is_the_smoke_recipe_in_short(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    ours = load_recipe(tmp_path / "recipe.yaml")
    smoke = load_recipe(REPOSITORY / "recipes" / "smoke.yaml")
    assert (ours.model, ours.data, ours.adaptation) == (smoke.model, smoke.data, smoke.adaptation)
    assert ours.outer.num_steps == smoke.outer.num_steps


def test_the_commands_of_the_first_recipe_run(tmp_path: Path, glyphs: Path) -> None:
    section = README.split("## A first recipe")[1].split("\n## ")[0]
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "glyphs").symlink_to(glyphs)
    called = commands(section)
    assert [words[0] for words in called] == ["data", "train", "train", "evaluate"]
    for words in called[1:]:  # the data set is there, if a smaller one
        run_well(*words, cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_is_one_that_there_is(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    called = commands((REPOSITORY / page).read_text(encoding="utf-8"))
    for words in called:
        with pytest.raises(SystemExit) as ended:
            main([word for word in words if "=" not in word] + ["--help"])
        assert ended.value.code == 0, words
    capsys.readouterr()


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in PAGES:
        path = REPOSITORY / page
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{page} links to {target}"
