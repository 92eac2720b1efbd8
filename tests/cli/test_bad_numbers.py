"""Runs that meet tasks which are not finite."""

from __future__ import annotations

from pathlib import Path

from metaloom.left_out_log import NUM_TOLD
from tests.commands import curve, run, run_well

# Every other task has targets whose squares are beyond float32.
RECIPE = """\
name: scales
model: {kind: mlp, width: 8, num_layers: 1}
data:
  kind: synthetic
  task: {kind: unequal_scales, scales: [1.0, 1.0e+30], length: 4, num_targets: 2}
  num_support: 5
adaptation:
  fast: {kind: full, tasks: loop}
  rule: {kind: sgd, lr: 0.01}
  num_steps: 2
algorithm: {hypergradient: rematerialized}
outer: {num_steps: 15, tasks_per_step: 8, micro_batch: 2}
launcher: {num_processes: 2}
validation: {every_steps: null}
checkpoint: {every_steps: 4}
tracking: none
"""


def test_a_run_goes_on_without_poisoned_tasks_and_names_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    output = run_well("train", "recipe.yaml", cwd=tmp_path)
    first = "outer step 1: 4 of 8 tasks are not finite and left out: "
    # Of both ranks, in their order.
    episodes = ", ".join(f"episode {number} (support loss before adaptation)" for number in (1, 3, 5))
    assert f"warning: {first}{episodes}, 1 more\n" in output
    assert "warning: outer step 2: 4 of 8 tasks are not finite and left out: episode 9 (" in output
    assert output.count("not finite and left out") == NUM_TOLD < 15
    assert output.count("more tasks are left out: the metric left_out counts them") == 1
    steps = [metrics for metrics in curve(tmp_path / "runs" / "scales") if "meta_loss" in metrics]
    assert len(steps) == 15
    for metrics in steps:
        assert metrics["left_out"] == 4.0
        assert metrics["skipped"] == 0.0
        assert 0.0 < metrics["meta_loss"] < 100.0


def test_a_run_without_finite_tasks_ends_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ("data.task.scales=[1e30, 2e30]",)
    finished = run("train", "recipe.yaml", *words, cwd=tmp_path)
    assert finished.code == 1
    told = " ".join(finished.errors.split())
    assert "error: outer step 10: the meta-gradient was not finite 10 times in a row." in told
    assert "checkpoints/meta/step-00000008: if it was data or a machine that were at fault" in told
    assert "go on from it by metaloom train --resume " in told
    assert "runs/scales" in told
    # What was left out in the step that ended the run was told before.
    assert "outer step 10: 8 of 8 tasks are not finite and left out" in finished.output
    finished = run("train", "--resume", "runs/scales", cwd=tmp_path)
    assert finished.code == 1  # the data are as they were


def test_a_run_that_ends_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ("data.task.scales=[1e30, 2e30]", "checkpoint.every_steps=null", "launcher.num_processes=1")
    finished = run("train", "recipe.yaml", *words, cwd=tmp_path)
    assert finished.code == 1
    assert "There is no checkpoint yet." in finished.errors


def test_a_rate_that_lets_all_tasks_diverge_is_named_by_the_step_at_which_they_do(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ("data.task.scales=[1.0, 1.0]", "adaptation.rule.lr=1e25", "launcher.num_processes=1")
    finished = run("train", "recipe.yaml", *words, cwd=tmp_path)
    assert finished.code == 1
    assert "episode 0 (support loss after 1 inner step)" in finished.output
    steps = [metrics for metrics in curve(tmp_path / "runs" / "scales") if "meta_loss" in metrics]
    assert {str(metrics["meta_loss"]) for metrics in steps} == {"NaN"}
