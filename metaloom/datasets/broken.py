"""Samples that are damaged for good: what is wrong with one, and what is known of all that were met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """A broken sample where no other can take its place.

    Args:
        broken: the one that the message names.
        advice: what to do, in a sentence or two.
        others: that were met before it, for the same episode or batch.

    Attributes:
        broken: as given.
        all_broken: every broken sample that was met, each once, `broken` included.
    """

    def __init__(self, broken: BrokenSample, advice: str, others: Sequence[BrokenSample] = ()) -> None:
        super().__init__(f"{broken}. {advice}")
        self.broken = broken
        self.all_broken = tuple(dict.fromkeys((*others, broken)))
        self._advice = advice

    def __reduce__(
        self,
    ) -> tuple[Callable[..., SampleError], tuple[BrokenSample, str, tuple[BrokenSample, ...]]]:
        return SampleError, (self.broken, self._advice, self.all_broken)

    def after(self, others: Sequence[BrokenSample]) -> SampleError:
        """The same, where other broken samples were met before."""
        return SampleError(self.broken, self._advice, (*others, *self.all_broken))
