"""Samples that are damaged for good: what is wrong with one, and what is known of all that were met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaloom.errors import StreamError


@dataclass(frozen=True, order=True)
class BrokenSample:
    """One sample that cannot be used: no other attempt would find it whole.

    Attributes:
        url: of the data set.
        shard: name of the tar file.
        key: of the sample.
        reason: what is wrong with it.
    """

    url: str
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.url}/{self.shard}: sample {self.key!r} {self.reason}"


class SampleError(StreamError):
    """A broken sample where no other can take its place."""

    def __init__(self, broken: BrokenSample, advice: str) -> None:
        super().__init__(f"{broken}. {advice}")
        self.broken = broken
        self._advice = advice

    def __reduce__(self) -> tuple[Callable[..., SampleError], tuple[BrokenSample, str]]:
        return SampleError, (self.broken, self._advice)
