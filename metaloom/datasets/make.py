"""Making the built-in data sets: `metaloom data make glyphs|glyph-faces|stdlib DIR`."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets import glyph_faces, glyphs, stdlib_code
from metaloom.datasets.directory import begin, delete_leftovers, holds_index, require_same
from metaloom.datasets.index import Index
from metaloom.datasets.shards import SplitSamples, write_shards
from metaloom.datasets.verify import verify_sizes
from metaloom.errors import StreamError

LAYOUTS = {"glyphs": "classes", "glyph-faces": "groups", "stdlib": "documents"}
DATASETS = tuple(LAYOUTS)


@dataclass(frozen=True, eq=False)
class MadeDataset:
    """A data set that is there now, and what it took.

    `num_classes` is empty for stdlib, of which every sample (module) is a task of its own.
    """

    index: Index
    created: bool  # False if an identical, complete one was already there
    num_samples: Mapping[str, int]  # by split
    num_classes: Mapping[str, int]  # by split
    num_bytes: int  # of all shards
    seconds: float


def make_dataset(
    name: str,
    directory: str | os.PathLike[str],
    *,
    max_per_split: int | None = None,
    shard_limit_bytes: int = 16 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> MadeDataset:
    """The built-in data set, made in a local directory unless an identical, complete one is there.

    Args:
        name: glyphs, glyph-faces or stdlib.
        directory: a local directory; it is created if need be. To use the set from elsewhere, copy it.
        max_per_split: the most classes (glyphs, glyph-faces) or modules (stdlib) of each split, for quick
            tests; None for all.
        shard_limit_bytes: shards are begun anew when they would exceed this size.
        progress: called with (samples written, samples in all).

    Raises:
        StreamError: there is no such data set; the directory holds something else; it cannot be written to.
    """
    start = time.perf_counter()
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise StreamError(f"There is no built-in data set {name!r}; there are {', '.join(DATASETS)}.{hint}")
    if max_per_split is not None and max_per_split < 1:
        raise StreamError(f"max_per_split is {max_per_split}; it must be at least 1.")
    if "://" in os.fspath(directory):
        raise StreamError(
            f"{os.fspath(directory)}: data sets are made in a local directory; make it there and copy it."
        )
    path = Path(directory)
    present = Index.load(path) if holds_index(path, name) else None
    origin, build = _plan(name, max_per_split)
    origin["shard_limit_bytes"] = shard_limit_bytes
    if present is not None:
        require_same(present, name, origin)
        if _is_complete(present):
            return _summary(present, created=False, start=start)
    begin(path)
    splits, total = build()
    index = write_shards(
        path,
        splits,
        dataset=name,
        layout=LAYOUTS[name],
        source=origin,
        shard_limit_bytes=shard_limit_bytes,
        progress=None if progress is None else lambda done: progress(done, total),
    )
    delete_leftovers(path, index)
    return _summary(index, created=True, start=start)


def _plan(
    name: str, max_per_split: int | None
) -> tuple[dict[str, Any], Callable[[], tuple[dict[str, SplitSamples], int]]]:
    """What decides the data, and the work that makes the samples and counts them."""
    if name == "glyphs":

        def build_glyphs() -> tuple[dict[str, SplitSamples], int]:
            made = glyphs.make_glyphs(max_classes_per_split=max_per_split)
            return glyphs.split_samples(made), len(made.characters) * len(made.faces)

        return glyphs.source(max_classes_per_split=max_per_split), build_glyphs

    if name == "glyph-faces":

        def build_faces() -> tuple[dict[str, SplitSamples], int]:
            made = glyph_faces.make_glyph_faces(max_classes=max_per_split)
            return glyph_faces.split_samples(made), glyph_faces.num_samples(made)

        return glyph_faces.source(max_classes=max_per_split), build_faces

    modules = stdlib_code.make_stdlib(max_modules_per_split=max_per_split)

    def build_stdlib() -> tuple[dict[str, SplitSamples], int]:
        return stdlib_code.split_samples(modules), sum(map(len, modules.values()))

    return stdlib_code.source(modules, max_modules_per_split=max_per_split), build_stdlib


def _is_complete(index: Index) -> bool:
    try:
        verify_sizes(index)
    except StreamError:
        return False
    return True


def _summary(index: Index, *, created: bool, start: float) -> MadeDataset:
    return MadeDataset(
        index=index,
        created=created,
        num_samples={name: split.num_samples for name, split in index.splits.items()},
        num_classes={name: len(split.classes) for name, split in index.splits.items() if split.classes},
        num_bytes=sum(shard.num_bytes for shard in index.shards),
        seconds=time.perf_counter() - start,
    )
