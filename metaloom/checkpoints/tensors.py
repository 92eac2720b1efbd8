"""Tensors of a checkpoint by torch.distributed.checkpoint: which rank writes and reads which parts is for its
planners to say; here is how parts lie in files and in the manifest.

torch's own format keeps that in a pickle, which runs whatever code was put into it when it is read. Here it
is JSON, and the files are in the safetensors format (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from metaloom.checkpoints.catalogue import Catalogue, step_folder
from metaloom.checkpoints.folder import Folder, Sink
from metaloom.checkpoints.manifest import Chunk, Manifest, StoredFile, StoredTensor

# Of torch's types, by the names that torch has for them: the names of the safetensors format.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint: a file on each rank that has something to write, then, on rank 0, the manifest.

    The files' names are such as no other attempt has: one that was broken off, or goes on without knowing
    that it was given up, has no part in this one.

    Args:
        commit: called on rank 0 with the tensors and files when all ranks have written theirs; writes the
            manifest.

    Attributes:
        attempt: what the names of this attempt's files begin with, on rank 0; empty before there are any.
    """

    def __init__(
        self,
        folder: Folder,
        step: int,
        commit: Callable[[dict[str, StoredTensor], dict[str, StoredFile]], None],
    ) -> None:
        self._folder = folder
        self._step = step
        self._commit = commit
        self.attempt = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.attempt = attempt = secrets.token_hex(4)
        return [
            dataclasses.replace(plan, storage_data=f"{attempt}-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        if not plan.items:
            written.set_result([])
            return written
        name: str = plan.storage_data
        parts = [_as_part(planner, item) for item in plan.items]
        header = _header(plan.items, parts)
        file = StoredFile(
            len(header) + sum(part.nbytes for part in parts), len(header), hashlib.sha256(header).hexdigest()
        )

        def fill(sink: Sink) -> list[WriteResult]:
            sink.write(header)
            start = len(header)
            results = []
            for item, part in zip(plan.items, parts, strict=True):
                content = memoryview(b"")
                if part.nbytes:
                    content = part.reshape(-1).view(torch.uint8).numpy().data
                sha256 = hashlib.sha256(content).hexdigest()
                sink.write(content)
                sizes = tuple(part.shape)
                assert item.tensor_data is not None, "a state has tensors alone"
                offsets = tuple(item.tensor_data.chunk.offsets)
                chunk = Chunk(name, start, part.nbytes, sha256, offsets, sizes)
                results.append(WriteResult(item.index, part.nbytes, (chunk, file)))
                start += part.nbytes
            return results

        written.set_result(self._folder.write_stream(f"{step_folder(self._step)}/{name}", fill))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = {}
        files: dict[str, StoredFile] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunk, file = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(chunk)
            files[chunk.file] = file
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "a state has tensors alone"
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor(dtype, tuple(entry.size), tuple(chunks[name]))
        self._commit(tensors, files)


class CheckpointReader(StorageReader):
    """Reads parts of the tensors of one checkpoint; each chunk that it needs is read as a whole, and is what
    was written."""

    def __init__(self, catalogue: Catalogue, manifest: Manifest) -> None:
        self._catalogue = catalogue
        self._manifest = manifest
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        for name, tensor in self._manifest.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in tensor.chunks
            ]
            properties = TensorProperties(dtype=dtype_of(tensor))
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for index, chunk in enumerate(tensor.chunks):
                self._chunks[MetadataIndex(name, torch.Size(chunk.offsets), index)] = chunk
        return Metadata(entries)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            content = bytearray(self._catalogue.read_chunk(self._manifest.step, chunk))
            dtype = dtype_of(self._manifest.tensors[item.storage_index.fqn])
            part = torch.empty(chunk.sizes, dtype=dtype)
            if content:
                part = torch.frombuffer(content, dtype=dtype).reshape(chunk.sizes)
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    """torch's type of a stored tensor's elements."""
    assert tensor.dtype in _DTYPES, "of a manifest that this package wrote"
    found: torch.dtype = getattr(torch, tensor.dtype)
    return found


def _as_part(planner: SavePlanner, item: WriteItem) -> Tensor:
    part = planner.resolve_data(item)
    assert isinstance(part, Tensor), "a state has tensors alone"
    return part.detach().cpu().contiguous()


def _header(items: Sequence[WriteItem], parts: Sequence[Tensor]) -> bytes:
    """What a safetensors file begins with; a part of a tensor has its offsets behind its name."""
    entries: dict[str, Any] = {}
    end = 0
    for item, part in zip(items, parts, strict=True):
        start, end = end, end + part.nbytes
        name = item.index.fqn
        assert item.tensor_data is not None, "a state has tensors alone"
        if tuple(part.shape) != tuple(item.tensor_data.size):
            name += "@" + ",".join(map(str, item.tensor_data.chunk.offsets))
        dtype = _DTYPES[str(part.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    return struct.pack("<Q", len(text)) + text
