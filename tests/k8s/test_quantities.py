from __future__ import annotations

import decimal
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity as official

from metaloom.k8s.quantities import bytes_as_quantity, parse_quantity

SUFFIXES = ("", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.integers(min_value=0, max_value=10**9),
    st.integers(min_value=0, max_value=9999),
    st.sampled_from(SUFFIXES),
)
def test_a_quantity_is_what_the_official_client_takes_it_for(whole: int, part: int, suffix: str) -> None:
    text = f"{whole}.{part}{suffix}"

    # It rounds to as many digits as decimal numbers have.
    with decimal.localcontext(prec=80):
        assert parse_quantity(text) == Fraction(official(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4", 4),
        ("+4", 4),
        ("-1.5", Fraction(-3, 2)),
        ("500m", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        (".5Gi", 2**29),
        ("1.", 1),
        ("1E", 10**18),
        ("1E3", 1000),
        ("12e-1", Fraction(6, 5)),
        ("1Ei", 2**60),
        ("1n", Fraction(1, 10**9)),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_values_of_quantities_are_exact(text: str, value: Fraction) -> None:
    assert parse_quantity(text) == value


def test_quantities_that_look_alike_are_told_apart() -> None:
    in_order = ["1M", "1024k", "1Mi", "1025Ki"]

    assert sorted(in_order, key=parse_quantity) == in_order
    assert parse_quantity("1024Ki") == parse_quantity("1Mi") == parse_quantity("1048576")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("4 gigs", "4Gi"),
        ("4gb", "4Gi"),
        ("4 GiB", "4Gi"),
        ("4g", "4Gi"),
        ("4Gi ", "4Gi"),
        ("1.5 tb", "1.5Ti"),
        ("512 megabytes", "512Mi"),
        ("64K", "64Ki"),
        ("16 cores", "16"),
        ("2 vCPUs", "2"),
    ],
)
def test_what_people_write_for_a_quantity_is_told_with_the_quantity(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity") as caught:
        parse_quantity(text)

    assert str(caught.value) == (
        f"{text!r} is not a quantity: a number and its unit together, as in 500m, 4, 512Mi or 4Gi; did you "
        f"mean {meant}?"
    )


@pytest.mark.parametrize("text", ["", "Gi", "1.2.3", "1e", "0x10", "4Gis", "½", "٣", "NaN", "inf", "lots"])
def test_what_is_nothing_like_a_quantity_is_refused_without_a_guess(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity") as caught:
        parse_quantity(text)

    assert "did you mean" not in str(caught.value)


def test_an_exponent_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'1e999999999' is no quantity that anything has: its exponent is beyond 30"
    ):
        parse_quantity("1e999999999")


@hypothesis.given(st.integers(min_value=0, max_value=2**70))
def test_bytes_come_back_from_their_quantity(num_bytes: int) -> None:
    assert parse_quantity(bytes_as_quantity(num_bytes)) == num_bytes


@pytest.mark.parametrize(("num_bytes", "text"), [(0, "0"), (1, "1"), (2**30, "1Gi"), (3 * 2**29, "1536Mi")])
def test_bytes_are_written_in_the_largest_unit_that_fits(num_bytes: int, text: str) -> None:
    assert bytes_as_quantity(num_bytes) == text
