"""A few of the seeds of `make soak`: ranks that die at each place of a save, and by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import PLACES, disturbed, plan_of, state_of, train

SEEDS = (5, 2, 1, 3, 7, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, glyphs: Path) -> dict[str, object]:
    """What an undisturbed run ends as."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, glyphs, folder / "whole")
    return state_of(folder / "whole")


def test_the_seeds_kill_at_every_place_and_by_the_clock() -> None:
    assert {plan_of(seed).place for seed in SEEDS} == {*PLACES, None}


@pytest.mark.parametrize(
    "seed", [*SEEDS[:2], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[2:])]
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    tmp_path: Path, glyphs: Path, whole: dict[str, object], seed: int
) -> None:
    done = disturbed(tmp_path, glyphs, tmp_path / "run", plan_of(seed))
    assert done.has_struck
    assert state_of(tmp_path / "run") == whole
