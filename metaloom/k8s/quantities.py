"""Quantities of Kubernetes ("500m", "1.5Gi", "2e3"), exactly."""

from __future__ import annotations

import re
from fractions import Fraction

_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:(?P<suffix>[KMGTPE]i|[numkMGTPE]?)|[eE](?P<exponent>[+-]?[0-9]+))"
)
# An exponent beyond it is no amount of anything, and costs memory to compute with.
_MAX_EXPONENT = 30
# What people write for a quantity, by the first letter of its unit.
_WORDS = re.compile(
    r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*"
    r"(?P<unit>[kmgtp]i?b?|kilo\w*|meg\w*|gig\w*|tera\w*|peta\w*)\s*",
    re.IGNORECASE,
)
_CORES = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?:cpus?|v?cores?|vcpus?)\s*", re.IGNORECASE)


def parse_quantity(text: str) -> Fraction:
    """The exact value of a quantity, as Kubernetes reads it.

    Raises:
        ValueError: it is none; says what one looks like.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        meant = _meant(text)
        hint = f"; did you mean {meant}?" if meant else ""
        raise ValueError(
            f"{text!r} is not a quantity: a number and its unit together, as in 500m, 4, 512Mi or 4Gi{hint}"
        )
    number = Fraction(match["number"])
    if match["exponent"] is not None:
        exponent = int(match["exponent"])
        if abs(exponent) > _MAX_EXPONENT:
            raise ValueError(
                f"{text!r} is no quantity that anything has: its exponent is beyond {_MAX_EXPONENT}"
            )
        return number * Fraction(10) ** exponent
    suffix = match["suffix"]
    return number * (_BINARY[suffix] if suffix in _BINARY else Fraction(10) ** _DECIMAL[suffix])


def bytes_as_quantity(num_bytes: int) -> str:
    """The shortest exact quantity of so many bytes, in powers of 1024."""
    for suffix, size in sorted(_BINARY.items(), key=lambda item: -item[1]):
        if num_bytes and num_bytes % size == 0:
            return f"{num_bytes // size}{suffix}"
    return str(num_bytes)


def _meant(text: str) -> str | None:
    if (cores := _CORES.fullmatch(text)) is not None:
        return cores["number"]
    if (words := _WORDS.fullmatch(text)) is None:
        return None
    return f"{words['number']}{words['unit'][0].upper()}i"
