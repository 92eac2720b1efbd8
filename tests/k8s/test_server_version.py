"""The release of an API server, read from what it says at /version."""

from __future__ import annotations

import pytest

from metaloom.k8s.server_version import read_version


@pytest.mark.parametrize(
    ("told", "text", "number"),
    [
        ({"major": "1", "minor": "34", "gitVersion": "v1.34.0"}, "v1.34.0", (1, 34)),
        ({"major": "1", "minor": "28+", "gitVersion": "v1.28.5-gke.100"}, "v1.28.5-gke.100", (1, 28)),
        ({"major": "1", "minor": "29+", "gitVersion": "v1.29.0-eks-abc"}, "v1.29.0-eks-abc", (1, 29)),
        ({"major": "1", "minor": "28+"}, "1.28+", (1, 28)),
        ({"major": "1+", "minor": "9", "gitVersion": ""}, "1+.9", (1, 9)),
    ],
)
def test_the_suffixes_of_who_sells_clusters_are_understood(
    told: dict[str, str], text: str, number: tuple[int, int]
) -> None:
    version = read_version(told)
    assert version is not None
    assert (version.text, version.number) == (text, number)


@pytest.mark.parametrize("told", [{}, {"gitVersion": "master"}, {"major": "", "minor": ""}])
def test_what_names_no_release_is_none(told: dict[str, str]) -> None:
    assert read_version(told) is None
