"""The confidence interval of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metaloom.confidence import confidence_95

# The 97.5 % quantiles of Student's distribution, from published tables.
STUDENT = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 6: 2.44691, 9: 2.26216, 29: 2.04523}


@pytest.mark.parametrize("degrees", STUDENT)
def test_without_repeats_it_is_the_ordinary_t_interval(degrees: int) -> None:
    values = np.random.default_rng(degrees).normal(size=degrees + 1).tolist()
    names = [str(position) for position in range(degrees + 1)]
    expected = STUDENT[degrees] * float(np.std(values, ddof=1)) / math.sqrt(degrees + 1)
    # From six degrees of freedom on, the quantile is that of a series which is right to 6e-4.
    assert confidence_95(values, names) == pytest.approx(expected, rel=1e-3)


def test_clusters_follow_the_closed_form() -> None:
    # Mean 4; residual sums of the clusters: -5, 1 and 4.
    values, clusters = [1.0, 2.0, 5.0, 4.0, 8.0], ["a", "a", "b", "b", "c"]
    expected = STUDENT[2] * math.sqrt(3 / 2 * (25 + 1 + 16)) / 5
    assert confidence_95(values, clusters) == pytest.approx(expected, rel=1e-3)
    order = [3, 0, 4, 2, 1]
    assert confidence_95([values[i] for i in order], [clusters[i] for i in order]) == pytest.approx(
        expected, rel=1e-3
    )


def test_copies_of_an_episode_add_no_certainty() -> None:
    values, clusters = [0.1, 0.5, 0.9, 0.4], ["a", "b", "c", "d"]
    assert confidence_95(values * 10, clusters * 10) == pytest.approx(confidence_95(values, clusters))


def test_one_cluster_says_nothing_and_equal_values_leave_no_doubt() -> None:
    assert confidence_95([0.1, 0.9], ["a", "a"]) == math.inf
    assert confidence_95([0.5], ["a"]) == math.inf
    assert confidence_95([0.5] * 4, list("abcd")) == 0.0


def test_values_and_clusters_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        confidence_95([0.1, 0.9], ["a"])


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(spread: float) -> None:
    generator = np.random.default_rng(0)
    num_runs, num_clusters, size = 2000, 30, 4
    clusters = [str(position // size) for position in range(num_clusters * size)]
    covered = 0
    for _ in range(num_runs):
        shared = spread * generator.normal(size=num_clusters).repeat(size)
        values = shared + generator.normal(size=num_clusters * size)
        covered += abs(values.mean()) <= confidence_95(values.tolist(), clusters)
    # 2000 draws know a share of 95 % to 0.5 %; the seed is fixed. Ignoring the clusters would
    # cover 70 % where they differ.
    assert covered / num_runs == pytest.approx(0.95, abs=0.015)
