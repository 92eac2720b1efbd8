"""A whole run under DeepSpeed: what the user sees, and that another backend goes on from it."""

import json
from pathlib import Path

import pytest

from tests.commands import RECIPES, curve, run_well

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
    "tracking=none",
)


def losses(run: Path) -> list[float]:
    """The meta-losses and validation losses of a run, and the losses of its pre-training."""
    names = ("pretrain/loss", "meta_loss", "validation_loss")
    return [record[name] for record in curve(run) for name in names if name in record]


@pytest.mark.slow
def test_a_run_begun_under_deepspeed_goes_on_replicated_with_the_same_losses(
    tmp_path: Path, stdlib: Path
) -> None:
    recipe, data = RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}"
    zero = "sharding={kind: deepspeed_zero, offload_optimizer: true}"
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    two, one = "launcher.num_processes=2", "launcher.num_processes=1"
    output = run_well(
        "train", recipe, "--run", begun, data, *OVERRIDES, two, zero, "outer.num_steps=2", cwd=tmp_path
    )
    told = [line for line in output.splitlines() if "deepspeed" in line.lower()]
    assert len(told) == 1  # and nothing of DeepSpeed's own
    assert "ZeRO stage 2 over 2 ranks (" in told[0]
    given = json.loads((begun / "deepspeed.json").read_text())
    assert given["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    run_well("train", "--resume", begun, one, "sharding=replicated", "outer.num_steps=4", cwd=tmp_path)
    run_well("train", recipe, "--run", whole, data, *OVERRIDES, one, cwd=tmp_path)
    assert len(losses(begun)) == 7
    # float32: tasks are summed in another order, and Adam amplifies the rounding of small gradients.
    assert losses(begun) == pytest.approx(losses(whole), rel=1e-4)
