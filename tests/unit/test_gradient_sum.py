"""Gradients on their way across ranks: what lies in which bucket, and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import order_of_completion
from metaloom.engine.sharding.gradient_sum import BucketedSum, GradientSum, SumAtOnce, bucket_contents

SIZES = {"a": 3, "b": 2, "c": 6, "d": 1, "e": 1}


def like() -> dict[str, Tensor]:
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in SIZES.items()}


@pytest.mark.parametrize(
    ("num_numbers", "expected"),
    [
        (100, [["a", "b", "c", "d", "e"]]),
        (5, [["a", "b"], ["c"], ["d", "e"]]),  # what is larger than a bucket has one of its own
        (1, [["a"], ["b"], ["c"], ["d"], ["e"]]),
    ],
)
def test_a_bucket_takes_in_what_fits(num_numbers: int, expected: list[list[str]]) -> None:
    assert bucket_contents(like(), list(SIZES), bucket_bytes=8 * num_numbers) == expected
    backwards = bucket_contents(like(), list(SIZES)[::-1], bucket_bytes=8 * 100)
    assert backwards == [["e", "d", "c", "b", "a"]]


def test_a_bucket_has_one_dtype_and_dtypes_in_turn_share_two() -> None:
    mixed = {
        name: value.to(torch.float32 if name in "ace" else torch.float64) for name, value in like().items()
    }
    assert bucket_contents(mixed, list(SIZES), bucket_bytes=1000) == [["a", "c", "e"], ["b", "d"]]


@pytest.mark.parametrize("num_numbers", [1, 5, 100])
def test_on_one_rank_the_result_is_the_sum_in_the_order_of_the_meta_parameters(num_numbers: int) -> None:
    sums: list[GradientSum] = [
        BucketedSum(like(), list(SIZES)[::-1], bucket_bytes=8 * num_numbers),
        SumAtOnce(like(), dict),
    ]
    for total in sums:
        ones = {name: torch.ones_like(value) for name, value in like().items()}
        total.add(ones)
        total.add({"c": 2.0 * ones["c"], "a": ones["a"]})
        total.complete("c")
        result = total.result()
        assert list(result) == list(SIZES)
        assert {name: sorted(set(value.tolist())) for name, value in result.items()} == {
            "a": [2.0],
            "b": [1.0],
            "c": [3.0],
            "d": [1.0],
            "e": [1.0],
        }
        assert {name: value.numel() for name, value in result.items()} == SIZES
        assert ones["c"].tolist() == [1.0] * 6  # what was added is left as it was


def test_room_for_a_sum_is_taken_when_there_is_something_to_add() -> None:
    vast = torch.zeros(1).expand(10**15)  # itself of one number
    total = BucketedSum({"vast": vast, "small": torch.zeros(2)}, ["small", "vast"], bucket_bytes=8)
    total.add({"small": torch.ones(2)})
    total.complete("small")
    with pytest.raises(RuntimeError, match="memory"):
        total.result()


def test_last_layers_are_expected_first_and_rates_last() -> None:
    names = ["init.0.a", "init.1.a", "backbone.0", "backbone.1", "rates.0", "rates.1", "loss.temperature"]
    assert order_of_completion(names) == [
        "loss.temperature",
        "backbone.1",
        "backbone.0",
        "init.1.a",
        "init.0.a",
        "rates.1",
        "rates.0",
    ]
