"""The number of processes changes nothing but the time."""

from pathlib import Path

import pytest

from tests.commands import RECIPES, curve, run_well

SUMS = ("meta_loss", "loss_after", "gradient_norm", "validation_loss")


def losses(folder: Path, num_processes: int, recipe: str, *overrides: str) -> list[dict[str, float]]:
    run = folder / f"{num_processes}-ranks"
    run_well(
        "train",
        RECIPES / recipe,
        "--run",
        run,
        f"launcher.num_processes={num_processes}",
        "precision.compute=float64",
        "tracking=none",
        *overrides,
        cwd=folder,
    )
    return [
        {name: record[name] for name in SUMS if name in record} for record in curve(run) if record["step"] > 0
    ]


def assert_equal_to_rounding(left: list[dict[str, float]], right: list[dict[str, float]]) -> None:
    # Sums over tasks are added in another order: in float64 that is 1e-16 at first, and a few outer
    # steps of Adam amplify it where gradients nearly vanish.
    assert len(left) == len(right) > 0
    for ours, theirs in zip(left, right, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)


def test_1_2_and_3_ranks_give_the_same_loss_curve(tmp_path: Path, glyphs: Path) -> None:
    # Four tasks over three ranks: one rank has two.
    overrides = (f"data.url={glyphs}", "validation.num_episodes=7")
    one = losses(tmp_path, 1, "smoke.yaml", *overrides)
    assert_equal_to_rounding(one, losses(tmp_path, 2, "smoke.yaml", *overrides))
    assert_equal_to_rounding(one, losses(tmp_path, 3, "smoke.yaml", *overrides))


def test_a_rank_without_tasks_takes_part(tmp_path: Path, glyphs: Path) -> None:
    overrides = (
        f"data.url={glyphs}",
        "outer.tasks_per_step=1",
        "outer.num_steps=3",
        "validation.num_episodes=1",
    )
    one = losses(tmp_path, 1, "smoke.yaml", *overrides)
    assert_equal_to_rounding(one, losses(tmp_path, 2, "smoke.yaml", *overrides))


def test_pretraining_and_lora_give_the_same_loss_curve_on_2_ranks(tmp_path: Path, stdlib: Path) -> None:
    overrides = (
        f"data.url={stdlib}",
        "model.width=16",
        "model.num_heads=2",
        "pretrain={num_steps: 4, batch_size: 1, lr: 1e-3}",  # fewer samples than ranks
        "outer.num_steps=3",
        "outer.schedule.warmup_steps=1",
        "outer.tasks_per_step=3",
        "outer.micro_batch=2",
        "validation.num_episodes=3",
        "validation.every_steps=3",
    )
    one = losses(tmp_path, 1, "stdlib-lora.yaml", *overrides)
    assert_equal_to_rounding(one, losses(tmp_path, 2, "stdlib-lora.yaml", *overrides))
