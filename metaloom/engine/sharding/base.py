"""How the meta-parameters lie on the ranks, and how ranks meet."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.engine.meta_optimizer import MetaOptimizer, TorchMetaOptimizer, UpdateRule
from metaloom.engine.sharding.gradient_sum import GradientSum, SumAtOnce

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Holders:
    """The ranks that hold the same elements of a meta-parameter, this one among them.

    Attributes:
        ranks: rising.
        group: their process group; None for that of all ranks.
        num_sharing: W: a rank's gradient is the sum over the tasks of W ranks, those of its shard group,
            which follow each other from a multiple of W on; 1 where it is over its own tasks alone.
    """

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    num_sharing: int = 1


class Sharding(abc.ABC):
    """A sharding backend.

    Every rank has its own share of the tasks. What it holds of a meta-parameter is the backend's choice:
    all of it, or a shard. Works without a process group too: one rank, no communication.

    Attributes:
        is_lockstep: whether ranks meet in the middle of a forward or backward pass, so that all must run the
            same passes: as many micro-batches of as many tasks, as many iterations of a solver. Tasks that
            a rank lacks for that are dummies.
    """

    is_lockstep: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def optimizer(self, meta: Mapping[str, Tensor], rule: UpdateRule) -> MetaOptimizer:
        """What holds and moves the meta-parameters: here torch's optimizer. Every rank must call.

        Args:
            meta: what this rank holds of them, by name; copied.
        """
        return TorchMetaOptimizer(meta, rule)

    @abc.abstractmethod
    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each meta-parameter's gradient, summed over the tasks of all ranks. Every rank must call.

        Args:
            gradients: by name of the meta-parameter, of what this rank holds of it.

        Returns:
            By the same names, what this rank updates of each: the same shapes, equal bit for bit on all ranks
            that hold the same; or, where each rank updates a share, the flat elements of its share.
        """

    def gradient_sum(self, like: Mapping[str, Tensor], order: Sequence[str]) -> GradientSum:
        """A new sum of gradients, of one outer step.

        Args:
            like: the meta-parameters, for their names and shapes.
            order: their names, those whose gradients are complete first first.
        """
        return SumAtOnce(like, self.sum_gradients)

    @abc.abstractmethod
    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of the gradients of all meta-parameters, the same on every rank. Every rank must call.

        Args:
            gradients: what `sum_gradients` returned, or a multiple of it.
        """

    def holders(self, name: str) -> Holders:
        """The ranks that hold what this one holds of a meta-parameter."""
        return Holders(tuple(range(self.world_size)))

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """In this context this rank adds zeros to all that ranks sum up in their passes, whatever it
        computes; what it gets stays the same. For a rank in lockstep that has nothing finite to compute."""
        yield

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank must call."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def sum_over_ranks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of each tensor over all ranks. Every rank must call, with the same names and shapes.

        One all-reduce per dtype, over one flat buffer; the result is the same on every rank, bit for bit.
        """
        return dict(tensors) if self.world_size == 1 else sum_over(None, tensors)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A tensor as checkpoints hold it: whole, whatever this rank has of it.

        Args:
            name: of the meta-parameter that it is, or belongs to (its moving average, an optimizer's state).
            value: what this rank holds.
        """
        return value

    def room_for(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Room to read such a tensor from a checkpoint: as `stored` gives it, not filled.

        Args:
            shape: of the whole.
        """
        return torch.empty(shape, dtype=dtype)

    def held(self, stored: Tensor) -> Tensor:
        """What this rank holds of a tensor that `stored` or `room_for` gave."""
        return stored

    def gather(self, values: list[Value]) -> list[Value]:
        """All ranks' lists, joined in the order of ranks, on every rank. Every rank must call."""
        if self.world_size == 1:
            return values
        parts: list[list[Value]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


def sum_over(group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of each tensor over the ranks of a group, None for all; every rank of it must call."""
    summed: dict[str, Tensor] = {}
    for dtype in sorted({value.dtype for value in tensors.values()}, key=str):
        names = [name for name, value in tensors.items() if value.dtype == dtype]
        flat = torch.cat([tensors[name].reshape(-1) for name in names])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [tensors[name].numel() for name in names])
        summed |= {name: piece.view(tensors[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return {name: summed[name] for name in tensors}
