"""Whole runs with combiners of groups: resumed, on two ranks, and what they leave in their folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metaloom.checkpoints.store import CheckpointStore
from metaloom.tracking.cosines import read_cosines
from tests.commands import curve
from tests.multirank.processes import run_ranks
from tests.multirank.test_lockstep import FLOAT64, train_here

COMBINERS = {
    "gradnorm": "{kind: gradnorm, lr: 0.2, of: [init]}",
    "group_dro": "{kind: group_dro, step_size: 0.5, log_cosines: true}",
    "uncertainty": "{kind: uncertainty, lr: 0.2}",
    "dwa": "{kind: dwa, temperature: 0.5, num_steps: 1}",
    "upweighting": "upweighting",
    "pcgrad": "pcgrad",
}


def overrides(glyphs: Path, name: str) -> tuple[str, ...]:
    common = f"kind: classes, url: '{glyphs}', n_shot: 1, n_query: 2"
    parts = ", ".join(
        f"{{weight: {weight}, data: {{{common}, n_way: {ways}}}}}" for ways, weight in ((2, 1.0), (3, 2.0))
    )
    return (
        f"data={{kind: mixture, parts: [{parts}]}}",
        f"outer.combiner={COMBINERS[name]}",
        "checkpoint={every_steps: 1, keep_last: 9}",
        "validation={every_steps: 2, num_episodes: 2}",
        "model.width=4",
        "outer.num_steps=5",
        *FLOAT64,
    )


@pytest.mark.parametrize("name", COMBINERS)
def test_a_resumed_run_combines_as_the_uninterrupted_one(name: str, tmp_path: Path, glyphs: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_here("smoke.yaml", overrides(glyphs, name), whole)
    shutil.copytree(whole, resumed)
    for step in (3, 4, 5):
        shutil.rmtree(resumed / "checkpoints" / "meta" / f"step-{step:08d}")
    train_here("smoke.yaml", overrides(glyphs, name), resumed)
    assert curve(resumed) == curve(whole)  # bit for bit
    last = [CheckpointStore(run / "checkpoints" / "meta").load(5) for run in (whole, resumed)]
    assert last[0].scalars["combiner"] == last[1].scalars["combiner"]
    assert bool(last[0].scalars["combiner"]) == (name != "pcgrad")
    for key, value in last[0].tensors.items():
        assert value.equal(last[1].tensors[key]), key
    # The weights of both groups are logged, and have moved.
    if name != "pcgrad":
        weights = [record["weight/glyphs_0"] for record in curve(whole) if "weight/glyphs_0" in record]
        assert len(set(weights)) > 1
    is_measured = name in ("gradnorm", "group_dro", "pcgrad")
    records = read_cosines(whole / "cosines.jsonl")
    assert [record.step for record in records] == ([2, 4, 5] if is_measured else [])
    assert read_cosines(resumed / "cosines.jsonl") == records
    assert all(record.values[0][0] == pytest.approx(1.0) for record in records)
    assert is_measured == any("conflict_share" in record for record in curve(whole))


def test_a_run_on_two_ranks_combines_as_on_one(tmp_path: Path, glyphs: Path) -> None:
    more = (*overrides(glyphs, "gradnorm"), "outer.tasks_per_step=3")
    train_here("smoke.yaml", more, tmp_path / "one")
    run_ranks(2, train_here, "smoke.yaml", more, tmp_path / "two")
    expected, actual = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        # Sums in another order, in float64; Adam amplifies that where gradients nearly vanish.
        assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-12)
