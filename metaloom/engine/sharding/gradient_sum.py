"""The gradients of one outer step on their way: added up over micro-batches, then over ranks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = Mapping[str, Tensor]


class GradientSum(abc.ABC):
    """The sum of the gradients that are added on all ranks, by name of the meta-parameter.

    On every rank: `add` as often as needed, `complete` for a name to which nothing more will be added, then
    `result` once.

    Attributes:
        sends_early: whether it does anything with what is complete before `result` is called, so that it is
            worth saying so.
    """

    sends_early: bool

    @abc.abstractmethod
    def add(self, gradients: Tensors) -> None:
        """Adds this rank's gradients of some meta-parameters, or of all."""

    @abc.abstractmethod
    def complete(self, name: str) -> None:
        """Says that this rank has added all that there is of one meta-parameter's gradient."""

    @abc.abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Each gradient summed over all ranks; the caller's own. Every rank must call, once."""


class SumAtOnce(GradientSum):
    """Crosses ranks when the result is asked for.

    Args:
        like: the meta-parameters, for their names and shapes.
        sum_over_ranks: the sum of each gradient over all ranks.
    """

    sends_early = False

    def __init__(self, like: Tensors, sum_over_ranks: Callable[[Tensors], dict[str, Tensor]]) -> None:
        self._like = like
        self._sum: dict[str, Tensor] = {}
        self._sum_over_ranks = sum_over_ranks

    def add(self, gradients: Tensors) -> None:
        for name, value in gradients.items():
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value.clone()

    def complete(self, name: str) -> None:
        pass

    def result(self) -> dict[str, Tensor]:
        return self._sum_over_ranks(
            {
                name: self._sum[name] if name in self._sum else torch.zeros_like(value)
                for name, value in self._like.items()
            }
        )


class BucketedSum(GradientSum):
    """Crosses ranks in buckets, each as soon as it is complete, while the others are still computed.

    Gradients lie in flat buffers, the buckets, one all-reduce each. Collectives must be begun in one order
    on all ranks, so a bucket waits for those before it: `order` should be that of completion. Every rank
    gets the same sums, bit for bit. Memory: one gradient; a bucket's is taken when the first gradient for it
    comes, not before, while the most is needed to compute it.

    Args:
        like: the meta-parameters, for their names and shapes.
        order: their names, those that are complete first first.
        bucket_bytes: a bucket takes in tensors of one dtype until it would be larger than that.
        group: the ranks to add over; None for all.
    """

    def __init__(
        self,
        like: Tensors,
        order: Sequence[str],
        *,
        bucket_bytes: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.sends_early = dist.is_initialized() and dist.get_world_size(group) > 1
        self._group = group
        self._like = like
        self._contents = bucket_contents(like, order, bucket_bytes=bucket_bytes)
        self._buckets: dict[int, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self._missing = [set(names) for names in self._contents]
        self._bucket_of = {name: index for index, names in enumerate(self._contents) for name in names}
        self._work: list[dist.Work] = []
        self._num_begun = 0

    def add(self, gradients: Tensors) -> None:
        for name, value in gradients.items():
            self._bucket(self._bucket_of[name])
            self._views[name] += value

    def complete(self, name: str) -> None:
        self._missing[self._bucket_of[name]].discard(name)
        while self._num_begun < len(self._contents) and not self._missing[self._num_begun]:
            bucket = self._bucket(self._num_begun)
            if self.sends_early:
                work = dist.all_reduce(bucket, group=self._group, async_op=True)
                assert work is not None
                self._work.append(work)
            self._num_begun += 1

    def result(self) -> dict[str, Tensor]:
        for name in self._like:
            self.complete(name)
        for work in self._work:
            work.wait()
        return {name: self._views[name] for name in self._like}

    def _bucket(self, index: int) -> Tensor:
        """A bucket, made of zeros when it is first asked for, with a view for each of its names."""
        if index not in self._buckets:
            names = self._contents[index]
            sizes = [self._like[name].numel() for name in names]
            self._buckets[index] = bucket = self._like[names[0]].new_zeros(sum(sizes))
            for name, piece in zip(names, torch.split(bucket, sizes), strict=True):
                self._views[name] = piece.view(self._like[name].shape)
        return self._buckets[index]


def bucket_contents(like: Tensors, order: Sequence[str], *, bucket_bytes: int) -> list[list[str]]:
    """The names in each bucket: consecutive ones of one dtype, as many as fit, at least one.

    Names of different dtypes do not share a bucket; each dtype has one that is open.
    """
    buckets: list[list[str]] = []
    open_bucket: dict[torch.dtype, int] = {}
    sizes: list[int] = []
    for name in order:
        value = like[name]
        size = value.numel() * value.element_size()
        index = open_bucket.get(value.dtype)
        if index is None or sizes[index] + size > bucket_bytes:
            open_bucket[value.dtype] = index = len(buckets)
            buckets.append([])
            sizes.append(0)
        buckets[index].append(name)
        sizes[index] += size
    return buckets
