"""What a run chooses by measuring: the same on all ranks, told, recorded, and kept to."""

import json
from pathlib import Path
from typing import Any

from tests.commands import RECIPES, curve, run_well

OPEN = ("algorithm.hypergradient=auto", "adaptation.fast=full", "adaptation.num_steps=2", "tracking=none")


def recorded(run: Path, step: int) -> dict[str, Any]:
    manifest = json.loads((run / f"checkpoints/meta/step-{step:08d}/manifest.json").read_text())
    choices: dict[str, Any] = manifest["scalars"]["choices"]
    return choices


def test_a_choice_is_made_once_by_all_ranks_and_kept_by_a_resumed_run(tmp_path: Path, glyphs: Path) -> None:
    run = tmp_path / "run"
    # Two tasks on three ranks: one has nothing to measure.
    first = run_well(
        "train",
        RECIPES / "smoke.yaml",
        "--run",
        run,
        f"data.url={glyphs}",
        "launcher.num_processes=3",
        "outer.tasks_per_step=2",
        "outer.num_steps=3",
        "outer.schedule.decay=constant",
        *OPEN,
        cwd=tmp_path,
    )
    choices = recorded(run, 3)
    assert choices["tasks"] in ("loop", "vmap")
    assert choices["estimator"]["kind"] in ("rematerialized", "mixed_mode")
    told = [line for line in first.splitlines() if line.startswith("hypergradient: ")]
    assert len(told) == 1
    assert told[0].startswith(f"hypergradient: {choices['estimator']['kind']}")
    assert "timed on 2 inner steps: rematerialized " in told[0]
    again = run_well("train", "--resume", run, "outer.num_steps=4", cwd=tmp_path)
    assert "hypergradient: " not in again
    assert recorded(run, 4) == choices
    assert [record["step"] for record in curve(run) if record["step"] > 0][-1] == 4
    evaluated = run_well("evaluate", run, "evaluation.baselines=[random]", cwd=tmp_path)
    assert "meta-trained" in evaluated


def test_without_room_for_graphs_none_is_kept(tmp_path: Path, glyphs: Path) -> None:
    run = tmp_path / "run"
    run_well(
        "train",
        RECIPES / "smoke.yaml",
        "--run",
        run,
        f"data.url={glyphs}",
        "launcher.num_processes=1",
        "outer.num_steps=2",
        *OPEN,
        "algorithm.hypergradient={kind: auto, limit_gib: 1e-9}",
        cwd=tmp_path,
    )
    assert recorded(run, 2)["estimator"]["num_graph_steps"] == 0
