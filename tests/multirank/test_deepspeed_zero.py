"""Training under DeepSpeed's ZeRO is that of `replicated`, on any number of ranks and from any checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multirank.processes import run_ranks
from tests.multirank.zero_problems import (
    ADAM,
    BAD_STEP,
    CONFIGURATIONS,
    NUM_STEPS,
    SAVED_AT,
    SETTINGS,
    SHAPES,
    DeepSpeedImported,
    Training,
    train,
    train_all,
)

ON_CPU = {"DS_ACCELERATOR": "cpu"}
Results = dict[tuple[int, Training], list[dict[str, Any]]]


BY = ("replicated", "2 ranks", "4 ranks")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Folders for the first part of trainings, by optimizer and by who trained it."""
    root = tmp_path_factory.mktemp("begun")
    return {optimizer: {by: root / optimizer / by for by in BY} for optimizer in SETTINGS}


@pytest.fixture(scope="module")
def results(begun: dict[str, dict[str, Path]]) -> Results:
    """What every rank returned, by number of ranks and training."""

    def first(by: str, name: str) -> list[Training]:
        return [Training(key, name, last=SAVED_AT, saved=begun[key][by]) for key in SETTINGS]

    def second(by: str, name: str) -> list[Training]:
        return [Training(key, name, first=SAVED_AT, loaded=begun[key][by]) for key in SETTINGS]

    for training in first("replicated", "replicated"):
        train(training)
    adam = [Training("adam", name) for name in CONFIGURATIONS]
    sgd = [Training("sgd", "stage 2"), Training("sgd", "stage 1, offloaded")]
    plan = [
        (4, [*adam, *sgd, *first("4 ranks", "stage 2")]),
        (2, [adam[0], adam[-1], *first("2 ranks", "stage 1, offloaded"), *second("4 ranks", "stage 1")]),
        (1, [adam[1], *second("4 ranks", "stage 2, offloaded"), *second("2 ranks", "stage 1")]),
        (4, [*second("2 ranks", "stage 2"), *second("replicated", "stage 1, offloaded")]),
    ]
    results: Results = {}
    for num_ranks, trainings in plan:
        on_ranks = run_ranks(
            num_ranks, train_all, trainings, DeepSpeedImported(), timeout_s=100.0, environment=ON_CPU
        )
        for position, training in enumerate(trainings):
            results[num_ranks, training] = [rank[position] for rank in on_ranks]
    return results


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """The whole trainings on one rank, replicated."""
    return {optimizer: train(Training(optimizer, "replicated")) for optimizer in SETTINGS}


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any], *, first: int = 0) -> None:
    # float32, with sums over tasks in another order and another order of operations in a fused optimizer;
    # losses and weights are of the size of 1 to 50.
    assert len(actual["curve"]) == NUM_STEPS - first
    for ours, theirs in zip(actual["curve"], expected["curve"][first:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)
    for part in ("tensors", "average"):
        assert actual[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(actual[part][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_trainings_compared_clip_skip_a_step_and_average(expected: dict[str, dict[str, Any]]) -> None:
    curve = expected["adam"]["curve"]
    assert [record["skipped"] for record in curve] == [float(step == BAD_STEP) for step in range(NUM_STEPS)]
    assert math.isnan(curve[BAD_STEP]["gradient_norm"])
    assert ADAM.clip_norm is not None
    assert all(
        record["gradient_norm"] > ADAM.clip_norm for step, record in enumerate(curve) if step != BAD_STEP
    )
    weight = "init.weight"
    assert not torch.allclose(
        expected["adam"]["average"][weight], expected["adam"]["tensors"][f"meta/{weight}"]
    )


@pytest.mark.parametrize(("num_ranks", "num_trainings"), [(1, 1), (2, 2), (4, len(CONFIGURATIONS) + 2)])
def test_every_stage_gives_the_curve_and_the_states_of_replicated(
    num_ranks: int, num_trainings: int, results: Results, expected: dict[str, dict[str, Any]]
) -> None:
    compared = 0
    for (ranks, training), on_ranks in results.items():
        if ranks == num_ranks and (training.first, training.last) == (0, NUM_STEPS):
            for result in on_ranks:
                assert_same(result, expected[training.optimizer])
                assert result["curve"][0] == on_ranks[0]["curve"][0]
            compared += 1
    assert compared == num_trainings


def test_a_run_begun_on_some_ranks_or_replicated_goes_on_with_the_same_curve_on_others(
    results: Results, expected: dict[str, dict[str, Any]]
) -> None:
    moves = set()
    for (num_ranks, training), on_ranks in results.items():
        if training.loaded is not None:
            for result in on_ranks:
                assert_same(result, expected[training.optimizer], first=SAVED_AT)
            moves.add((training.optimizer, training.loaded.name, num_ranks))
    pairs = [("4 ranks", 2), ("4 ranks", 1), ("2 ranks", 1), ("2 ranks", 4), ("replicated", 4)]
    assert moves == {(optimizer, begun, ranks) for optimizer in SETTINGS for begun, ranks in pairs}


def test_replicated_goes_on_from_what_deepspeed_has_begun(
    results: Results, begun: dict[str, dict[str, Path]], expected: dict[str, dict[str, Any]]
) -> None:
    assert results
    for optimizer, folders in begun.items():
        rest = Training(optimizer, "replicated", first=SAVED_AT, loaded=folders["4 ranks"])
        assert_same(train(rest), expected[optimizer], first=SAVED_AT)


def test_each_rank_keeps_its_share_of_gradients_and_states_alone(results: Results) -> None:
    for name in ("stage 1", "stage 2"):
        on_ranks = results[4, Training("adam", name)]
        for parameter, shape in SHAPES.items():
            assert sum(rank["share"][parameter] for rank in on_ranks) == math.prod(shape)
        num_elements = sum(math.prod(shape) for shape in SHAPES.values())
        for rank in on_ranks:
            # Three groups of the same rates, each padded to a multiple of twice the ranks.
            assert num_elements / 4 <= rank["first_moments"] <= num_elements / 4 + 3 * 2
            assert sum(rank["share"].values()) <= rank["first_moments"]
            assert f"ZeRO {name} over 4 ranks (CPU), optimizer states in shares" in rank["description"]
