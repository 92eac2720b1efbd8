"""Weights in shards: each rank holds a part of every weight of the backbone, and has the whole for as long as
it takes to run one block (ZeRO stage 3: Rajbhandari et al. 2020, "ZeRO", section 5.3).

Shape letters: W ranks of a shard group, n rows (the first dim) of a weight, P numbers of a rank's shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from metaloom.engine import collectives
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.sharding.base import Holders, Sharding, sum_over
from metaloom.errors import CapabilityError

# torch 2.13 renamed these.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


ReadRows = Callable[[str, range], Tensor]


@dataclasses.dataclass(frozen=True)
class Event:
    """What a shard group has done.

    Attributes:
        kind: `gather` and `scatter` are collectives; `release`: gathered weights were given back.
        names: of the weights; empty for what belongs to a derivative.
        num_elements: of the whole.
        is_ahead: whether a gather was started before its need.
    """

    kind: Literal["gather", "scatter", "release"]
    names: tuple[str, ...]
    num_elements: int
    is_ahead: bool = False


class ShardGroup:
    """The ranks that hold the shards of one copy of the weights, and what carries tensors between them.

    Args:
        group: the process group; None for one rank without communication.
        on_event: told of every collective, and of every release.

    Attributes:
        is_silent: whether this rank has zeros to add to every sum.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._on_event = on_event
        self.is_silent = False
        self.waited_s = 0.0
        """Seconds that this rank has waited for collectives (on a GPU: that it took to queue them)."""

    def gather(self, shard: Tensor) -> Tensor:
        return self.start_gather(shard, ())()

    def start_gather(
        self, shard: Tensor, names: tuple[str, ...], *, is_ahead: bool = False
    ) -> Callable[[], Tensor]:
        """Starts to gather; what it returns waits for the result, `[W * P]`."""
        shard = shard.detach().contiguous()
        self._tell(Event("gather", names, self.size * shard.numel(), is_ahead))
        whole = shard.new_empty(self.size * shard.numel())
        if self._group is None:
            whole.copy_(shard)
            work = None
        else:
            work = _all_gather(whole, shard, group=self._group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                self._wait(work)
            return whole

        return wait

    def watch(self, names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
        """Tells when the memory of all these tensors, made of one gather, has been given back."""
        if self._on_event is None:
            return
        on_event, num_left = self._on_event, len(tensors)
        num_elements = sum(tensor.numel() for tensor in tensors)

        def tell() -> None:
            nonlocal num_left
            num_left -= 1
            if num_left == 0:
                on_event(Event("release", names, num_elements))

        for tensor in tensors:
            weakref.finalize(tensor.untyped_storage(), tell)

    def scatter_sum(self, whole: Tensor) -> Tensor:
        whole = torch.zeros_like(whole) if self.is_silent else whole.contiguous()
        self._tell(Event("scatter", (), whole.numel()))
        if self._group is None:
            return whole.clone()
        shard = whole.new_empty(whole.numel() // self.size)
        self._wait(_reduce_scatter(shard, whole, group=self._group, async_op=True))
        return shard

    def _wait(self, work: dist.Work) -> None:
        start = time.perf_counter()
        work.wait()
        self.waited_s += time.perf_counter() - start

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)


def rows_in(model: nn.Module) -> ReadRows:
    """Reads the weights that a model has, as copies."""
    parameters = dict(model.named_parameters())

    def read(name: str, rows: range) -> Tensor:
        return parameters[name].detach()[rows.start : rows.stop].clone()

    return read


def rows_of(num_rows: int, rank: int, num_ranks: int) -> range:
    """The rows of a weight that a rank holds: ceil(n / W) each, the last ranks fewer, or none.

    As `torch.chunk` and DTensor's `Shard(0)` have it.
    """
    most = math.ceil(num_rows / num_ranks)
    return range(min(num_rows, rank * most), min(num_rows, (rank + 1) * most))


class ShardedWeights:
    """The weights of a model, of which this rank holds the rows `rows_of`.

    `whole` gathers some of them in one collective. It learns in which order it is called, and starts the next
    gather before it returns, so that it runs beside what is computed with this one; a guess that was wrong
    costs that gather. All ranks of the group call in the same order, so all guess alike.

    Args:
        model: whose weights; it is not changed, and may be on the meta device.
        group: the ranks among which they are divided.
        read: `(name, rows) -> rows of that weight`; asked once for each weight, by one of its names.

    Attributes:
        values: this rank's rows of each weight; of one with several names by the first.

    Raises:
        CapabilityError: a weight is a single number.
    """

    def __init__(self, model: nn.Module, group: ShardGroup, read: ReadRows) -> None:
        # By every name that a weight has: modules that share one gather it each.
        self._shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
        scalars = [name for name, shape in self._shapes.items() if len(shape) == 0]
        if scalars:
            raise CapabilityError(
                f"sharding.kind: sharded divides weights by their rows, and {scalars[0]} has none (it is one "
                "number); take sharding.kind: replicated."
            )
        self._group = group
        self._ahead = _Ahead(self._start, group.watch)
        self.values = {name: read(name, self.rows(name)) for name, _ in model.named_parameters()}

    def shape(self, name: str) -> torch.Size:
        """Of the whole weight."""
        return self._shapes[name]

    def rows(self, name: str) -> range:
        """This rank's rows of a weight."""
        return rows_of(self._shapes[name][0], self._group.rank, self._group.size)

    def whole(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights, from this rank's shards of them. Every rank of the group must call.

        Differentiable any number of times: the derivative of a shard is the sum over the group's ranks of
        what each of them found for its rows.
        """
        result: dict[str, Tensor] = {}
        for names in _alike(shards):
            parts = [shards[name] for name in names]
            fetched = self._ahead.take(names, parts)
            if _is_differentiated(parts):
                whole = collectives.gather(self._flat(names, parts), self._group, fetched=fetched)
            else:
                whole = fetched()
            weights = self._taken_apart(names, whole)
            self._group.watch(names, list(weights.values()))
            result |= weights
        return {name: result[name] for name in shards}

    def _start(self, names: tuple[str, ...], parts: list[Tensor], is_ahead: bool) -> Callable[[], Tensor]:
        with torch.no_grad():
            return self._group.start_gather(self._flat(names, parts), names, is_ahead=is_ahead)

    def _flat(self, names: Iterable[str], parts: Iterable[Tensor]) -> Tensor:
        """The shards one after the other, `[P]`, each filled up to the length that the largest has."""
        pieces = []
        for name, part in zip(names, parts, strict=True):
            pieces.append(part.reshape(-1))
            missing = self._longest(name) - part.numel()
            if missing:
                pieces.append(part.new_zeros(missing))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _taken_apart(self, names: Iterable[str], whole: Tensor) -> dict[str, Tensor]:
        by_rank = whole.view(self._group.size, -1)  # [W, P]
        # Of a split, unlike of slices, the derivative is one concatenation.
        parts = torch.split(by_rank, [self._longest(name) for name in names], dim=1)
        result = {}
        for name, part in zip(names, parts, strict=True):
            shape = self._shapes[name]
            rows = part.reshape(-1, *shape[1:])
            result[name] = rows if len(rows) == shape[0] else rows[: shape[0]]
        return result

    def _longest(self, name: str) -> int:
        shape = self._shapes[name]
        return math.ceil(shape[0] / self._group.size) * shape[1:].numel()


def _alike(shards: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names in groups that one collective can serve, and whose derivative is wanted or not together."""
    groups: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, value in shards.items():
        groups.setdefault((value.dtype, value.requires_grad), []).append(name)
    return [tuple(names) for names in groups.values()]


def _is_differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether the graph has to know of what is made of the tensors, in either mode."""
    return any(
        (tensor.requires_grad and torch.is_grad_enabled())
        or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


Fetch = Callable[[], Tensor]
Names = tuple[str, ...]


class _Ahead:
    """Starts the gather that followed the last two the last time they came one after the other.

    Two, since blocks are visited in both directions.
    """

    def __init__(
        self,
        start: Callable[[Names, list[Tensor], bool], Fetch],
        watch: Callable[[Names, Sequence[Tensor]], None],
    ) -> None:
        self._start, self._watch = start, watch
        self._sources: dict[Names, list[Tensor]] = {}
        self._following: dict[tuple[Names, Names], Names] = {}
        self._recent: tuple[Names, Names] = ((), ())
        self._started: tuple[Names, list[tuple[int, int]], Fetch] | None = None

    def take(self, names: Names, parts: list[Tensor]) -> Fetch:
        """The gather of these weights, started by now; starts the next."""
        fetch = self._fetched(names, parts) or self._start(names, parts, False)
        self._sources[names] = [part.detach() for part in parts]
        self._following[self._recent] = names
        self._recent = (self._recent[1], names)
        upcoming = self._following.get(self._recent)
        if upcoming is None or upcoming == names:
            return fetch

        def fetch_and_go_on() -> Tensor:
            whole = fetch()
            sources = self._sources[upcoming]
            self._started = (upcoming, _identity(sources), self._start(upcoming, sources, True))
            return whole

        return fetch_and_go_on

    def _fetched(self, names: Names, parts: list[Tensor]) -> Fetch | None:
        if self._started is None:
            return None
        (started, identity, fetch), self._started = self._started, None
        if started == names and identity == _identity(parts):
            return fetch
        # Nobody wants it, and its memory must not be given back while it is written to.
        self._watch(started, [fetch()])
        return None


def _identity(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Changes with the tensors and with what is in them."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


class Sharded(Sharding):
    """The backbone's weights, their gradients and optimizer states in shards; what is small on every rank.

    | on a rank                                  | held                                        |
    |--------------------------------------------|---------------------------------------------|
    | backbone weights, gradient, Adam's moments | 1/W each, W the size of the shard group     |
    | fast weights, their start, rates, loss     | whole                                       |
    | one block's weights                        | whole, while it runs; the next one's as well |

    Ranks are a mesh of `world_size / shard_size` copies of W = `shard_size` shards: weights are gathered
    within a shard group (the ranks of one node, say), gradients summed over the copies once per outer step.

    Exact: a gather is a linear operator, and its transpose the sum into shards (`engine.collectives`). It is
    made inside a region that is computed again when it is differentiated, or the graph would keep the whole
    weight and nothing were given back; so each block is gathered for its forward pass, again for its backward
    pass, and once more where that is differentiated.

    Args:
        device: where the ranks compute.
        shard_size: W; None for all ranks.

    Raises:
        CapabilityError: the world size is no multiple of `shard_size`.
    """

    is_lockstep = True

    def __init__(
        self,
        device: torch.device,
        *,
        shard_size: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        super().__init__()
        self._device = device
        size = self.world_size if shard_size is None else shard_size
        if self.world_size % size:
            raise CapabilityError(
                f"sharding.shard_size is {size}, and does not divide the number of ranks, {self.world_size}."
            )
        self.num_copies = self.world_size // size
        self._mesh: DeviceMesh | None = None
        group = None
        if dist.is_initialized():
            self._mesh = init_device_mesh(
                device.type, (self.num_copies, size), mesh_dim_names=("replicate", "shard")
            )
            group = self._mesh.get_group("shard")
        self.group = ShardGroup(group, on_event=on_event)
        self._weights: ShardedWeights | None = None

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        self.group.is_silent = True
        try:
            yield
        finally:
            self.group.is_silent = False

    def divide(self, model: nn.Module, read: ReadRows) -> ShardedWeights:
        """The weights of a model, divided among the ranks of a shard group: see `ShardedWeights`."""
        self._weights = ShardedWeights(model, self.group, read)
        return self._weights

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: value for name, value in gradients.items() if not _is_sharded(name)}
        parts = {name: value for name, value in gradients.items() if _is_sharded(name)}
        summed = self.sum_over_ranks(whole)
        if self._mesh is not None and self.num_copies > 1:
            parts = sum_over(self._mesh.get_group("replicate"), parts)
        summed |= parts
        return {name: summed[name] for name in gradients}

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        whole = _sum_of_squares(value for name, value in gradients.items() if not _is_sharded(name))
        parts = _sum_of_squares(value for name, value in gradients.items() if _is_sharded(name))
        # Over all ranks, so that all hold the same sum bit for bit.
        total = self.sum_over_ranks({"squares": parts / self.num_copies})["squares"]
        return math.sqrt(float(whole + total))

    def holders(self, name: str) -> Holders:
        if self._mesh is None or not _is_sharded(name):
            return super().holders(name)
        size = self.group.size
        ranks = tuple(range(self.group.rank, self.world_size, size))
        return Holders(ranks, self._mesh.get_group("replicate"), num_sharing=size)

    def stored(self, name: str, value: Tensor) -> Tensor:
        if not _is_sharded(name) or value.ndim == 0:
            return value
        assert self._weights is not None, "weights are divided before they are stored"
        return self._as_dtensor(value, self._weights.shape(name.removeprefix(BACKBONE)))

    def room_for(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not _is_sharded(name) or len(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        rows = rows_of(shape[0], self.group.rank, self.group.size)
        return self._as_dtensor(torch.empty(len(rows), *shape[1:], dtype=dtype, device=self._device), shape)

    def held(self, stored: Tensor) -> Tensor:
        return stored.to_local() if isinstance(stored, DTensor) else stored

    def _as_dtensor(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """This rank's rows of a tensor, as torch's distributed checkpoints know them."""
        if self._mesh is None:
            return rows
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows, self._mesh, (Replicate(), Shard(0)), run_check=False, shape=shape, stride=stride
        )


def _is_sharded(name: str) -> bool:
    return name.startswith(BACKBONE)


def _sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    squares = [torch.linalg.vector_norm(value, dtype=torch.float64).square() for value in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
