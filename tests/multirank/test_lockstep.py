"""A whole run on ranks in lockstep, whose tasks, episodes and samples do not divide by the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metaloom.engine.sharding.replicated import Replicated
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.train import train
from tests.commands import RECIPES, curve
from tests.multirank.processes import run_ranks

FLOAT64 = ("precision.compute=float64", "tracking=none")


def train_here(recipe_name: str, overrides: Sequence[str], path: Path) -> None:
    """Trains as this process, alone or as one rank."""
    recipe = load_recipe(RECIPES / recipe_name, overrides)
    place = Place(RunFolder(path), torch.device("cpu"), None, Shutdown())
    path.mkdir(parents=True, exist_ok=True)
    train(recipe, place)


def train_in_lockstep(recipe_name: str, overrides: Sequence[str], path: Path) -> dict[str, int]:
    """Trains as one rank of several; returns how many backward passes and all-reduces it has made."""
    Replicated.is_lockstep = True
    counts = {"backward passes": 0, "all-reduces": 0}
    plain_grad, plain_reduce = torch.autograd.grad, dist.all_reduce

    def grad(*args: Any, **options: Any) -> Any:
        counts["backward passes"] += 1
        return plain_grad(*args, **options)

    def all_reduce(*args: Any, **options: Any) -> Any:
        counts["all-reduces"] += 1
        return plain_reduce(*args, **options)

    torch.autograd.grad, dist.all_reduce = grad, all_reduce
    train_here(recipe_name, overrides, path)
    return counts


CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # Four tasks and seven episodes on three ranks, one at a time; gradients in many small buckets.
    "glyphs": (
        "smoke.yaml",
        3,
        (
            "validation.num_episodes=7",
            "outer.num_steps=3",
            "outer.micro_batch=1",
            "sharding={kind: replicated, bucket_mib: 0.001}",
        ),
    ),
    # Fewer samples, tasks and episodes than ranks: one of two ranks has nothing of its own.
    "stdlib": (
        "stdlib-lora.yaml",
        2,
        (
            "model.width=16",
            "model.num_heads=2",
            "pretrain={num_steps: 10, batch_size: 1, lr: 1e-3}",  # the tenth loss is logged
            "outer.num_steps=2",
            "outer.schedule.warmup_steps=1",
            "outer.tasks_per_step=1",
            "validation.num_episodes=1",
            "validation.every_steps=2",
        ),
    ),
}


@pytest.mark.parametrize("data", CASES)
def test_a_run_in_lockstep_gives_what_one_rank_gives(
    data: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe, world_size, own = CASES[data]
    overrides = (f"data.url={request.getfixturevalue(data)}", *FLOAT64, *own)
    train_here(recipe, overrides, tmp_path / "one")
    counts = run_ranks(world_size, train_in_lockstep, recipe, overrides, tmp_path / "lockstep")
    # What is a collective under a sharded backend happens as often on every rank.
    assert all(count == counts[0] for count in counts)
    expected, actual = curve(tmp_path / "one"), curve(tmp_path / "lockstep")
    assert len(actual) == len(expected) > 0
    assert any("validation_loss" in metrics for metrics in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        # Sums in another order, in float64; Adam amplifies that where gradients nearly vanish.
        assert ours == pytest.approx(theirs, rel=1e-7)
    if data == "glyphs":
        # Three steps, each with several buckets and one all-reduce of its metrics; one validation.
        assert counts[0]["all-reduces"] > 3 * 3 + 1
