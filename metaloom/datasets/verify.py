"""Whether the files of a data set are what its index records."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from metaloom.datasets.index import INDEX_NAME, Index, ShardEntry, remake_advice
from metaloom.datasets.storage import MissingFile
from metaloom.errors import StreamError


def verify_sizes(index: Index) -> None:
    """Returns if every shard exists with the recorded size; one look-up per shard, nothing is read.

    Raises:
        StreamError: lists all shards that are missing or of another size.
    """
    with ThreadPoolExecutor(16) as pool:
        wrong = [line for line in pool.map(lambda shard: _size_problem(index, shard), index.shards) if line]
    if wrong:
        raise StreamError(_listing(index, wrong))


def _size_problem(index: Index, shard: ShardEntry) -> str | None:
    try:
        size = index.storage.size(shard.name)
    except MissingFile:
        return f"{shard.name}: missing, expected {shard.num_bytes} bytes"
    if size == shard.num_bytes:
        return None
    verb = "truncated" if size < shard.num_bytes else "too long"
    return f"{shard.name}: {verb}, {size} bytes, expected {shard.num_bytes}"


def _listing(index: Index, wrong: Sequence[str]) -> str:
    listing = "\n".join(f"  {line}" for line in wrong)
    return (
        f"{len(wrong)} of {len(index.shards)} shards of {index.dataset} at {index.url} are not what "
        f"{INDEX_NAME} records:\n{listing}\n{remake_advice(index.dataset, index.url)}"
    )
