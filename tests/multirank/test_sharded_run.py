"""A whole run with its weights in shards: the losses of one rank, and it goes on at any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from metaloom.errors import CheckpointError
from metaloom.models.gpt import Gpt
from tests.commands import RECIPES, curve, run, run_well

OVERRIDES = (
    "model={kind: gpt, num_layers: 2, width: 16, num_heads: 2, context_length: 128}",
    "pretrain={num_steps: 4, batch_size: 3, lr: 1e-3}",
    "algorithm.meta_parameters.backbone=true",
    "outer.schedule={decay: constant, warmup_steps: 1}",
    "outer.tasks_per_step=3",
    "outer.ema=0.9",
    "validation={num_episodes: 3, every_steps: 2}",
    "evaluation={num_episodes: 3, baselines: [pretrained], tuning: {num_episodes: 2, rate_factors: [1.0]}}",
    "memory.recompute_blocks=true",
    "precision.compute=float64",
    "tracking=none",
)
SHARDED = "sharding=sharded"


def losses(folder: Path) -> dict[str, float]:
    """The losses of a run's pre-training, meta-training and validation, by name and step."""
    names = ("pretrain/loss", "meta_loss", "gradient_norm", "validation_loss")
    return {
        f"{name} {record['step']:.0f}": record[name]
        for record in curve(folder)
        for name in names
        if name in record
    }


def evaluated(folder: Path) -> list[list[float]]:
    """After each inner step, of each method."""
    summary = json.loads((folder / "evaluation.json").read_text())
    return [method["mean"] for method in summary["methods"]]


def test_a_run_in_shards_goes_on_at_any_number_of_ranks_and_replicated(tmp_path: Path, stdlib: Path) -> None:
    # Three tasks, episodes and samples on four and two ranks: dummies take part.
    recipe, data = RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}"
    moving, whole = tmp_path / "moving", tmp_path / "whole"
    run_well(
        *("train", recipe, "--run", moving, data, *OVERRIDES, SHARDED, "launcher.num_processes=4"),
        "outer.num_steps=2",
        cwd=tmp_path,
    )
    steps = (
        ("launcher.num_processes=2",),
        ("launcher.num_processes=1", "sharding=replicated"),
        ("launcher.num_processes=4", "sharding={kind: sharded, shard_size: 2}"),
    )
    for number, changes in enumerate(steps):
        run_well("train", "--resume", moving, *changes, f"outer.num_steps={3 + number}", cwd=tmp_path)
    run_well("evaluate", moving, cwd=tmp_path)
    run_well("train", recipe, "--run", whole, data, *OVERRIDES, "outer.num_steps=5", cwd=tmp_path)
    run_well("evaluate", whole, cwd=tmp_path)
    ours, expected = losses(moving), losses(whole)
    assert len(expected) == 13
    # Sums in another order, amplified by Adam where gradients nearly vanish. (Each part of the moving run is
    # also validated at its end.)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-7)
    for mean, mean_of_whole in zip(evaluated(moving), evaluated(whole), strict=True):
        assert mean == pytest.approx(mean_of_whole, rel=1e-7)


def test_a_run_starts_from_weights_in_a_file_and_names_those_of_another_model(
    tmp_path: Path, stdlib: Path
) -> None:
    recipe, data = RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}"
    torch.manual_seed(5)
    model = Gpt(num_layers=2, width=16, num_heads=2, context_length=128, tied_embeddings=True)
    save_file({name: value.detach() for name, value in model.named_parameters()}, tmp_path / "w.safetensors")
    overrides = (*OVERRIDES, "pretrain=null", "evaluation.baselines=[]", "outer.num_steps=2")
    start = f"model.weights={tmp_path / 'w.safetensors'}"
    runs = {name: tmp_path / name for name in ("whole", "shards", "random")}
    run_well("train", recipe, "--run", runs["whole"], data, *overrides, start, cwd=tmp_path)
    ranks = "launcher.num_processes=2"
    run_well("train", recipe, "--run", runs["shards"], data, *overrides, start, SHARDED, ranks, cwd=tmp_path)
    run_well("train", recipe, "--run", runs["random"], data, *overrides, cwd=tmp_path)
    assert losses(runs["shards"]) == pytest.approx(losses(runs["whole"]), rel=1e-9)
    assert losses(runs["random"]) != pytest.approx(losses(runs["whole"]), rel=1e-5)
    folder = tmp_path / "other"
    other = run(
        *("train", recipe, "--run", folder, data, *overrides, start, "model.num_layers=1"), cwd=tmp_path
    )
    assert other.code == CheckpointError.exit_code
    assert "belongs to another model (12 differences)" in other.errors
    assert "blocks.1.mlp.fc_in.weight: in the files, not in the model" in other.errors
