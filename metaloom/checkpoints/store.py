"""A folder of checkpoints.

    <root>/step-00000100/
        __0_0.distcp, .metadata    tensors, in torch.distributed.checkpoint's format
        manifest.json              written last and atomically; without it there is no checkpoint

The manifest holds the format version, the step, everything that is not a tensor (`scalars`), the
name, shape and dtype of every tensor, the size and SHA-256 of every other file, and its own SHA-256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from metaloom.errors import CheckpointError
from metaloom.files import replace_file, sync_folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


Room = Callable[[str, torch.Size, torch.dtype], Tensor]


def whole_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for all of a tensor."""
    return torch.empty(shape, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: outer steps done.
        tensors: by flat name.
        scalars: plain JSON values by name.
    """

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }


class CheckpointStore:
    """Saves, finds, loads and prunes the checkpoints under one folder.

    Args:
        root: the folder; made on the first save.
        keep_last: how many of the newest to keep; protected steps are kept besides.
        room: `(name, shape, dtype)` to a tensor that a tensor of a checkpoint is read into: a `DTensor` of
            that shape where a rank shall read a part of it alone.
    """

    def __init__(self, root: Path, *, keep_last: int = 2, room: Room = whole_tensor) -> None:
        self.root = root
        self._keep_last = keep_last
        self._room = room

    def save(self, checkpoint: Checkpoint, *, protect: frozenset[int] = frozenset()) -> Path:
        """Writes a checkpoint and prunes old ones. Every rank must call, with the same tensors, or with its
        shards of them (`DTensor`).

        Args:
            protect: steps that are not pruned (the best one, say).

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the folder cannot be written; the cause is named.
        """
        folder = self._folder(checkpoint.step)
        rank = dist.get_rank() if dist.is_initialized() else 0
        try:
            if rank == 0:
                # Left by a run that was killed while it wrote: without a manifest it is nothing.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            _barrier()
            with _one_process_is_intended():
                save(
                    dict(checkpoint.tensors),
                    storage_writer=FileSystemWriter(folder),
                    no_dist=not dist.is_initialized(),
                )
            if rank == 0:
                self._commit(folder, checkpoint)
                self._prune(protect | {checkpoint.step})
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{folder}: the checkpoint cannot be written: {_cause(error)}.") from error
        _barrier()
        return folder

    def clear(self) -> None:
        """Deletes all checkpoints. Every rank must call."""
        _barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(self.root, ignore_errors=True)
        _barrier()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, in rising order."""
        names = (path.parent.name.removeprefix("step-") for path in self.root.glob(f"step-*/{MANIFEST}"))
        return sorted(int(name) for name in names if name.isdecimal())

    def newest_folder(self) -> Path | None:
        """The folder of the newest checkpoint that is complete; None where there is none."""
        steps = self.steps()
        return self._folder(steps[-1]) if steps else None

    def load_newest(self, on_skip: Callable[[str], None]) -> Checkpoint | None:
        """The newest valid checkpoint, or None where there is none; the same one on every rank.

        Every rank must call: rank 0 chooses, since ranks that see a shared folder differently would go on
        from different steps.

        Args:
            on_skip: called on rank 0 with one line for each checkpoint that was passed over.

        Raises:
            CheckpointError: another rank than 0 cannot load what rank 0 could.
        """
        chosen: Checkpoint | None = None
        is_distributed = dist.is_initialized() and dist.get_world_size() > 1
        if not is_distributed or dist.get_rank() == 0:
            for step in reversed(self.steps()):
                try:
                    chosen = self.load(step)
                    break
                except CheckpointError as error:
                    on_skip(f"skipped a checkpoint: {error}")
        if not is_distributed:
            return chosen
        step_of_rank_0 = [None if chosen is None else chosen.step]
        dist.broadcast_object_list(step_of_rank_0, src=0)
        if dist.get_rank() == 0 or step_of_rank_0[0] is None:
            return chosen
        return self.load(step_of_rank_0[0])

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of one step.

        Raises:
            CheckpointError: it is missing, incomplete, of another format version, or its bytes are
                not those that were written.
        """
        folder = self._folder(step)
        manifest = read_manifest(folder)
        for name, recorded in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, though the manifest lists it.")
            try:
                size, digest = path.stat().st_size, _sha256(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {_cause(error)}.") from error
            if size != recorded["bytes"]:
                raise CheckpointError(f"{path} has {size} bytes, the manifest says {recorded['bytes']}.")
            if digest != recorded["sha256"]:
                raise CheckpointError(f"{path}: the bytes are not those that were written (SHA-256 differs).")
        tensors = {
            name: self._room(name, torch.Size(entry["shape"]), getattr(torch, entry["dtype"]))
            for name, entry in manifest["tensors"].items()
        }
        try:
            with _one_process_is_intended():
                load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{folder}: the tensors cannot be read: {_cause(error)}.") from error
        return Checkpoint(step, tensors, manifest["scalars"])

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _commit(self, folder: Path, checkpoint: Checkpoint) -> None:
        manifest = {
            "format": "metaloom-checkpoint",
            "version": FORMAT_VERSION,
            "step": checkpoint.step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "scalars": checkpoint.scalars,
            "tensors": {
                name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
                for name, value in checkpoint.tensors.items()
            },
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(folder.iterdir())
            },
        }
        content = manifest | {"sha256": _manifest_sha256(manifest)}
        replace_file(folder / MANIFEST, json.dumps(content, indent=1))
        sync_folder(self.root)  # before older ones go

    def _prune(self, protect: frozenset[int]) -> None:
        for step in self.steps()[: -self._keep_last]:
            if step not in protect:
                folder = self._folder(step)
                # The manifest goes first: what is half deleted is not taken for a checkpoint.
                (folder / MANIFEST).unlink()
                shutil.rmtree(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint folder.

    Raises:
        CheckpointError: it is missing, not JSON, of a format version that is not known here, or not
            what was written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no complete checkpoint ({MANIFEST} is missing).") from None
    except (OSError, ValueError) as error:  # a broken file may be neither UTF-8 nor JSON
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} cannot be read: it is no JSON object.")
    if manifest.get("format") != "metaloom-checkpoint" or manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r} is not known; "
            f"this release reads version {FORMAT_VERSION}."
        )
    recorded = manifest.pop("sha256", None)
    if recorded != _manifest_sha256(manifest):
        raise CheckpointError(f"{path}: the contents are not those that were written (SHA-256 differs).")
    return manifest


def require_same_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: Path
) -> None:
    """Checks that a checkpoint belongs to this model.

    Raises:
        CheckpointError: names or shapes differ; all differences are listed at once.
    """
    problems = [f"  {name}: in the model, not in the checkpoint" for name in expected if name not in found]
    problems += [f"  {name}: in the checkpoint, not in the model" for name in found if name not in expected]
    problems += [
        f"  {name}: shape {list(found[name].shape)} in the checkpoint, {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(
            f"{source} belongs to another model ({len(problems)} differences):\n" + "\n".join(problems)
        )


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    # As it reads back from JSON, where keys are text: they must sort alike before and after.
    canonical = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cause(error: OSError | CheckpointException) -> str:
    """What went wrong, in a line. Torch wraps the ranks' faults in an exception that is no `Exception`,
    and prints it with their tracebacks."""
    if isinstance(error, OSError):
        return str(error)
    return "; ".join(f"rank {rank}: {fault}" for rank, (fault, _) in sorted(error.failures.items()))


@contextlib.contextmanager
def _one_process_is_intended() -> Iterator[None]:
    """Silences torch's warning that no process group is there: every rank reads whole checkpoints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
