"""A source's samples written as shards, in parallel, and what there is to say of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.directory import SPOOL_NAME, begin, create, delete_leftovers, holds_index
from metaloom.datasets.index import Index
from metaloom.datasets.pack.duplicates import ContentDigests
from metaloom.datasets.pack.parallel import CHUNK, Workers
from metaloom.datasets.pack.plan import Broken, Plan, PlannedSplit, Source, list_broken
from metaloom.datasets.shards import Sample, SplitSamples, write_shards
from metaloom.errors import StreamError

RULES = 1  # of this package; raise it when the same files and options would give other data
_BUILT_IN = ("glyphs", "stdlib")


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split; a class or group counts if it has a sample."""

    num_samples: int
    num_classes: int
    num_groups: int
    num_shards: int
    num_bytes: int


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A data set that was packed.

    Attributes:
        splits: counts by split.
        smallest_class: (split, name, number of samples); None where there are no classes.
        largest_class: likewise.
        broken: what was left out.
        warnings: what a person should look at.
    """

    index: Index
    splits: Mapping[str, SplitSummary]
    smallest_class: tuple[str, str, int] | None
    largest_class: tuple[str, str, int] | None
    broken: Sequence[Broken]
    warnings: Sequence[str]
    seconds: float


def pack_dataset(
    source: Source,
    directory: str | Path,
    *,
    name: str | None = None,
    num_processes: int = 1,
    max_broken: int = 0,
    shard_limit_bytes: int = 64 << 20,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackedDataset:
    """The samples of a source as a data set in a local directory; same files and options, same bytes.

    The index is written last: a directory that a kill left behind is no data set, and is packed anew from the
    start by the next call. The plan takes about 0.5 KB of memory a sample.

    Args:
        name: of the data set; None is that of the directory.
        num_processes: that make samples; it changes no byte. Other than 1, the calling program needs
            `if __name__ == "__main__":`, as `multiprocessing` says.
        max_broken: so many samples may be left out; they are listed in the result and in the index's
            `source`.
        shard_limit_bytes: shards are begun anew when they would exceed this size.
        replace: pack anew over a finished data set.
        progress: called with (samples done, samples in all).

    Raises:
        StreamError: more samples are broken; the directory holds something else, or a finished data set;
            there is nothing to pack; or a file cannot be read or written.
    """
    start = time.perf_counter()
    path = Path(directory)
    name = _checked_name(path, name)
    if num_processes < 1:
        raise StreamError(f"--processes is {num_processes}; it must be at least 1.")
    if max_broken < 0:
        raise StreamError(f"--max-broken is {max_broken}; it must be at least 0.")
    if shard_limit_bytes < 1:
        raise StreamError(f"--shard-mib gives shards of {shard_limit_bytes} bytes; it must be at least 1.")
    if holds_index(path, name):
        if not replace:
            raise StreamError(
                f"{path} holds a finished data set. Choose another directory, or give --replace to pack it "
                f"anew."
            )
        Index.load(path)  # what is replaced is a data set of ours
    create(path)
    with _spool_removed(path):
        plan = source.plan(path)
        packing = _Packing(plan, max_broken, progress)
        begin(path)
        # A process more than there are chunks would have nothing to do.
        num_processes = min(num_processes, max(1, math.ceil(plan.num_samples / CHUNK)))
        with Workers(plan.maker, num_processes=num_processes) as workers:
            index = write_shards(
                path,
                {split: packing.samples(split, workers) for split in plan.splits},
                dataset=name,
                layout=plan.layout,
                source=packing.origin,
                shard_limit_bytes=shard_limit_bytes,
            )
    delete_leftovers(path, index)
    return packing.summary(index, time.perf_counter() - start)


class _Packing:
    """What is found out while samples are written."""

    def __init__(self, plan: Plan, max_broken: int, progress: Callable[[int, int], None] | None) -> None:
        self._plan = plan
        self._max_broken = max_broken
        self._progress = progress
        self._num_done = 0
        self._broken = list(plan.broken)
        self._contents = ContentDigests()
        self._places: list[tuple[str, int]] = []  # by the number of the sample: (split, its item)
        self._class_sizes: dict[str, Counter[str]] = {split: Counter() for split in plan.splits}
        self._group_sizes: dict[str, Counter[str]] = {split: Counter() for split in plan.splits}
        names = sorted({name for split in plan.splits.values() for name in split.classes})
        self._class_numbers = {name: number for number, name in enumerate(names)}
        # Asked for when all samples are written.
        self.origin: dict[str, Any] = {"rules": RULES, **plan.origin, "broken": []}
        self._note_broken(self._broken)

    def samples(self, name: str, workers: Workers) -> SplitSamples:
        """The samples of a split, made when they are asked for."""
        split = self._plan.splits[name]
        return SplitSamples(self._samples(name, split, workers), classes=split.classes, groups=split.groups)

    def _samples(self, name: str, split: PlannedSplit, workers: Workers) -> Iterator[Sample]:
        class_rows = {label: row for row, label in enumerate(split.classes)}
        group_rows = {group: row for row, group in enumerate(split.groups)}
        split_number = list(self._plan.splits).index(name)
        for place, (item, made) in enumerate(workers.make(split.items)):
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, self._plan.num_samples)
            if made.content is None:
                broken = Broken(self._plan.maker.place(item), made.reason)
                self._broken.append(broken)
                self._note_broken([broken])
                continue
            members = dict(made.content.members)
            attributes = dict(made.content.attributes)
            if class_rows:
                attributes["class"] = class_rows[item.label]
                self._class_sizes[name][item.label] += 1
            if self._plan.has_labels:
                members["cls"] = str(class_rows[item.label]).encode()
            if group_rows:
                attributes["group"] = group_rows[item.group]
                self._group_sizes[name][item.group] += 1
            class_number = self._class_numbers.get(item.label, -1)
            self._contents.add(made.digest, split=split_number, class_number=class_number)
            self._places.append((name, place))
            yield Sample(item.key, members, attributes)

    def _note_broken(self, broken: Sequence[Broken]) -> None:
        if len(self._broken) > self._max_broken:
            raise StreamError(
                f"{len(self._broken)} broken, and --max-broken allows {self._max_broken}; there may be "
                f"more:\n"
                f"{list_broken(self._broken)}\n"
                f"Repair them, or leave up to N out by --max-broken N, which lists them all."
            )
        self.origin["broken"] += [{"place": entry.place, "reason": entry.reason} for entry in broken]

    def summary(self, index: Index, seconds: float) -> PackedDataset:
        sizes = [
            (count, split, label)
            for split, counts in self._class_sizes.items()
            for label, count in sorted(counts.items())
        ]
        smallest = min(sizes, key=lambda entry: entry[0]) if sizes else None
        largest = max(sizes, key=lambda entry: entry[0]) if sizes else None
        return PackedDataset(
            index=index,
            splits={split: self._split_summary(index, split) for split in self._plan.splits},
            smallest_class=None if smallest is None else (smallest[1], smallest[2], smallest[0]),
            largest_class=None if largest is None else (largest[1], largest[2], largest[0]),
            broken=tuple(self._broken),
            warnings=(*self._plan.notes, *self._warnings()),
            seconds=seconds,
        )

    def _split_summary(self, index: Index, split: str) -> SplitSummary:
        shards = [shard for shard in index.shards if shard.name.rpartition("-")[0] == split]
        return SplitSummary(
            num_samples=index.splits[split].num_samples,
            num_classes=len(self._class_sizes[split]),
            num_groups=len(self._group_sizes[split]),
            num_shards=len(shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
        )

    def _warnings(self) -> Iterator[str]:
        for name, split in self._plan.splits.items():
            empty = [label for label in split.classes if label not in self._class_sizes[name]]
            if empty:
                yield f"no sample is left of classes of {name}: {', '.join(empty[:5])}"
        found = self._contents.duplicates()
        example = ""
        if found.example is not None:
            first, second = (self._shown(number) for number in found.example)
            example = f" ({second} is {first})"
        told = (
            (found.across_splits, "content that is also in another split, so what is tested was trained on"),
            (found.across_classes, "content that is also in another class"),
            (found.within_class, "the content of another sample, so support and query may share it"),
        )
        for count, words in told:
            if count:
                yield f"{count} sample{'s have' if count > 1 else ' has'} {words}{example}"
                example = ""

    def _shown(self, number: int) -> str:
        split, place = self._places[number]
        return self._plan.maker.place(self._plan.splits[split].items[place])


def _checked_name(path: Path, name: str | None) -> str:
    if "://" in str(path) or ":/" in str(path):
        raise StreamError(f"{path}: data sets are packed in a local directory; pack it there and copy it.")
    name = name or path.absolute().name
    if name in _BUILT_IN:
        raise StreamError(
            f"the data set would be called {name}, as one that metaloom makes itself; call it otherwise "
            f"by --name."
        )
    return name


@contextmanager
def _spool_removed(path: Path) -> Iterator[None]:
    """Files that a source has left in the directory for the time of packing are gone afterwards."""
    try:
        yield
    finally:
        for file in path.glob(SPOOL_NAME.replace("{number:05d}", "*")):
            file.unlink()
