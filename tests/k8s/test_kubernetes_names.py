from __future__ import annotations

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from metaloom.k8s.names import (
    key_fault,
    label_name_fault,
    label_value_fault,
    object_name_fault,
    service_name_fault,
    suggested_name,
)

# The expressions of Kubernetes itself (apimachinery's validation), to which lengths come.
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
DNS_1123 = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
NAMES = st.text(alphabet="aZ09-._ é", max_size=70) | st.from_regex(DNS_1123, fullmatch=True)


@hypothesis.given(NAMES)
def test_names_are_those_that_kubernetes_takes(name: str) -> None:
    fits = len(name) <= 63
    plain = not name.endswith("\n")

    assert (service_name_fault(name) is None) == (fits and plain and DNS_1035.match(name) is not None)
    assert (label_name_fault(name) is None) == (fits and plain and DNS_1123.match(name) is not None)
    assert (object_name_fault(name) is None) == (plain and SUBDOMAIN.match(name) is not None)
    assert (label_value_fault(name) is None) == (fits and plain and VALUE.match(name) is not None)


@hypothesis.given(st.text(max_size=80), st.integers(min_value=1, max_value=63))
def test_a_suggested_name_is_one(words: str, limit: int) -> None:
    name = suggested_name(words, limit=limit)

    assert name == "" or (len(name) <= limit and service_name_fault(name) is None)


@pytest.mark.parametrize(
    ("words", "name"),
    [("Glyphs_MAML v2", "glyphs-maml-v2"), ("recipes/smoke", "recipes-smoke"), ("5-way", "way"), ("---", "")],
)
def test_suggestions_read_like_what_was_given(words: str, name: str) -> None:
    assert suggested_name(words, limit=63) == name


@pytest.mark.parametrize("key", ["team", "example.com/team", "a", "A_b.c-d", "x" * 63, f"{'a.' * 125}com/x"])
def test_keys_of_labels(key: str) -> None:
    assert key_fault(key) is None


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (
            "my team",
            "'my team': a key has at most 63 letters, digits, '-', '_' and '.', beginning and ending with a "
            "letter or digit, after a domain and '/' where there is one",
        ),
        ("a/b/c", "'a/b/c': what is before the '/' must be a domain, as in example.com/c"),
        ("/team", "'/team': what is before the '/' must be a domain, as in example.com/team"),
        (
            "Example.com/team",
            "'Example.com/team': what is before the '/' must be a domain, as in example.com/team",
        ),
    ],
)
def test_keys_that_are_none_are_told_with_the_rule(key: str, fault: str) -> None:
    assert key_fault(key) == fault


def test_a_name_of_an_object_that_is_too_long_is_not_printed_whole() -> None:
    assert object_name_fault("a" * 254) == f"'{'a' * 40}'... has 254 letters; at most 253 are allowed"


def test_a_namespace_that_is_too_long_is_told_with_the_limit() -> None:
    assert label_name_fault("a" * 64) == f"'{'a' * 64}' has 64 letters; at most 63 are allowed"
