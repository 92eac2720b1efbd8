"""Small data sets of every layout, and damage to them. Every sample can be told by its content."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaloom.datasets import Index, Sample, SplitSamples, write_shards

CLASS_SIZES = (3, 4, 5, 6, 8, 9, 12, 20, 7, 6)
GROUP_SIZES = (4, 5, 6, 7, 8, 2, 6, 9, 3, 4)


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=False)
    return stream.getvalue()


def png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def marked(number: int) -> NDArray[np.uint8]:
    """A grey image of 6 x 6 pixels that tells a number below 65536."""
    image = np.full((6, 6), 255, np.uint8)
    image[0, :2] = divmod(number, 256)
    return image


def numbers_of(inputs: NDArray[Any]) -> list[int]:
    """The numbers of images of `marked`, `[N, 6, 6, 1]`, or of arrays whose first element is one."""
    if inputs.ndim == 2:
        return [int(row[0]) for row in inputs]
    return [int(high) * 256 + int(low) for high, low in inputs[:, 0, :2, 0]]


def class_set(
    folder: Path,
    sizes: Sequence[int] = CLASS_SIZES,
    *,
    splits: Sequence[str] = ("train",),
    shard_limit_bytes: int = 16 << 10,
    broken_images: Iterable[int] = (),
) -> Index:
    """Grey png images in classes of these sizes; sample `n` shows the number n.

    Args:
        broken_images: samples whose png is none, although their bytes are those that the index records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, size in enumerate(sizes) for _ in range(size)]
    broken = set(broken_images)

    def samples(split: str) -> list[Sample]:
        return [
            Sample(
                f"{split}/{n:05}",
                {"png": png(marked(n))[: 40 if n in broken else None], "cls": str(row).encode()},
                {"class": row},
            )
            for n, row in enumerate(rows)
        ]

    names = [f"class {row:03}" for row in range(len(sizes))]
    return write_shards(
        folder,
        {split: SplitSamples(samples(split), classes=names) for split in splits},
        dataset="tiny",
        layout="classes",
        source={},
        shard_limit_bytes=shard_limit_bytes,
    )


def group_set(folder: Path, sizes: Sequence[int] = GROUP_SIZES) -> Index:
    """Arrays [n, group] with `cls` n % 3 and `target.npy` [n, -n], in groups of these sizes, interleaved."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, size in enumerate(sizes) for _ in range(size)]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    samples = [
        Sample(
            f"s{n:04}",
            {
                "npy": npy(np.array([n, row], np.float32)),
                "cls": str(n % 3).encode(),
                "target.npy": npy(np.array([n, -n], np.float64)),
            },
            {"group": row},
        )
        for n, row in enumerate(rows)
    ]
    split = SplitSamples(samples, groups=[f"user {row}" for row in range(len(sizes))])
    return write_shards(folder, {"train": split}, dataset="users", layout="groups", source={})


def document_set(folder: Path, sizes: Mapping[str, Sequence[int]], *, tokens: bool = False) -> Index:
    """Documents of these sizes without repetition: a stretch of four bytes or more lies in one place only.

    With `tokens` they are numbers instead, all of them different.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = np.arange(65536, dtype=">u2").tobytes()
    start, splits = 0, {}
    for split, lengths in sizes.items():
        samples = []
        for number, size in enumerate(lengths):
            member = (
                {"tokens.npy": npy(np.arange(start, start + size, dtype=np.uint16))}
                if tokens
                else {"txt": code[start : start + size]}
            )
            samples.append(Sample(f"{split}/{number}", member, {"size": size}))
            start += size
        splits[split] = SplitSamples(samples)
    return write_shards(folder, splits, dataset="mine", layout="documents", source={})


def ready_set(folder: Path, episodes: Sequence[Mapping[str, bytes]], groups: Sequence[str] = ()) -> Index:
    """Ready episodes of these members; with groups, dealt to them in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        Sample(f"e{n:03}", members, {"group": n % len(groups)} if groups else {})
        for n, members in enumerate(episodes)
    ]
    split = SplitSamples(samples, groups=groups)
    return write_shards(folder, {"train": split}, dataset="ready", layout="episodes", source={})


def facts(**values: Any) -> bytes:
    return json.dumps(values).encode()


def damage(
    folder: Path,
    index: Index,
    numbers: Iterable[int],
    split: str = "train",
) -> None:
    """Changes bytes in the middle of samples, in their shards."""
    table = index.split(split)
    for number in numbers:
        path = folder / index.shards[int(table.shard[number])].name
        middle = int(table.offset[number]) + int(table.length[number]) // 2
        with path.open("r+b") as file:
            file.seek(middle)
            content = file.read(8)
            file.seek(middle)
            file.write(bytes(byte ^ 0xFF for byte in content))
