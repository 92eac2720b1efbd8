"""What a checkpoint's manifest says: the file that is written last, without which there is no checkpoint.

    format, version     of this text
    step, time          outer steps done; when it was written, in UTC, for people
    metrics             numbers measured at that step, by name: what the best checkpoint is chosen by
    scalars             everything of a run's state that is not a tensor
    tensors             by name: dtype, shape, and the chunks that it is made of
        file, start, bytes, sha256      where a chunk lies, and its digest
        offsets, sizes                  which part of the tensor it is
    files               by name: bytes; header_bytes and header_sha256, of what comes before the chunks
    sha256              of all that

A file is in the safetensors format: its header names the chunks, which follow each other without gaps, so
that the digests cover every byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from metaloom.errors import CheckpointError

FORMAT = "metaloom-checkpoint"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: no later attempt can read it."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where it lies.

    Attributes:
        file: name of the file in the checkpoint's folder.
        start: where its bytes begin in the file.
        num_bytes: how many they are.
        sha256: their digest, in hexadecimal.
        offsets: where the part begins in the tensor, by dim.
        sizes: its shape.
    """

    file: str
    start: int
    num_bytes: int
    sha256: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: as torch names it: `float32`.
        shape: of the whole.
        chunks: its parts, which do not overlap.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint: its size, and that and the digest of what comes before its chunks."""

    num_bytes: int
    header_bytes: int
    header_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that a checkpoint says of itself; see the head of this module.

    Attributes:
        written: when, in UTC; empty for now.
    """

    step: int
    metrics: Mapping[str, float]
    scalars: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    written: str = ""

    @property
    def num_bytes(self) -> int:
        """Of all files that it lists."""
        return sum(file.num_bytes for file in self.files.values())

    def to_bytes(self) -> bytes:
        """The manifest as it is written."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "step": self.step,
            "time": self.written or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": dict(self.metrics),
            "scalars": dict(self.scalars),
            "tensors": {
                name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "chunks": [
                        {
                            "file": chunk.file,
                            "start": chunk.start,
                            "bytes": chunk.num_bytes,
                            "sha256": chunk.sha256,
                            "offsets": chunk.offsets,
                            "sizes": chunk.sizes,
                        }
                        for chunk in tensor.chunks
                    ],
                }
                for name, tensor in self.tensors.items()
            },
            "files": {
                name: {
                    "bytes": file.num_bytes,
                    "header_bytes": file.header_bytes,
                    "header_sha256": file.header_sha256,
                }
                for name, file in self.files.items()
            },
        }
        return json.dumps(content | {"sha256": _digest(content)}).encode()


def parse_manifest(content: bytes, *, source: str) -> Manifest:
    """What was written by `Manifest.to_bytes`.

    Args:
        source: where it comes from, for messages.

    Raises:
        DamagedError: it is not JSON, not what was written, or of a format version that is not known here.
    """
    try:
        values = json.loads(content.decode())
    except ValueError as error:  # a broken file may be neither UTF-8 nor JSON
        raise DamagedError(f"{source} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{source} cannot be read: it is no JSON object.")
    if values.get("format") != FORMAT or values.get("version") != FORMAT_VERSION:
        raise DamagedError(
            f"{source}: format {values.get('format')!r} version {values.get('version')!r} is not known; "
            f"this release reads version {FORMAT_VERSION}."
        )
    if values.pop("sha256", None) != _digest(values):
        raise DamagedError(f"{source}: the contents are not those that were written (SHA-256 differs).")
    for entry in values["tensors"].values():
        for chunk in entry["chunks"]:
            if chunk["file"] not in values["files"] or "/" in chunk["file"]:
                raise DamagedError(f"{source}: {chunk['file']!r} is not one of the files that it lists.")
    return Manifest(
        step=values["step"],
        metrics=values["metrics"],
        scalars=values["scalars"],
        tensors={
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                tuple(
                    Chunk(
                        chunk["file"],
                        chunk["start"],
                        chunk["bytes"],
                        chunk["sha256"],
                        tuple(chunk["offsets"]),
                        tuple(chunk["sizes"]),
                    )
                    for chunk in entry["chunks"]
                ),
            )
            for name, entry in values["tensors"].items()
        },
        files={
            name: StoredFile(entry["bytes"], entry["header_bytes"], entry["header_sha256"])
            for name, entry in values["files"].items()
        },
        written=values["time"],
    )


def _digest(content: Mapping[str, Any]) -> str:
    # As it reads back from JSON, where keys are text and tuples lists: they must sort alike before and after.
    canonical = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
