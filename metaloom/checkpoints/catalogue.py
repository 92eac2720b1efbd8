"""The checkpoints under one path or URL: listed, verified, pruned. Without torch.

<root>/step-00000100/
    1f0c9a27-00000.safetensors      the tensors that rank 0 wrote; of 1f0c9a27, this attempt at writing it
    manifest.json                   written last, at once; without it there is no checkpoint
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from metaloom.checkpoints.folder import Folder, MissingFileError
from metaloom.checkpoints.manifest import MANIFEST, Chunk, DamagedError, Manifest, parse_manifest
from metaloom.checkpoints.retention import Retention

_FOLDER = re.compile(r"step-(\d{8,})/(.+)")


@dataclasses.dataclass(frozen=True)
class Listing:
    """What lies in the folder of one step: sizes in bytes by the names of files."""

    step: int
    sizes: Mapping[str, int]

    @property
    def is_committed(self) -> bool:
        """Whether there is a manifest; what has none is what a killed run left, or is being written."""
        return MANIFEST in self.sizes


class Catalogue:
    """The checkpoints under a path or URL."""

    def __init__(self, root: str | Path | Folder) -> None:
        self.folder = root if isinstance(root, Folder) else Folder(root)

    def listings(self) -> list[Listing]:
        """What there is, in rising order of steps.

        Raises:
            CheckpointError: the folder cannot be listed.
        """
        found: dict[int, dict[str, int]] = {}
        for name, size in self.folder.sizes().items():
            match = _FOLDER.fullmatch(name)
            if match is not None:
                found.setdefault(int(match[1]), {})[match[2]] = size
        return [Listing(step, found[step]) for step in sorted(found)]

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were committed, in rising order."""
        return [listing.step for listing in self.listings() if listing.is_committed]

    def manifest(self, step: int) -> Manifest:
        """What the checkpoint of a step says of itself.

        Raises:
            MissingFileError: there is none.
            DamagedError: it is not what was written.
            CheckpointError: it cannot be read.
        """
        name = f"{step_folder(step)}/{MANIFEST}"
        try:
            content = self.folder.read(name)
        except MissingFileError:
            where = f"{self.folder.shown}/{step_folder(step)}"
            raise MissingFileError(f"{where} holds no complete checkpoint ({MANIFEST} is missing).") from None
        manifest = parse_manifest(content, source=f"{self.folder.shown}/{name}")
        if manifest.step != step:
            raise DamagedError(f"{self.folder.shown}/{name} is of step {manifest.step}.")
        return manifest

    def require_sizes(self, manifest: Manifest, sizes: Mapping[str, int] | None = None) -> None:
        """Checks that the files are there and as long as the manifest says: no byte of them is read.

        Args:
            sizes: by name, where the folder was listed before.

        Raises:
            DamagedError: they are not.
            CheckpointError: the folder cannot be listed.
        """
        where = f"{self.folder.shown}/{step_folder(manifest.step)}"
        if sizes is None:
            listed = {listing.step: listing.sizes for listing in self.listings()}
            sizes = listed.get(manifest.step, {})
        for name, file in manifest.files.items():
            if name not in sizes:
                raise DamagedError(f"{where}/{name} is missing, though the manifest lists it.")
            if sizes[name] != file.num_bytes:
                raise DamagedError(
                    f"{where}/{name} has {sizes[name]} bytes, the manifest says {file.num_bytes}."
                )

    def read_chunk(self, step: int, chunk: Chunk) -> bytes:
        """The bytes of a chunk, which are those that were written.

        Raises:
            DamagedError: they are not, or the file is not there.
            CheckpointError: they cannot be read.
        """
        return self._checked(step, chunk.file, chunk.start, chunk.num_bytes, chunk.sha256)

    def verify(self, step: int) -> Manifest:
        """Reads every byte of a checkpoint and compares it with what was written.

        Raises:
            MissingFileError, DamagedError: there is no checkpoint, or it is not what was written.
            CheckpointError: it cannot be read.
        """
        manifest = self.manifest(step)
        self.require_sizes(manifest)
        for name, file in manifest.files.items():
            self._checked(step, name, 0, file.header_bytes, file.header_sha256)
        for tensor in manifest.tensors.values():
            for chunk in tensor.chunks:
                self.read_chunk(step, chunk)
        return manifest

    def remove(self, step: int) -> None:
        """Deletes the checkpoint of a step. The manifest goes first: what is half deleted is none.

        Raises:
            CheckpointError: something cannot be deleted.
        """
        folder = step_folder(step)
        self.folder.remove([f"{folder}/{MANIFEST}"])
        self.folder.remove_folder(folder)

    def prune(
        self,
        retention: Retention,
        *,
        keep: frozenset[int] = frozenset(),
        is_valid: Callable[[int], bool] = lambda step: True,
        is_dry: bool = False,
    ) -> list[int]:
        """Deletes the checkpoints that no rule keeps; returns their steps. One whose manifest is damaged is
        left where it is.

        The newest valid checkpoint, from which a run goes on, stays whatever the rules say.

        Args:
            keep: steps that stay besides.
            is_valid: whether the checkpoint of a step is known to be valid, or found to be so.
            is_dry: whether nothing is deleted after all.

        Raises:
            CheckpointError: the folder cannot be listed, or a checkpoint not be deleted.
        """
        metrics: dict[int, Mapping[str, float]] = {}
        for step in self.steps():
            try:
                metrics[step] = self.manifest(step).metrics
            except (MissingFileError, DamagedError):
                continue
        kept = retention.kept(metrics) | (keep & metrics.keys())
        # An older one that a rule keeps does not stand in for it: what came since would be lost.
        kept |= set(itertools.islice(filter(is_valid, sorted(metrics, reverse=True)), 1))
        removed = [step for step in sorted(metrics) if step not in kept]
        for step in () if is_dry else removed:
            self.remove(step)
        return removed

    def remove_remains(self) -> None:
        """Deletes what has no manifest: what writing that was broken off has left. For whoever alone writes
        here, and writes nothing at the moment.

        Raises:
            CheckpointError: something cannot be deleted.
        """
        for listing in self.listings():
            if not listing.is_committed:
                self.folder.remove_folder(step_folder(listing.step))

    def _checked(self, step: int, file: str, start: int, num_bytes: int, sha256: str) -> bytes:
        if num_bytes == 0:
            return b""  # storages refuse to read nothing
        where = f"{self.folder.shown}/{step_folder(step)}/{file}"
        try:
            content = self.folder.read(f"{step_folder(step)}/{file}", start, start + num_bytes)
        except MissingFileError:
            raise DamagedError(f"{where} is missing, though the manifest lists it.") from None
        if len(content) != num_bytes or hashlib.sha256(content).hexdigest() != sha256:
            raise DamagedError(f"{where}: the bytes are not those that were written (SHA-256 differs).")
        return content


def step_folder(step: int) -> str:
    """The name of the folder of one step's checkpoint."""
    return f"step-{step:08d}"
