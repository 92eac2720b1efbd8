"""Random draws as functions of what they are for, never of generator state."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(purpose: str, seed: int, *place: str | int) -> np.random.Generator:
    """A generator that is a function of its arguments alone: the same on every rank, process and day.

    Two calls that differ in any argument give independent streams. The counter-based Philox is keyed with
    128 bits of the sha256 of the arguments.
    """
    text = "\0".join([purpose, str(seed), *(f"{type(p).__name__}:{p}" for p in place)])
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
