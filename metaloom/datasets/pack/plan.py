"""What is to be packed: every sample as a cheap description, in the order in which it will lie in shards."""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaloom.datasets.directory import SPLIT_NAME, SPLIT_WORDS
from metaloom.errors import StreamError

_FIRST_SPLITS = ("train", "validation", "test", "rehearsal")
_UNFIT_FOR_KEYS = re.compile(r"[.%\\\x00-\x1f\x7f]")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Item:
    """Where one sample comes from.

    Attributes:
        key: under which it will lie in the shards.
        file: that holds it; what `at` means is its source's own.
        label: name of its class; empty where there are no classes.
        group: name of its user, domain or corruption; empty where there are no groups.
        split: that it goes to.
    """

    key: str
    file: str
    at: tuple[int, ...]
    label: str
    group: str
    split: str


@dataclass(frozen=True)
class Broken:
    """What cannot be packed: where it stands, and what is wrong with it."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class BadSample(Exception):
    """One sample cannot be packed; the text says why."""


@dataclass(frozen=True)
class Content:
    """What a sample holds: its members by extension, and its attributes besides class and group."""

    members: Mapping[str, bytes]
    attributes: Mapping[str, int] = field(default_factory=dict)


class SampleMaker(abc.ABC):
    """Makes samples of their descriptions: a pure function that is pickled, and run by several processes."""

    @abc.abstractmethod
    def place(self, item: Item) -> str:
        """Where a person finds the sample: `cat/3.png`, or `records.csv, line 8`."""

    @abc.abstractmethod
    def content(self, item: Item) -> Content:
        """What the sample holds.

        Raises:
            BadSample: it cannot be packed.
        """


@dataclass(frozen=True)
class PlannedSplit:
    """One split: its class and group names, sorted, and its samples in order."""

    items: Sequence[Item]
    classes: Sequence[str] = ()
    groups: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """All that is to be packed.

    Attributes:
        layout: `classes`, `groups`, `documents` or `episodes`.
        has_labels: whether samples have a member `cls`, the number of their class.
        origin: what decides the data besides the files: the options, as JSON values.
        broken: what has already been found unfit.
        notes: what a person should know of the source.
    """

    layout: str
    has_labels: bool
    splits: Mapping[str, PlannedSplit]
    maker: SampleMaker
    origin: Mapping[str, Any]
    broken: Sequence[Broken]
    notes: Sequence[str] = ()

    @property
    def num_samples(self) -> int:
        return sum(len(split.items) for split in self.splits.values())


class Source(abc.ABC):
    """Something that can be packed."""

    @abc.abstractmethod
    def plan(self, directory: Path) -> Plan:
        """Every sample's description: the same for the same files, whatever the machine.

        Args:
            directory: of the data set; files that are needed until it is packed may lie there, named by
                `SPOOL_NAME`.

        Raises:
            StreamError: there is nothing to pack, or options and files contradict each other.
        """


@dataclass(frozen=True)
class Division:
    """How samples are dealt to splits by shares.

    A unit (a class, a group, or a sample by its key) goes where the sha256 of its name falls, so that further
    units move none that were there before, and all machines agree. Shares are met on average.

    Args:
        shares: by split; their sum is 1.
        by: `class`, `group` or `sample`.
    """

    shares: Mapping[str, float]
    by: str

    def split_of(self, name: str) -> str:
        """The split of a unit."""
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        for split, share in self.shares.items():
            place -= share
            if place < 0:
                return split
        return list(self.shares)[-1]  # the sum of the shares is rounded


def parse_shares(text: str) -> dict[str, float]:
    """The shares of `train=0.7,validation=0.15,test=0.15`.

    Raises:
        StreamError: they are none, or their sum is not 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            share = float(value)
        except ValueError as error:
            raise StreamError(
                f"--split {text}: {part!r} is no share; write shares as in "
                f"train=0.7,validation=0.15,test=0.15."
            ) from error
        if not 0 < share <= 1:
            raise StreamError(
                f"--split {text}: the share of {name!r} is {value}; it must be above 0, up to 1."
            )
        if name in shares:
            raise StreamError(f"--split {text}: {name!r} is there twice; give each split one share.")
        shares[require_split_name(name, f"--split {text}")] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise StreamError(f"--split {text}: the shares add up to {sum(shares.values()):.6g}; they must to 1.")
    return shares


def require_split_name(name: str, place: str) -> str:
    """The name, if a file may be called by it.

    Raises:
        StreamError: it may not.
    """
    if not re.fullmatch(SPLIT_NAME, name):
        raise StreamError(
            f"{place}: {name!r} cannot name a split; a name has letters, digits, _ and -, and no - in front."
        )
    return name


def split_of_file_name(name: str) -> str | None:
    """The split that a file or folder name tells: `train.jsonl`, `val`, `test-00000-of-00002.parquet`."""
    found = re.fullmatch(rf"({'|'.join(SPLIT_WORDS)})([-_.].*)?", name, flags=re.IGNORECASE)
    return SPLIT_WORDS[found[1].lower()] if found else None


def fit_for_key(text: str) -> str:
    """The text with what a key may not have (dots, backslashes, control characters) written as %2E.

    Raises:
        BadSample: no key can be made of it.
    """
    key = _UNFIT_FOR_KEYS.sub(lambda found: f"%{ord(found[0]):02X}", text)
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"its name {text!r} is not UTF-8") from error
    if not key or key.startswith("/") or key.endswith("/") or "//" in key:
        raise BadSample(f"{text!r} cannot be its key, which may not be empty nor have empty parts between /")
    return key


def arrange(
    items: Iterable[Item],
    *,
    layout: str,
    division: Division | None,
    maker: SampleMaker,
    broken: list[Broken],
) -> dict[str, PlannedSplit]:
    """The splits of some samples: train, validation, test, rehearsal, then others by name.

    Args:
        layout: samples of `classes` are ordered by class, those of `groups` by group; those of one, and all
            others, keep the order they come in.
        division: deals the samples to splits; None leaves them where they are.
        broken: takes in samples whose key another one of their split has.
    """
    found: dict[str, dict[str, Item]] = {}
    for item in items:
        split = item.split
        if division is not None:
            units = {"class": item.label, "group": item.group, "sample": item.key}
            split = division.split_of(units[division.by])
        known = found.setdefault(split, {})
        other = known.setdefault(item.key, item)
        if other is not item:
            place = maker.place(other)
            broken.append(Broken(maker.place(item), f"its key {item.key!r} is also that of {place}"))
    if division is not None:
        _require_all(division, found)
    names = sorted(found, key=lambda s: (_FIRST_SPLITS.index(s) if s in _FIRST_SPLITS else 4, s))
    return {name: _planned(list(found.pop(name).values()), layout) for name in names}


def _planned(items: list[Item], layout: str) -> PlannedSplit:
    if layout == "classes":
        items.sort(key=lambda item: item.label)
    elif layout == "groups":
        items.sort(key=lambda item: item.group)
    return PlannedSplit(
        items,
        classes=sorted({item.label for item in items}) if layout == "classes" else (),
        groups=sorted({item.group for item in items} - {""}),
    )


def _require_all(division: Division, found: Mapping[str, Mapping[str, Item]]) -> None:
    missing = [split for split in division.shares if split not in found]
    if missing:
        raise StreamError(
            f"--split: no {division.by} fell to {', '.join(missing)}: a {division.by} goes where the sha256 "
            f"of its name falls, and there are few. Give larger shares, or sort the source into splits "
            f"yourself."
        )


def list_broken(broken: Sequence[Broken]) -> str:
    """Lines that name what is broken, up to a number that a screen holds."""
    lines = [f"  {entry}" for entry in broken[:_SHOWN]]
    if len(broken) > _SHOWN:
        lines.append(f"  and {len(broken) - _SHOWN} more")
    return "\n".join(lines)
