"""Data sets of tars that other tools have written: indexed where they lie, neither copied nor changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from metaloom.datasets.broken import BrokenSample
from metaloom.datasets.directory import SPLIT_WORDS
from metaloom.datasets.index import INDEX_NAME, LAYOUTS, Index, ShardEntry
from metaloom.datasets.reader import SAMPLE_LIMIT_BYTES
from metaloom.datasets.scanning import Facts, ScannedShard, ScanRules, scan_shard
from metaloom.datasets.shards import SplitColumns, write_index
from metaloom.errors import StreamError

_NUM_SHOWN = 20


def index_shards(
    directory: str | os.PathLike[str],
    *,
    dataset: str,
    layout: str,
    class_from: str | None = None,
    group_from: str | None = None,
    splits: Sequence[str] | None = None,
    max_broken: int = 0,
    sample_limit_bytes: int = SAMPLE_LIMIT_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Index, list[BrokenSample]]:
    """The index of the tars in a local directory, written beside them; and the samples that it leaves out.

    The tars are webdataset's: the entries of a sample lie next to each other and have one key. Each is read
    once. Folders in them are passed over. Named and left out are entries whose names are absolute, have `..`
    or no extension; and samples that have links or devices, are cut off, come twice in a split (the first one
    stays, if it is in an earlier tar), have other entries between theirs, are too large, or lack what the
    layout needs. They are not in the index, so no run meets them.

    Classes and groups get numbers in the order of their names; names that are all whole numbers, in the order
    of these.

    Args:
        dataset: its name.
        layout: `classes`; `groups`; `documents`, whose sizes are counted from `tokens.npy` or `txt`; or
            `episodes`.
        class_from: of layout `classes`, and of no other: `cls`, the number or the name in that member, with
            which readers compare it; `folder`, the last folder of the key; `json:KEY`, a text or whole number
            in the member `json`.
        group_from: `json:KEY`, likewise; None for no groups, which layout `groups` has to have.
        splits: the tars of a split are called `<split>-*.tar`. None takes what stands before the first `-` of
            each name; with names, other tars are left alone. Splits called `val`, `valid` or `dev` become
            `validation`, which is what runs ask for.
        max_broken: the most samples that may be left out.
        sample_limit_bytes: larger samples are left out.
        progress: called with (tars read, tars in all).

    Raises:
        StreamError: more samples than `max_broken` cannot be used, which it lists; the directory has no tars,
            or an index; it cannot be read or written; arguments do not fit each other.
    """
    rules = ScanRules(layout, class_from, group_from, sample_limit_bytes)
    _require_rules(rules, max_broken)
    if "://" in os.fspath(directory):
        raise StreamError(
            f"{os.fspath(directory)}: tars are indexed in a local directory; index them there, then copy "
            f"{INDEX_NAME} and the columns beside the tars."
        )
    folder = Path(directory)
    try:
        tars = _tars(folder, splits)
        found = _Found(folder, rules, [split for split, _ in tars])
        for number, (split, scanned) in enumerate(_scanned(tars, rules), start=1):
            found.add(split, scanned)
            if progress is not None:
                progress(number, len(tars))
        found.require_usable(max_broken)
        found.write(dataset)
    except OSError as error:
        raise StreamError(
            f"{folder}: its tars cannot be indexed: {error}. Choose a directory that can be read and written "
            "to."
        ) from error
    return Index.load(folder), found.broken


class _Found:
    """What was found so far, in a few bytes for each sample."""

    def __init__(self, folder: Path, rules: ScanRules, splits: Iterable[str]) -> None:
        self.broken: list[BrokenSample] = []
        self._folder, self._rules = folder, rules
        self._shards: list[ShardEntry] = []
        cls_holds = "name" if rules.class_from == "cls" else "other"
        self._columns = {split: SplitColumns(cls_holds=cls_holds) for split in splits}
        self._keys: dict[str, set[bytes]] = {split: set() for split in self._columns}
        # Names of classes and groups, numbered as they come.
        self._numbers: dict[tuple[str, str], dict[str, int]] = {
            (split, name): {} for split in self._columns for name in ("class", "group")
        }

    def add(self, split: str, scanned: ScannedShard) -> None:
        """Takes in a tar."""
        columns, keys = self._columns[split], self._keys[split]
        num_before = columns.num_samples
        self._note(scanned.name, scanned.broken)
        for sample in scanned.samples:
            digest = hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
            if digest in keys:
                self._note(scanned.name, [(sample.key, "comes already in an earlier tar; keys are names")])
                continue
            keys.add(digest)
            columns.add(
                sample.key,
                shard=len(self._shards),
                offset=sample.offset,
                length=sample.length,
                crc32=sample.crc32,
                members=sample.extensions,
                attributes=self._attributes(split, sample.facts),
            )
        num_samples = columns.num_samples - num_before
        self._shards.append(ShardEntry(scanned.name, scanned.num_bytes, scanned.sha256, num_samples))

    def require_usable(self, max_broken: int) -> None:
        """Raises StreamError if too many samples cannot be used, or none of a split can."""
        if len(self.broken) > max_broken:
            shown = "\n".join(f"  {sample}" for sample in self.broken[:_NUM_SHOWN])
            more = len(self.broken) - _NUM_SHOWN
            rest = f"\n  and {more} more" if more > 0 else ""
            raise StreamError(
                f"{len(self.broken)} samples at {self._folder} cannot be used, and max_broken is "
                f"{max_broken}:\n{shown}{rest}\nMend the tars, or raise max_broken to leave these out."
            )
        for split, columns in self._columns.items():
            if not columns.num_samples:
                raise StreamError(
                    f"split {split!r} at {self._folder} has no sample. Delete its tars, or name the other "
                    "splits."
                )

    def write(self, dataset: str) -> None:
        """Writes the index; classes and groups have their numbers now."""
        for split, columns in self._columns.items():
            columns.classes = self._in_order(columns, split, "class")
            columns.groups = self._in_order(columns, split, "group")
        source = {
            "indexed": "tars of another tool",
            "class_from": self._rules.class_from,
            "group_from": self._rules.group_from,
            "num_left_out": len(self.broken),
        }
        write_index(
            self._folder,
            self._shards,
            self._columns,
            dataset=dataset,
            layout=self._rules.layout,
            source=source,
        )

    def _note(self, shard: str, broken: Sequence[tuple[str, str]]) -> None:
        self.broken += [BrokenSample(str(self._folder), shard, key, reason) for key, reason in broken]

    def _attributes(self, split: str, facts: Facts) -> dict[str, int]:
        attributes = {}
        for attribute, name in (("class", facts.label), ("group", facts.group)):
            if name is not None:
                numbers = self._numbers[split, attribute]
                attributes[attribute] = numbers.setdefault(name, len(numbers))
        return attributes if facts.size is None else attributes | {"size": facts.size}

    def _in_order(self, columns: SplitColumns, split: str, attribute: str) -> tuple[str, ...]:
        """The names of an attribute, whose numbers now follow their order."""
        numbers = self._numbers[split, attribute]
        if all(name.isdecimal() for name in numbers):
            ordered = sorted(numbers, key=lambda name: (int(name), name))
        else:
            ordered = sorted(numbers)
        place = {name: row for row, name in enumerate(ordered)}
        columns.renumber(attribute, [place[name] for name in numbers])
        return tuple(ordered)


def _scanned(tars: Sequence[tuple[str, Path]], rules: ScanRules) -> Iterator[tuple[str, ScannedShard]]:
    """Every tar with its split, in order; each is scanned by itself."""
    for split, path in tars:
        yield split, scan_shard(path, rules)


def _tars(folder: Path, splits: Sequence[str] | None) -> list[tuple[str, Path]]:
    """(split, tar), the splits in the order given or else of their names, their tars in that of theirs."""
    names = sorted(entry.name for entry in folder.iterdir())
    if INDEX_NAME in names:
        raise StreamError(f"{folder} has an {INDEX_NAME} already. Delete it to have the tars indexed again.")
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if not tars:
        raise StreamError(
            f"{folder} has no files `<split>-*.tar`. Choose the directory that has them; decompress tars "
            "that are compressed, since nothing in them can be read alone."
        )
    if splits is None:
        alone = [name for name in tars if name.find("-") <= 0]
        if alone:
            raise StreamError(
                f"{folder}/{alone[0]} does not say its split; tars are called `<split>-*.tar`. Rename it."
            )
        return [(_split_called(name.partition("-")[0]), folder / name) for name in tars]
    chosen = []
    for split in dict.fromkeys(splits):
        # `train-extra-0.tar` is of `train-extra`, if there is such a split.
        longer = tuple(f"{s}-" for s in splits if len(s) > len(split) and s.startswith(f"{split}-"))
        own = [n for n in tars if n.startswith(f"{split}-") and not (longer and n.startswith(longer))]
        if not own:
            raise StreamError(f"{folder} has no {split}-*.tar; it has {', '.join(tars[:5])}.")
        chosen += [(_split_called(split), folder / name) for name in own]
    return chosen


def _split_called(word: str) -> str:
    """The split whose tars' names begin with a word."""
    return SPLIT_WORDS.get(word.lower(), word)


def _require_rules(rules: ScanRules, max_broken: int) -> None:
    """Raises StreamError unless the arguments fit each other."""
    if rules.layout not in LAYOUTS:
        raise StreamError(f"layout {rules.layout!r} is none of {', '.join(LAYOUTS)}.")
    if max_broken < 0:
        raise StreamError(f"max_broken is {max_broken}; it must be at least 0.")
    for name, value, words in (
        ("class_from", rules.class_from, ("cls", "folder")),
        ("group_from", rules.group_from, ()),
    ):
        is_json = value is not None and value.startswith("json:") and value != "json:"
        if value is not None and value not in words and not is_json:
            choices = ", ".join([*words, "json:KEY"])
            raise StreamError(f"{name} is {value!r}; it must be one of {choices}.")
    if rules.layout == "classes" and rules.class_from is None:
        raise StreamError(
            "layout 'classes' needs to know where a sample's class stands; say it by class_from "
            "(--class-from): cls, folder or json:KEY."
        )
    if rules.layout != "classes" and rules.class_from is not None:
        raise StreamError(
            f"layout {rules.layout!r} has no classes; leave class_from (--class-from) out, or choose layout "
            "'classes'."
        )
    if rules.layout == "groups" and rules.group_from is None:
        raise StreamError("layout 'groups' needs group_from (--group-from), json:KEY.")
