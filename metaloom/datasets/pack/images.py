"""Folder trees of images: `ROOT/[split/]class/*.png|jpg|jpeg|webp`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from metaloom.datasets.directory import SPLIT_WORDS
from metaloom.datasets.pack.payloads import Limits, image_member, read_file
from metaloom.datasets.pack.plan import (
    BadSample,
    Broken,
    Content,
    Division,
    Item,
    Plan,
    SampleMaker,
    Source,
    arrange,
    fit_for_key,
    require_split_name,
    split_of_file_name,
)
from metaloom.errors import StreamError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_SHOWN = 5
_FOLDER_WORDS = ("split", "class", "group", "_")


@dataclass(frozen=True)
class ImageFolder(Source):
    """Images whose folders say what they are.

    Args:
        root: the tree.
        folders: what the folders from the root down mean, such as `split/class`, `group/class` or
            `class/class` (a class of two names, such as alphabet and letter; `_` means nothing). Further
            folders are part of the key alone. None is `class`, or `split/class` where all folders of the root
            are called like splits.
        shares: of splits, dealt to classes; None where folders say the split, or all is train.
        image_size: as `payloads.image_member`; None keeps the files as they are.
    """

    root: Path
    folders: str | None = None
    shares: dict[str, float] | None = None
    image_size: int | None = None
    limits: Limits = field(default_factory=Limits)

    def plan(self, directory: Path) -> Plan:
        words = self._words()
        if "split" in words and self.shares is not None:
            raise StreamError(
                f"--split deals classes to splits, but the folders of {self.root} already say the split "
                f"({'/'.join(words)}); leave --split out."
            )
        maker = ImageMaker(str(self.root), self.image_size, self.limits)
        broken: list[Broken] = []
        others: Counter[str] = Counter()
        filled: set[tuple[str, ...]] = {()}
        items = self._items(words, broken, others, filled)
        division = None if self.shares is None else Division(self.shares, "class")
        splits = arrange(items, layout="classes", division=division, maker=maker, broken=broken)
        if not splits and not broken:
            otherwise = "" if self.folders is not None else ", or say what they mean by --folders"
            raise StreamError(
                f"{self.root} holds no images ({', '.join(_SUFFIXES)}) in folders {'/'.join(words)}; name "
                f"the folder that holds the folders of the classes{otherwise}."
            )
        notes = []
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
            notes.append(f"files that are no PNG, JPEG or WebP were left out: {kinds}")
        empty = list(_empty_folders(self.root, (), filled, depth=len(words)))
        if empty:
            more = f" and {len(empty) - _MAX_SHOWN} more" if len(empty) > _MAX_SHOWN else ""
            notes.append(f"folders without an image were left out: {', '.join(empty[:_MAX_SHOWN])}{more}")
        if len(splits) == 1:
            notes.append(
                f"all classes are in one split, {next(iter(splits))}; classes for validation and tests are "
                f"held out by --split train=0.7,validation=0.15,test=0.15"
            )
        origin = {
            "kind": "images",
            "folders": "/".join(words),
            "shares": self.shares,
            "image_size": self.image_size,
        }
        return Plan("classes", True, splits, maker, origin, broken, notes)

    def _words(self) -> tuple[str, ...]:
        if self.image_size is not None and self.image_size < 1:
            raise StreamError(f"--image-size is {self.image_size}; it must be at least 1.")
        try:
            names = _folders_in(self.root)
        except OSError as error:
            raise StreamError(
                f"{self.root} cannot be read as a folder of images: {error.strerror}."
            ) from error
        if self.folders is not None:
            words = tuple(self.folders.split("/"))
            wrong = [word for word in words if word not in _FOLDER_WORDS]
            if wrong or words.count("split") > 1 or words.count("group") > 1 or "class" not in words:
                raise StreamError(
                    f"--folders {self.folders} says nothing that can be followed; write split and group at "
                    f"most once, class at least once, and _ for a folder without meaning, as in split/class."
                )
            return words
        called_like_splits = [name for name in names if name.lower() in SPLIT_WORDS]
        if called_like_splits and len(called_like_splits) < len(names):
            others = sorted({*names}.difference(called_like_splits))
            raise StreamError(
                f"{self.root} has folders that are called like splits ({', '.join(called_like_splits)}) "
                f"and others ({', '.join(others[:5])}); say what they mean by --folders class or --folders "
                f"split/class."
            )
        return ("split", "class") if called_like_splits else ("class",)

    def _items(
        self,
        words: tuple[str, ...],
        broken: list[Broken],
        others: Counter[str],
        filled: set[tuple[str, ...]],
    ) -> Iterator[Item]:
        """The images; `filled` takes in the folders, as deep as words go, that have any."""
        for file in files_under(self.root):
            path = PurePosixPath(file)
            if path.suffix.lower() not in _SUFFIXES:
                others[path.suffix or "without suffix"] += 1
                continue
            depth = min(len(words), len(path.parts) - 1)
            filled.update(path.parts[:end] for end in range(1, depth + 1))
            try:
                yield self._item(path, words)
            except BadSample as error:
                broken.append(Broken(_shown(file), str(error)))

    def _item(self, path: PurePosixPath, words: tuple[str, ...]) -> Item:
        names = path.parts[:-1]
        if len(names) < len(words):
            raise BadSample(f"does not lie in folders {'/'.join(words)}")
        told = list(zip(words, names, strict=False))
        split = "train"
        for word, name in told:
            if word == "split":
                split = split_of_file_name(name) or require_split_name(name, str(self.root))
        kept = [name for number, name in enumerate(names) if number >= len(words) or words[number] != "split"]
        return Item(
            key=fit_for_key("/".join([*kept, path.stem])),
            file=str(path),
            at=(),
            label="/".join(name for word, name in told if word == "class"),
            group="".join(name for word, name in told if word == "group"),
            split=split,
        )


@dataclass(frozen=True)
class ImageMaker(SampleMaker):
    """Reads and checks the images of a folder tree."""

    root: str
    image_size: int | None
    limits: Limits

    def place(self, item: Item) -> str:
        return _shown(item.file)

    def content(self, item: Item) -> Content:
        payload = read_file(Path(self.root) / item.file, self.limits)
        extension, payload = image_member(payload, size=self.image_size, limits=self.limits)
        return Content({extension: payload})


def files_under(root: Path) -> Iterator[str]:
    """Paths from the root, with /, of all files that are not hidden; sorted, links followed.

    Raises:
        StreamError: a folder cannot be read, or leads back to one around it.
    """
    yield from _files_under(root, "", (os.path.realpath(root),))


def _folders_in(folder: Path) -> list[str]:
    """The names of its folders that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _empty_folders(
    root: Path, parts: tuple[str, ...], filled: set[tuple[str, ...]], *, depth: int
) -> Iterator[str]:
    """The topmost folders, down to a depth, that are not among the filled ones; sorted."""
    if len(parts) == depth:
        return
    for name in _folders_in(root.joinpath(*parts)):
        below = (*parts, name)
        if below in filled:
            yield from _empty_folders(root, below, filled, depth=depth)
        else:
            yield _shown("/".join(below))


def _files_under(folder: Path, before: str, around: tuple[str, ...]) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StreamError(f"{_shown(str(folder))} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield before + entry.name
            continue
        place = os.path.realpath(entry.path)
        if place in around:
            raise StreamError(f"{_shown(entry.path)} is a link to a folder around it; remove the link.")
        yield from _files_under(Path(entry.path), f"{before}{entry.name}/", (*around, place))


def _shown(path: str) -> str:
    """A path that can be printed, also where its bytes are not UTF-8."""
    return path.encode(errors="backslashreplace").decode()
