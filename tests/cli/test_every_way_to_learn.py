"""What can be learned, and by which estimator, goes through a whole run: training, its record, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from metaloom.evaluate import evaluate
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train
from tests.commands import RECIPES, curve, run_well

SMOKE = RECIPES / "smoke.yaml"
SHORT = (
    "outer.num_steps=2",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=0",
    "launcher.num_processes=1",
    "adaptation.num_steps=2",
    "validation.every_steps=null",
    "evaluation.num_episodes=4",
    "evaluation.tuning.num_episodes=2",
    "evaluation.baselines=[random]",
    "tracking=none",
)


def assert_evaluated(folder: Path) -> None:
    """Two outer steps were done, and both contenders measured before and after each of two inner steps."""
    assert [record["skipped"] for record in curve(folder) if "skipped" in record] == [0.0, 0.0]
    methods = json.loads((folder / "evaluation.json").read_text())["methods"]
    assert [len(method["mean"]) for method in methods] == [3, 3]
    assert all(math.isfinite(value) for method in methods for value in method["mean"])


def test_learned_loss_parameters_and_rates_per_element_are_evaluated(tmp_path: Path, glyphs: Path) -> None:
    learned = (
        "adaptation.rule.learned=per_element",
        "adaptation.loss={label_smoothing: 0.1, learned: [temperature, label_smoothing]}",
        "algorithm.hypergradient={kind: truncated, num_steps: 1}",
    )
    run_well("train", SMOKE, f"data.url={glyphs}", *SHORT, *learned, cwd=tmp_path)
    output = run_well("evaluate", "runs/smoke", cwd=tmp_path)
    assert "meta-trained" in output
    assert "random init" in output
    assert_evaluated(tmp_path / "runs" / "smoke")


def test_a_head_of_zero_on_learned_features_is_trained_and_evaluated(tmp_path: Path, glyphs: Path) -> None:
    way = (
        "adaptation.fast=head",
        "adaptation.head.init=zero",
        "algorithm.meta_parameters={init: false, backbone: true}",
    )
    run_well("train", SMOKE, f"data.url={glyphs}", *SHORT, *way, cwd=tmp_path)
    run_well("evaluate", "runs/smoke", cwd=tmp_path)
    assert_evaluated(tmp_path / "runs" / "smoke")


def test_a_soft_prompt_is_planned_checked_trained_and_evaluated(tmp_path: Path, stdlib: Path) -> None:
    recipe = RECIPES / "stdlib-lora.yaml"
    small = (
        f"data.url={stdlib}",
        "adaptation.fast={kind: soft_prompt, num_tokens: 3}",
        "model={kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 19}",
        "data.sequence_length=16",
        "pretrain=null",
    )
    run_well("plan", recipe, *small, cwd=tmp_path)
    assert "passed: unrolled is exact" in run_well("check", recipe, *small, cwd=tmp_path)
    run_well("train", recipe, *small, *SHORT, cwd=tmp_path)
    run_well("evaluate", "runs/stdlib-lora", cwd=tmp_path)
    assert_evaluated(tmp_path / "runs" / "stdlib-lora")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process, as the worker joins one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way",
    [
        ("algorithm.hypergradient=implicit", "adaptation.rule.proximal=0.5"),
        ("algorithm.hypergradient=finite_difference", "adaptation.loss.learned=[temperature]"),
        ("algorithm.hypergradient=reptile",),
    ],
    ids=lambda way: way[0].partition("=")[2],
)
def test_what_an_estimator_of_the_end_has_trained_is_evaluated(
    way: tuple[str, ...], tmp_path: Path, glyphs: Path
) -> None:
    # As the worker does it, in this process: the commands around it are tested above.
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    place = Place(RunFolder(tmp_path / "run"), torch.device("cpu"), None, Shutdown())
    place.folder.create()
    train(recipe, place)
    evaluate(recipe, place)
    assert_evaluated(place.folder.path)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way",
    [
        ("adaptation.fast={kind: norm_bias, head: true}", "adaptation.head={init: zero, first_steps: 1}"),
        (
            "adaptation.fast={kind: part, parameters: [blocks.1.conv.weight, head.*], tasks: loop}",
            "algorithm.meta_parameters.backbone=true",
        ),
        ("adaptation.fast={kind: lora, targets: [head], rank: 2}", "algorithm.meta_parameters.backbone=true"),
        (
            "adaptation.rule.learned=per_element",
            "adaptation.rule.rates={scale: linear, spread: [0.005, 0.1]}",
        ),
    ],
    ids=["norm_bias", "part", "lora", "meta_sgd"],
)
def test_what_is_fast_and_how_fast_is_trained_and_evaluated(
    way: tuple[str, ...], tmp_path: Path, glyphs: Path
) -> None:
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    place = Place(RunFolder(tmp_path / "run"), torch.device("cpu"), None, Shutdown())
    place.folder.create()
    train(recipe, place)
    evaluate(recipe, place)
    assert_evaluated(place.folder.path)
