"""Language modelling: a task is a document.

Shape letters: S support and Q query stretches, N stretches, L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import BrokenSample
from metaloom.datasets.decoders import read_tokens
from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import (
    Arrays,
    Batch,
    Episode,
    EpisodeSource,
    Samples,
    require_counts,
    require_layout,
)
from metaloom.datasets.index import Index
from metaloom.datasets.members import Members
from metaloom.datasets.order import EpochOrder
from metaloom.datasets.picking import MAX_BROKEN, none_is_whole, whole_task
from metaloom.datasets.reader import SampleReader
from metaloom.errors import StreamError

VOCABULARY = 256  # of bytes
_READ_TOGETHER_BYTES = 32 << 20  # of documents, in their shards, that are in memory at a time


class DocumentEpisodes(EpisodeSource):
    """Language modelling of one document, such as a module of the standard library.

    Of the document, one window of (S + Q) * (L + 1) tokens is drawn and cut into stretches of L + 1; the
    first S are support, those that follow are query: no token is in both, targets included. `inputs` is
    int64 [S, L], `targets` int64 [S, L], the next token of each; query likewise. Documents too short for that
    are no tasks of this source. Within an epoch of `num_tasks` episodes each document comes once, in an
    order of the epoch's own; a broken one gives its place to others in random order.

    Args:
        num_support: S, stretches to adapt on.
        num_query: Q, stretches to be judged on.
        sequence_length: L, tokens per stretch.
        vocabulary: tokens are below it; 256 for bytes.

    Raises:
        StreamError: no document is long enough, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        num_support: int,
        num_query: int,
        sequence_length: int,
        seed: int,
        vocabulary: int = VOCABULARY,
    ) -> None:
        require_counts(
            {"num_support": num_support, "num_query": num_query, "sequence_length": sequence_length}
        )
        self._texts = _Documents(index, [split], vocabulary)
        self._split, self._seed = split, seed
        self._num_support, self._length = num_support, sequence_length
        self._needed = (num_support + num_query) * (sequence_length + 1)
        lengths = self._texts.lengths
        self._tasks = np.flatnonzero(lengths >= self._needed)
        if not len(self._tasks):
            longest = int(lengths.max(initial=0))
            raise StreamError(
                f"(data.num_support + data.num_query) * (data.sequence_length + 1) is ({num_support} + "
                f"{num_query}) * ({sequence_length} + 1) = {self._needed} tokens, but the longest document "
                f"of split {split!r} of {index.dataset} at {index.url} has {longest}; lower one of the three."
            )
        self._order = EpochOrder(
            self._texts.num_bytes[self._tasks], purpose="document epoch", seed=seed, split=split
        )

    @property
    def num_tasks(self) -> int:
        """Documents that are long enough: the episodes of an epoch."""
        return len(self._tasks)

    @property
    def groups(self) -> frozenset[str]:
        found = (self._texts.group(int(document)) for document in self._tasks)
        return frozenset(group for group in found if group is not None)

    def episode(self, number: int) -> Episode:
        rng = generator("document episode", self._seed, self._split, number)
        document, text, broken = self._whole(number)
        start = int(rng.integers(len(text) - self._needed + 1))
        stretches = text[start : start + self._needed].astype(np.int64).reshape(-1, self._length + 1)
        return Episode(
            number=number,
            task=self._texts.name(document),
            support=next_token(stretches[: self._num_support]),
            query=next_token(stretches[self._num_support :]),
            group=self._texts.group(document),
            broken=broken,
        )

    def _whole(self, number: int) -> tuple[int, NDArray[Any], tuple[BrokenSample, ...]]:
        """The document of an episode, its text, and the broken ones whose place it takes."""
        item, text, broken = whole_task(
            lambda item: next(self._texts.read([int(self._tasks[item])])),
            self._order.item(number),
            self.num_tasks,
            lambda: generator("document replacement", self._seed, self._split, number),
        )
        return int(self._tasks[item]), text, broken


class DocumentSamples(Samples):
    """Random stretches of the documents of some splits, every possible stretch equally likely.

    `inputs` is int64 [N, L]; `targets` is int64 [N, L], the next token of each.

    Args:
        key: the recipe's name of `sequence_length`, for messages.

    Raises:
        StreamError: no document has L + 1 tokens, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        splits: Sequence[str],
        *,
        sequence_length: int,
        seed: int,
        vocabulary: int = VOCABULARY,
        key: str = "data.sequence_length",
    ) -> None:
        require_counts({"sequence_length": sequence_length})
        self._texts = _Documents(index, splits, vocabulary)
        self._splits, self._seed = "+".join(splits), seed
        self._length = sequence_length
        self._ends = np.cumsum(np.maximum(self._texts.lengths - sequence_length, 0))
        if not len(self._ends) or self._ends[-1] == 0:
            raise StreamError(
                f"{key} is {sequence_length}, but no document of {', '.join(splits)} of "
                f"{index.dataset} at {index.url} has {sequence_length + 1} tokens; lower it."
            )

    @property
    def num_classes(self) -> int | None:
        return None

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(generator("document samples", self._seed, self._splits, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        places = rng.integers(self._ends[-1], size=size)
        documents = np.searchsorted(self._ends, places, side="right").tolist()
        texts = self._texts.read(documents)
        stretches = np.empty((size, self._length + 1), np.int64)
        broken: dict[int, BrokenSample] = {}  # by document
        for row, (place, document, text) in enumerate(zip(places, documents, texts, strict=True)):
            ends = self._ends
            while isinstance(text, BrokenSample):
                broken[document] = text
                ends = self._ends_without(broken)
                if not ends[-1] or len(broken) == MAX_BROKEN:
                    raise none_is_whole(tuple(broken.values()))
                place = rng.integers(ends[-1])
                document = int(np.searchsorted(ends, place, side="right"))
                text = next(self._texts.read([document]))
            start = int(place - ends[document]) + int(self._texts.lengths[document]) - self._length
            stretches[row] = text[start : start + self._length + 1]
        return Batch(next_token(stretches), tuple(broken.values()))

    def _ends_without(self, documents: Collection[int]) -> NDArray[np.int64]:
        """Stretches of the documents up to each, where some have none."""
        counts = np.diff(self._ends, prepend=0)
        counts[list(documents)] = 0
        return np.cumsum(counts)


@dataclass(frozen=True)
class Tokens:
    """What is read of a document: its tokens."""

    vocabulary: int

    def __call__(self, members: Members) -> dict[str, NDArray[Any]]:
        for extension in ("tokens.npy", "txt"):
            if extension in members:
                tokens = read_tokens(extension, members[extension], vocabulary=self.vocabulary)
                # A byte in a byte: texts are kept in memory.
                return {"tokens": tokens.astype(np.uint8) if self.vocabulary <= 256 else tokens}
        raise ValueError(f"it has {', '.join(members)}, and neither txt nor tokens.npy")


class _Documents:
    """The texts of some splits of layout "documents", in the order of the index.

    Attributes:
        lengths: tokens of each.
        num_bytes: of each in its shard.
    """

    def __init__(self, index: Index, splits: Sequence[str], vocabulary: int) -> None:
        require_layout(index, "documents")
        self._readers = [SampleReader(index, split, Tokens(vocabulary)) for split in splits]
        tables = [reader.table for reader in self._readers]
        for table in tables:
            if table.num_samples and "size" not in table.attributes:
                raise StreamError(
                    f"split {table.name!r} of {index.dataset} at {index.url} has no column 'size', the "
                    "number of tokens of each text, which documents need; pack the data again."
                )
        none = np.zeros(0, np.int64)
        sizes = [table.attributes.get("size", none).astype(np.int64) for table in tables]
        self.lengths: NDArray[np.int64] = np.concatenate([none, *sizes])
        self.num_bytes: NDArray[np.int64] = np.concatenate([none, *(table.length for table in tables)])
        self._firsts = np.cumsum([0, *(table.num_samples for table in tables)])

    def name(self, document: int) -> str:
        split, number = self._place(document)
        return self._readers[split].table.key(number)

    def group(self, document: int) -> str | None:
        split, number = self._place(document)
        table = self._readers[split].table
        groups = table.attributes.get("group")
        return None if groups is None else table.groups[int(groups[number])]

    def read(self, documents: Sequence[int]) -> Iterator[NDArray[Any] | BrokenSample]:
        """The tokens of each, integers [their number]. As many are read together as a limit on their bytes
        allows, at least one."""
        start = num_bytes = 0
        for end, document in enumerate(documents):
            num_bytes += int(self.num_bytes[document])
            if num_bytes > _READ_TOGETHER_BYTES and end > start:
                yield from self._read_together(documents[start:end])
                start, num_bytes = end, int(self.num_bytes[document])
        yield from self._read_together(documents[start:])

    def _read_together(self, documents: Sequence[int]) -> list[NDArray[Any] | BrokenSample]:
        places = [self._place(document) for document in documents]
        found: dict[tuple[int, int], NDArray[Any] | BrokenSample] = {}
        for split, reader in enumerate(self._readers):
            numbers = list(dict.fromkeys(number for of_split, number in places if of_split == split))
            for number, result in zip(numbers, reader.read(numbers), strict=True):
                stated = int(self.lengths[number + int(self._firsts[split])])
                if isinstance(result, BrokenSample):
                    found[split, number] = result
                elif len(result["tokens"]) != stated:
                    reason = f"has {len(result['tokens'])} tokens, and the index says {stated}"
                    found[split, number] = reader.is_broken(number, reason)
                else:
                    found[split, number] = result["tokens"]
        return [found[place] for place in places]

    def _place(self, document: int) -> tuple[int, int]:
        """(split, number in it) of a document."""
        split = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return split, document - int(self._firsts[split])


def next_token(stretches: NDArray[np.int64]) -> Arrays:
    """Inputs and targets [N, L] of stretches [N, L + 1]."""
    return {
        "inputs": np.ascontiguousarray(stretches[:, :-1]),
        "targets": np.ascontiguousarray(stretches[:, 1:]),
    }
