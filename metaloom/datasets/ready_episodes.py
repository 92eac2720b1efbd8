"""Episodes that were made before: support, query and metadata lie together in one sample.

Shape letters: S support examples, N examples, L tokens, P numbers of a target.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.decoders import (
    PAD,
    ArrayInputs,
    ClassTargets,
    ImageInputs,
    Inputs,
    Targets,
    TextInputs,
    finite,
    read_npy,
)
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
from metaloom.datasets.picking import whole_task
from metaloom.datasets.reader import Decoded, SampleReader
from metaloom.errors import StreamError

IGNORE = -100  # in place of a target that does not count
PARTS = ("support", "query")
NAMES = ("inputs", "targets")
_READ_TOGETHER = 8  # episodes that are in memory at a time
# What is wrong with an episode that has a `shared_example`.
SHARED = "example {} of its query has the inputs of example {} of its support, and they must share none"
_NUMBERED = re.compile(r"(support|query)\.([0-9]+)\.(.+)")


class ReadyEpisodes(EpisodeSource):
    """Each sample of a split is an episode; within an epoch each comes once, in an order of the epoch's own.

    A part (`support`, `query`) is either one array `<part>.inputs.npy`, or members `<part>.<i>.<extension>`,
    one for each example (`support.0.jpg`). Targets are `<part>.targets.npy`; a language model's, where there
    are none, are the next tokens. `json` may state `task`, `group` and `num_ways` (the classes of this task,
    where tasks differ): targets are below it, and it is no more than the classes of `targets`. An example of
    query whose inputs are, byte for byte, those of an example of support makes an episode broken.

    A broken episode gives its place to others in random order.

    Args:
        inputs: what an example is read as.
        targets: what the targets are; None for language modelling.
        num_support: support examples of an episode; the most, where `is_ragged`.
        num_query: query examples likewise.
        is_ragged: whether episodes may have fewer; else such a one is broken.

    Raises:
        StreamError: the split is empty, or the index is of another layout.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        inputs: Inputs,
        targets: Targets | None,
        num_support: int,
        num_query: int,
        seed: int,
        is_ragged: bool = False,
    ) -> None:
        require_layout(index, "episodes")
        require_counts({"num_support": num_support, "num_query": num_query})
        decode = ReadyParts(inputs, targets, num_support, num_query, is_ragged)
        self._reader = SampleReader(index, split, decode, memory_bytes=0)
        table = self._reader.table
        if not table.num_samples:
            raise StreamError(f"split {split!r} of {index.dataset} at {index.url} has no episodes.")
        self._split, self._seed = split, seed
        self._num_ways = targets.num_classes if isinstance(targets, ClassTargets) else None
        self._order = EpochOrder(np.asarray(table.length), purpose="ready epoch", seed=seed, split=split)

    @property
    def num_tasks(self) -> int:
        """Episodes of an epoch."""
        return self._reader.table.num_samples

    def episode(self, number: int) -> Episode:
        (episode,) = self.episodes([number])
        return episode

    def episodes(self, numbers: Sequence[int]) -> Iterator[Episode]:
        """Several, of which as many as may be are read together.

        Raises:
            StreamError: as `episode`, when it comes to that one.
        """
        for start in range(0, len(numbers), _READ_TOGETHER):
            some = numbers[start : start + _READ_TOGETHER]
            samples = list(dict.fromkeys(self._order.item(number) for number in some))
            read = dict(zip(samples, self._reader.read(samples), strict=True))
            yield from (self._episode(number, read) for number in some)

    def _episode(self, number: int, read: Mapping[int, Decoded | BrokenSample]) -> Episode:
        sample, found, broken = self._whole(number, read)
        facts = json.loads(found["facts"].tobytes())
        return Episode(
            number=number,
            task=str(facts.get("task", self._reader.table.key(sample))),
            support=_part(found, "support"),
            query=_part(found, "query"),
            num_ways=facts.get("num_ways", self._num_ways),
            group=self._group(sample, facts),
            broken=broken,
        )

    @property
    def groups(self) -> frozenset[str] | None:
        table = self._reader.table
        groups = table.attributes.get("group")
        if groups is not None:
            return frozenset(table.groups[int(group)] for group in np.unique(groups))
        return None if "json" in table.members else frozenset()

    def _whole(
        self, number: int, read: Mapping[int, Decoded | BrokenSample]
    ) -> tuple[int, Decoded, tuple[BrokenSample, ...]]:
        """The sample of an episode, what it holds, and the broken ones whose place it takes."""
        return whole_task(
            lambda sample: read[sample] if sample in read else self._reader.read([sample])[0],
            self._order.item(number),
            self.num_tasks,
            lambda: generator("ready replacement", self._seed, self._split, number),
        )

    def _group(self, sample: int, facts: dict[str, Any]) -> str | None:
        groups = self._reader.table.attributes.get("group")
        if groups is not None:
            return self._reader.table.groups[int(groups[sample])]
        return None if facts.get("group") is None else str(facts["group"])


class ReadySamples(Samples):
    """Examples of support and query, with replacement: `inputs` and `targets` `[N, ...]`.

    For each an episode is drawn, evenly, and of that an example, evenly. A batch reads each of its episodes
    once.

    Args:
        source: of the episodes.
        num_classes: of the targets; None where they are no classes.
    """

    def __init__(
        self, source: ReadyEpisodes, *, split: str, seed: int, num_classes: int | None = None
    ) -> None:
        self._source, self._split, self._seed = source, split, seed
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def batch(self, number: int, size: int) -> Batch:
        return self.draw(generator("ready samples", self._seed, self._split, number), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        numbers, shares = rng.integers(self._source.num_tasks, size=size), rng.random(size)
        rows: dict[int, Arrays] = {}
        broken: dict[BrokenSample, None] = {}
        drawn: list[int] = np.unique(numbers).tolist()
        episodes = self._source.episodes(drawn)
        for number in drawn:
            try:
                episode = next(episodes)
            except SampleError as error:
                raise error.after([*broken]) from error
            broken |= dict.fromkeys(episode.broken)
            examples = {name: np.concatenate([episode.support[name], episode.query[name]]) for name in NAMES}
            for place in np.flatnonzero(numbers == number).tolist():
                example = int(shares[place] * len(examples["targets"]))
                rows[place] = {name: array[example] for name, array in examples.items()}
        arrays = {name: np.stack([rows[place][name] for place in range(size)]) for name in NAMES}
        return Batch(arrays, tuple(broken))


@dataclass(frozen=True)
class ReadyParts:
    """What is read of a ready episode: `<part>/inputs`, `<part>/targets`, and `facts`, JSON as bytes."""

    inputs: Inputs
    targets: Targets | None
    num_support: int
    num_query: int
    is_ragged: bool = False

    def __call__(self, members: Members) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for part in PARTS:
            expected = self.num_support if part == "support" else self.num_query
            try:
                inputs = self._inputs(members, part)
                if len(inputs) > expected or (len(inputs) < expected and not self.is_ragged):
                    most = "at most " if self.is_ragged else ""
                    raise ValueError(f"it has {len(inputs)} examples, and {most}{expected} are expected")
                arrays |= {
                    f"{part}/{name}": value for name, value in self._both(members, part, inputs).items()
                }
            except ValueError as error:
                raise ValueError(f"{part}: {error}") from error
        twins = shared_example(arrays["support/inputs"], arrays["query/inputs"])
        if twins is not None:
            raise ValueError(SHARED.format(*twins))
        facts = bytes(members.get("json", b"{}"))
        stated = json.loads(facts)
        _check_facts(stated)
        if isinstance(self.targets, ClassTargets):
            self._check_ways(stated.get("num_ways"), arrays)
        return arrays | {"facts": np.frombuffer(facts, np.uint8).copy()}

    def _check_ways(self, num_ways: int | None, arrays: Arrays) -> None:
        """Raises ValueError unless the classes of a task, where it states how many, are enough for its
        targets and no more than there are."""
        if num_ways is None:
            return
        assert isinstance(self.targets, ClassTargets), "other targets have no ways"
        largest = max(int(arrays[f"{part}/targets"].max()) for part in PARTS)
        if not largest < num_ways <= self.targets.num_classes:
            raise ValueError(
                f"its num_ways is {num_ways}, and it must be more than its largest target, {largest}, and at "
                f"most the number of classes, {self.targets.num_classes}"
            )

    def _both(self, members: Members, part: str, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        name = f"{part}.targets.npy"
        if name in members:
            values = read_npy(members[name])
            targets = values.astype(np.int64) if self.targets is None else self.targets.check(values)
        elif self.targets is None:
            return _next_tokens(inputs)
        else:
            raise ValueError(f"it has no {name}")
        if len(targets) != len(inputs) or (self.targets is None and targets.shape != inputs.shape):
            raise ValueError(f"targets are {list(targets.shape)}, inputs {list(inputs.shape)}")
        return {"inputs": inputs, "targets": targets}

    def _inputs(self, members: Members, part: str) -> NDArray[Any]:
        if f"{part}.inputs.npy" in members:
            return _as_batch(self.inputs, read_npy(members[f"{part}.inputs.npy"]))
        numbered = sorted(
            (int(match[2]), match[3], name)
            for name in members
            if (match := _NUMBERED.fullmatch(name)) and match[1] == part
        )
        if not numbered or [number for number, _, _ in numbered] != list(range(len(numbered))):
            raise ValueError(
                f"it has neither {part}.inputs.npy nor examples {part}.0 to "
                f"{part}.{max(0, len(numbered) - 1)}"
            )
        return self.inputs.batch(
            [self.inputs.decode({extension: members[name]}) for _, extension, name in numbered]
        )


def _as_batch(inputs: Inputs, values: NDArray[Any]) -> NDArray[Any]:
    """The examples of one array, as `inputs` gives them.

    Raises:
        ValueError: their shape or kind is another.
    """
    if not values.ndim or not len(values):
        raise ValueError("it has no examples")
    match inputs:
        case TextInputs(length=length, vocabulary=vocabulary):
            if values.ndim != 2 or values.dtype.kind not in "iu" or values.shape[1] > length:
                raise ValueError(
                    f"inputs are {values.dtype} {list(values.shape)}, and tokens [N, at most {length}] are "
                    "expected"
                )
            if not PAD <= int(values.min()) <= int(values.max()) < vocabulary:
                raise ValueError(
                    f"tokens go from {values.min()} to {values.max()}, and the vocabulary has {vocabulary}"
                )
            rows = np.full((len(values), length), PAD, np.int64)
            rows[:, : values.shape[1]] = values
            return rows
        case ImageInputs(size=size, channels=channels):
            expected = (size, size) if channels == 1 else (size, size, channels)
            if values.dtype != np.uint8 or values.shape[1:] != expected:
                raise ValueError(
                    f"inputs are {values.dtype} {list(values.shape)}, and uint8 {['N', *expected]} is "
                    "expected"
                )
            return np.ascontiguousarray(values).reshape(len(values), size, size, channels)
        case ArrayInputs(shape=shape):
            if values.shape[1:] != shape:
                raise ValueError(f"inputs are {list(values.shape)}, and {['N', *shape]} is expected")
            return finite(values)
    raise TypeError(f"{type(inputs).__name__} has no form for ready episodes")


def shared_example(support: Iterable[NDArray[Any]], query: Iterable[NDArray[Any]]) -> tuple[int, int] | None:
    """The first (example of query, example of support) that are the same, byte for byte; None where none
    are."""
    place = {row.tobytes(): number for number, row in enumerate(support)}
    for number, row in enumerate(query):
        twin = place.get(row.tobytes())
        if twin is not None:
            return number, twin
    return None


def _next_tokens(tokens: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Inputs, and as targets the token after each; behind the end of a text nothing counts."""
    targets = np.full_like(tokens, IGNORE)
    targets[:, :-1] = np.where(tokens[:, 1:] == PAD, IGNORE, tokens[:, 1:])
    return {"inputs": tokens, "targets": targets}


def _part(found: Decoded, part: str) -> Arrays:
    return {name: found[f"{part}/{name}"] for name in NAMES}


def _check_facts(facts: Any) -> None:
    """Raises ValueError unless the metadata are an object whose `num_ways` is a number of classes."""
    ways = facts.get("num_ways") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not (ways is None or (isinstance(ways, int) and ways >= 2)):
        raise ValueError(
            f"its json is {json.dumps(facts)[:100]}, and an object is expected, whose num_ways, if any, is "
            "at least 2"
        )
