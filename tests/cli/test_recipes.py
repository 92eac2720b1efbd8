"""Every ready recipe runs from its first step to its evaluation, made short, in this process."""

from pathlib import Path

import pytest

from metaloom.datasets import make_dataset
from metaloom.recipe import load_recipe
from metaloom.sources import open_data, require_episodes
from tests.commands import RECIPES
from tests.in_process import trained_and_evaluated

SHORT = {
    "faces-arm": [
        "outer.num_steps=2",
        "data.targets.num_classes=4",
        "data.num_support=4",
        "model.width=4",
        "outer.tasks_per_step=2",
    ],
    "glyphs-maml": ["outer.num_steps=2", "model.width=8", "outer.tasks_per_step=2"],
    "stdlib-lora": [
        "outer.num_steps=2",
        "pretrain.num_steps=2",
        "model.width=16",
        "outer.tasks_per_step=2",
    ],
    "memorised-sinusoid-maml": ["outer.num_steps=2", "outer.tasks_per_step=2", "evaluation.num_steps=1"],
    "memorised-sinusoid-mr-maml": ["outer.num_steps=2", "outer.tasks_per_step=2", "evaluation.num_steps=1"],
    "msr-conv": ["outer.num_steps=2", "outer.tasks_per_step=2", "data.task.size=6"],
    "msr-fc": ["outer.num_steps=2", "outer.tasks_per_step=2"],
    "sinusoid-maml": ["outer.num_steps=2", "outer.tasks_per_step=2", "evaluation.num_steps=1"],
    "smoke": [],
    "unequal-scales": ["outer.num_steps=2", "data.task.length=6", "data.task.num_targets=3"],
}
ALL = [
    "outer.schedule.warmup_steps=0",
    "validation.num_episodes=2",
    "evaluation.num_episodes=4",
    "evaluation.tuning={rate_factors: [1.0], num_episodes: 2}",
    "evaluation.ordinary.batch_size=8",
    "tracking=none",
]


# Needs an encoder and texts: test_backbones_page.py goes all its way.
ELSEWHERE = {"encoder-lora"}


def test_every_recipe_is_tried_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == SHORT.keys() | ELSEWHERE


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.usefixtures("alone")
def test_recipe_runs_end_to_end(
    name: str, tmp_path: Path, glyphs: Path, stdlib: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = stdlib if name.startswith("stdlib") else glyphs
    if name.startswith("faces"):
        data = tmp_path / "faces"
        make_dataset("glyph-faces", data, max_per_split=4)
    pretrain = ["pretrain.warmup_steps=0"] if name.startswith("stdlib") else []
    url = [] if name.startswith(("memorised", "msr", "sinusoid", "unequal")) else [f"data.url={data}"]
    overrides = [*url, *ALL, *SHORT[name], *pretrain]
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    opened = open_data(recipe)
    require_episodes(recipe, opened)
    opened.close()
    trained_and_evaluated(recipe, tmp_path / "run")
    output = capfd.readouterr().out
    assert "meta-trained" in output
    has_baselines = not name.startswith(("faces", "memorised", "unequal"))
    assert "random init" in output or not has_baselines
    assert "worst group" in output or not name.startswith(("faces", "unequal"))
