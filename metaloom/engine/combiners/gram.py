"""The inner products of the gradients of single tasks that lie on many ranks.

Shape letters: T tasks of an outer step, R of them whose gradients a rank holds, N ranks that hold the same
elements, P numbers of the meta-parameters, n numbers of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.engine.hypergradients.base import Tensors
from metaloom.engine.sharding.base import Holders, Sharding

CHUNK_NUMBERS = 2**24
Piece = tuple[str, int, int]


def gram_matrix(
    gradients: Mapping[int, Tensors],
    like: Tensors,
    owners: Sequence[int],
    sharding: Sharding,
    *,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> Tensor:
    """G `[T, T]`, G_st = <g_s, g_t>; float64, on the CPU, equal bit for bit on all ranks. Every rank must
    call.

    | of n numbers of the gradients, on a rank | held                                   |
    |------------------------------------------|----------------------------------------|
    | before                                   | `[R, n]`: of the tasks that it has     |
    | after an all-to-all                      | `[T, n / N]`: a part, of all tasks     |

    Each rank adds up the products of its part, and one all-reduce of T x T numbers the ranks' sums: so a rank
    sends R P / N * (N - 1) numbers, and never holds more than a chunk of what the others have.

    Args:
        gradients: by task, from 0 to T - 1, of what this rank holds; by name of the meta-parameter.
        like: the meta-parameters that count, for their names and for the shapes of what this rank holds.
        owners: `[T]`, rising: the rank that has each task.
        chunk_numbers: most numbers of a chunk, over all tasks.
    """
    num_tasks = len(owners)
    device = next(iter(like.values())).device
    gram = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
    for is_shard in (False, True):
        names = [name for name in like if (sharding.holders(name).num_sharing > 1) == is_shard]
        if not names:
            continue
        holders = sharding.holders(names[0])
        num_rows = [len(_held(owners, rank, holders)) for rank in holders.ranks]
        own = _held(owners, sharding.rank, holders)
        size = max(1, chunk_numbers // num_tasks)
        for pieces in _chunks({name: like[name].numel() for name in names}, size):
            local = _rows([gradients[task] for task in own], pieces, like)
            part = _exchanged(local, num_rows, holders).double()
            gram += part @ part.T
    return sharding.sum_over_ranks({"gram": gram})["gram"].cpu()


def _held(owners: Sequence[int], rank: int, holders: Holders) -> list[int]:
    """The tasks whose gradients a rank holds: R of them, of the ranks whose gradients add up in its own."""
    group = rank // holders.num_sharing
    return [task for task, owner in enumerate(owners) if owner // holders.num_sharing == group]


def _chunks(sizes: Mapping[str, int], chunk: int) -> Iterator[list[Piece]]:
    """Stretches of the flat tensors, so many numbers at a time."""
    pieces: list[Piece] = []
    room = chunk
    for name, size in sizes.items():
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append((name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


def _rows(gradients: Sequence[Tensors], pieces: Sequence[Piece], like: Tensors) -> Tensor:
    """`[R, n]`: stretches of the gradients of some tasks."""
    rows = [
        torch.cat([gradient[name].reshape(-1)[start:stop] for name, start, stop in pieces])
        for gradient in gradients
    ]
    width = sum(stop - start for _, start, stop in pieces)
    return torch.stack(rows) if rows else like[pieces[0][0]].new_zeros(0, width)


def _exchanged(local: Tensor, num_rows: Sequence[int], holders: Holders) -> Tensor:
    """`[T, n / N]`: this rank's part of the columns, of the rows of all holders in their order."""
    if len(holders.ranks) == 1:
        return local
    parts = torch.tensor_split(local, len(holders.ranks), dim=1)
    width = parts[holders.ranks.index(dist.get_rank())].shape[1]
    sizes = [rows * width for rows in num_rows]
    received = local.new_empty(sum(sizes))
    dist.all_to_all_single(
        received,
        torch.cat([part.reshape(-1) for part in parts]),
        output_split_sizes=sizes,
        input_split_sizes=[part.numel() for part in parts],
        group=holders.group,
    )
    return received.view(sum(num_rows), width)
