"""A run under DeepSpeed: what the user sees, and that other backends go on from it, and it from them."""

import json
from pathlib import Path

import pytest

from metaloom.recipe import load_recipe
from tests.commands import RECIPES, curve, run_well
from tests.in_process import trained

OVERRIDES = (
    "model.width=16",
    "model.num_heads=2",
    "pretrain={num_steps: 10, batch_size: 3, lr: 1e-3}",
    "algorithm.meta_parameters.backbone=true",
    "adaptation.rule.learned=shared",
    "outer.num_steps=4",
    "outer.schedule={decay: constant, warmup_steps: 1}",
    "outer.tasks_per_step=3",
    "validation.num_episodes=3",
    "validation.every_steps=2",
    "memory.recompute_blocks=true",  # shards ask for it
    "tracking=none",
)


def losses(run: Path) -> dict[str, float]:
    """The losses of a run's pre-training, meta-training and validation, by name and step."""
    names = ("pretrain/loss", "meta_loss", "validation_loss")
    return {
        f"{name} {record['step']:.0f}": record[name]
        for record in curve(run)
        for name in names
        if name in record
    }


def test_a_run_goes_on_from_deepspeed_in_shards_and_from_shards_under_deepspeed(
    tmp_path: Path, stdlib: Path, alone: None
) -> None:
    recipe, data = RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}"
    zero = "sharding={kind: deepspeed_zero, offload_optimizer: true}"
    moving, two = tmp_path / "moving", "launcher.num_processes=2"
    words = (recipe, "--run", moving, data, *OVERRIDES, two, zero, "outer.num_steps=2")
    output = run_well("train", *words, cwd=tmp_path)
    told = [line for line in output.splitlines() if "deepspeed" in line.lower()]
    assert len(told) == 1  # and nothing of DeepSpeed's own
    assert "ZeRO stage 2 over 2 ranks (" in told[0]
    given = json.loads((moving / "deepspeed.json").read_text())
    assert given["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    for number_of_steps, kind in ((3, "sharded"), (4, "deepspeed_zero")):
        changes = (f"sharding={kind}", f"outer.num_steps={number_of_steps}")
        run_well("train", "--resume", moving, *changes, cwd=tmp_path)
    one = load_recipe(recipe, [data, *OVERRIDES, "launcher.num_processes=1", "outer.num_steps=4"])
    ours, expected = losses(moving), losses(trained(one, tmp_path / "whole"))
    assert len(expected) == 7
    # float32: tasks are summed in another order, and Adam amplifies the rounding of small gradients. (Each
    # part of the moving run is also validated at its end.)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-4)
