"""What `episodes.py` reads: shards of arrays and of images, made from a seed."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from metaloom.datasets import Sample, SplitSamples, write_shards

IMAGE_SIZE = 84
ARRAY_SHAPE = (32, 1016)  # float32: with its header 127 KiB, with what tar adds 128 KiB
NUM_PER_CLASS = 100
_KINDS = {"png": "PNG", "jpg": "JPEG"}
SHARD_BYTES = {"npy": 64 << 20, "png": 16 << 20, "jpg": 8 << 20}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Shards of one split, `train`, in classes of 100 samples, each with `cls` and one other member.

    Attributes:
        extension: of that member.
        shards: names of the tar files, in the order of the samples.
        num_bytes: of the members themselves, without what tar adds.
    """

    folder: str
    extension: str
    shards: tuple[str, ...]
    num_samples: int
    num_bytes: int


def make(folder: Path, extension: str, num_samples: int) -> DataSet:
    """Writes a set to a new folder.

    Args:
        extension: `npy` for float32 of 127 KiB; `png` or `jpg` for 84 x 84 colour pictures with a little
            noise.
        num_samples: a multiple of 100.
    """
    folder.mkdir(parents=True)
    num_bytes = 0

    def samples() -> Iterator[Sample]:
        nonlocal num_bytes
        rng = np.random.default_rng(0)
        for number in range(num_samples):
            payload = _array(rng) if extension == "npy" else _picture(rng, _KINDS[extension])
            num_bytes += len(payload)
            row = number // NUM_PER_CLASS
            members = {extension: payload, "cls": str(row).encode()}
            yield Sample(f"{row:05d}/{number:08d}", members, {"class": row})

    classes = [f"class {row}" for row in range(num_samples // NUM_PER_CLASS)]
    index = write_shards(
        folder,
        {"train": SplitSamples(samples(), classes=classes)},
        dataset=f"benchmark-{extension}",
        layout="classes",
        source={},
        shard_limit_bytes=SHARD_BYTES[extension],
    )
    index.close()
    return DataSet(str(folder), extension, tuple(s.name for s in index.shards), num_samples, num_bytes)


def _array(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    np.save(file, rng.random(ARRAY_SHAPE, np.float32))
    return file.getvalue()


def _picture(rng: np.random.Generator, kind: str) -> bytes:
    """Soft patches of colour and faint noise: about as hard to compress as a photograph."""
    patches = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
    soft = np.asarray(patches.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), np.int16)
    noisy = soft + rng.integers(-4, 5, soft.shape, np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()
