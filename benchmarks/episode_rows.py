"""One row of `episodes.py`, in a process of its own, which calls `main`.

Its argument is a `Request` as JSON. For every line of standard input the process makes one pass over the data
and answers with a `Pass` as JSON on a line. It ends with its input. Libraries are imported inside functions:
the interpreter of a row has those of its contender, and need not have the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

Workload = Literal["in order", "at random", "decoded", "episodes"]
Batches = Generator[tuple[float, float], None, None]  # (samples, bytes of their members) of each batch

CHUNK_BYTES = 1 << 20
BATCH_SIZE = 64
NUM_EPISODE_SAMPLES = 100  # 5-way, 5-shot, 15 queries
IMAGE_SIZE = 84


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        url: of the shards: a folder, or s3://bucket/prefix.
        extension: of the member that counts.
        member_bytes: mean size of that member.
        file_bytes: of all shards.
        mds: a folder, or an S3 prefix, with the same samples in the format of mosaicml-streaming.
        folder: an empty folder for what the contender keeps on disk.
        limit_s: a pass ends after so long, or with the data.
    """

    contender: str
    workload: Workload
    url: str
    extension: str
    shards: Sequence[str]
    num_samples: int
    member_bytes: float
    file_bytes: int
    mds: str
    folder: str
    num_workers: int
    limit_s: float


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass has read. Workers have started when the clock does, with a first batch."""

    num_samples: float
    num_bytes: float
    wall_s: float
    cpu_s: float


def main() -> None:
    """Serves one request."""
    answers = _claim_standard_output()
    request = Request(**json.loads(sys.argv[1]))
    start = CONTENDERS[request.contender](request)
    for _ in sys.stdin:
        found = timed(start(), request.limit_s, has_workers=request.num_workers > 0)
        print(json.dumps(dataclasses.asdict(found)), file=answers, flush=True)


def _claim_standard_output() -> TextIO:
    """A stream to the old standard output; whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def timed(batches: Batches, limit_s: float, *, has_workers: bool) -> Pass:
    """The rate of a pass, which ends behind the batch that exceeds its time."""
    if has_workers:
        next(batches)
    num_samples = num_bytes = 0.0
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for samples, read_bytes in batches:
        num_samples += samples
        num_bytes += read_bytes
        if time.perf_counter() - wall_s > limit_s:
            break
    found = Pass(num_samples, num_bytes, time.perf_counter() - wall_s, time.process_time() - cpu_s)
    batches.close()
    return found


def decode(extension: str, payload: bytes | memoryview) -> NDArray[Any]:
    """What the others decode with: Pillow, as its documentation has it, or numpy."""
    if extension == "npy":
        array: NDArray[Any] = np.load(io.BytesIO(payload), allow_pickle=False)
        return array
    from PIL import Image

    with Image.open(io.BytesIO(payload)) as image:
        return np.asarray(image.convert("RGB"))


def _is_decoded(request: Request) -> bool:
    return request.workload in ("decoded", "episodes")


def cat(request: Request) -> Callable[[], Batches]:
    """The files, in pieces of 1 MiB, without a look into them."""

    def batches() -> Batches:
        for shard in request.shards:
            with open(f"{request.url}/{shard}", "rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield _samples_in(chunk, request)

    return batches


def boto3_get(request: Request) -> Callable[[], Batches]:
    """The files of a bucket, one request each, without a look into them."""
    import boto3

    client = boto3.client("s3")
    bucket, prefix = request.url.removeprefix("s3://").split("/", 1)

    def batches() -> Batches:
        for shard in request.shards:
            body = client.get_object(Bucket=bucket, Key=f"{prefix}/{shard}")["Body"]
            while chunk := body.read(CHUNK_BYTES):
                yield _samples_in(chunk, request)

    return batches


def _samples_in(chunk: bytes, request: Request) -> tuple[float, float]:
    """What so many bytes of shards hold on average; of bytes, those of members."""
    num_samples = len(chunk) * request.num_samples / request.file_bytes
    return num_samples, num_samples * request.member_bytes


def python_tarfile(request: Request) -> Callable[[], Batches]:
    """The standard library's. At random, all members have been listed before."""
    paths = [f"{request.url}/{shard}" for shard in request.shards]
    if request.workload == "at random":
        tars = [tarfile.open(path) for path in paths]  # noqa: SIM115
        listed = [(tar, m) for tar in tars for m in tar if m.name.endswith(f".{request.extension}")]
        random = np.random.default_rng(0)

        def picked() -> Batches:
            for place in random.permutation(len(listed)).tolist():
                tar, member = listed[place]
                file = tar.extractfile(member)
                assert file is not None
                yield 1, len(file.read())

        return picked

    def batches() -> Batches:
        for path in paths:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    content = file.read()
                    if member.name.endswith(request.extension):
                        yield 1, len(content)

    return batches


def memory(request: Request) -> Callable[[], Batches]:
    """Decoding alone: bytes that lie in memory, in a plain loop."""
    from metaloom.datasets import Index, SampleReader

    count = min(request.num_samples, 4000)
    with contextlib.closing(Index.load(request.url)) as index:
        reader = SampleReader(index, "train", Undecoded(), memory_bytes=0)
        payloads = [sample[request.extension].tobytes() for sample in _whole(reader.read(range(count)))]

    def batches() -> Batches:
        for payload in itertools.cycle(payloads):
            decode(request.extension, payload)
            yield 1, len(payload)

    return batches


def webdataset(request: Request) -> Callable[[], Batches]:
    """Plain webdataset; with workers, batches of a torch DataLoader."""
    import webdataset as wds
    from torch.utils.data import DataLoader
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = open_s3  # it has no way to S3 but a command's output

    def batches() -> Batches:
        urls = [f"{request.url}/{shard}" for shard in request.shards]
        data = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        data = data.map(OfWebdataset(request.extension, _is_decoded(request)))
        if not request.num_workers:
            for _ in data:
                yield 1, round(request.member_bytes)
            return
        data = data.batched(BATCH_SIZE, collation_fn=side_by_side if _is_decoded(request) else list)
        for batch in DataLoader(data, batch_size=None, num_workers=request.num_workers):
            yield len(batch), round(len(batch) * request.member_bytes)

    return batches


def streaming(request: Request) -> Callable[[], Batches]:
    """mosaicml-streaming, from its own format; with workers, batches of a torch DataLoader."""
    from streaming import StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    is_remote = request.mds.startswith("s3://")
    prepared = OfStreaming(request.extension, _is_decoded(request))
    numbers = itertools.count()

    def open_data() -> Any:
        # Files that were fetched are kept, so every pass over a bucket has a folder of its own.
        local = f"{request.folder}/{next(numbers)}" if is_remote else request.mds
        remote = request.mds if is_remote else None
        return StreamingDataset(
            local=local, remote=remote, shuffle=False, batch_size=BATCH_SIZE, num_canonical_nodes=1
        )

    shared = None if is_remote else open_data()

    def batches() -> Batches:
        data = open_data() if shared is None else shared
        if request.num_workers:
            loader = DataLoader(
                data, batch_size=BATCH_SIZE, num_workers=request.num_workers, collate_fn=prepared.batch
            )
            for batch in loader:
                yield len(batch), round(len(batch) * request.member_bytes)
            return
        order = np.random.default_rng(0).permutation(request.num_samples).tolist()
        is_random = request.workload == "at random"
        for sample in (data[number] for number in order) if is_random else data:
            prepared(sample)
            yield 1, round(request.member_bytes)

    return batches


def metaloom(request: Request) -> Callable[[], Batches]:
    """metaloom, without a cache on disk."""
    return _metaloom(request, cache_folder=None)


def metaloom_cached(request: Request) -> Callable[[], Batches]:
    """metaloom, with all that is read in its cache on disk before."""
    start = _metaloom(dataclasses.replace(request, workload="in order"), cache_folder=request.folder)
    for _ in start():
        pass
    return _metaloom(request, cache_folder=request.folder)


def _metaloom(request: Request, *, cache_folder: str | None) -> Callable[[], Batches]:
    from metaloom.datasets import (
        ArrayInputs,
        ClassEpisodes,
        ImageInputs,
        Index,
        SampleReader,
        StorageSettings,
        Ways,
        drawn_ahead,
    )
    from metaloom.datasets.class_episodes import InputsOnly

    index = Index.load(request.url, StorageSettings(cache_folder=cache_folder))
    shape = (32, 1016)
    inputs = ArrayInputs(shape) if request.extension == "npy" else ImageInputs(IMAGE_SIZE, 3)
    # Nothing decoded is kept, so that nothing is read that had been decoded before.
    raw = SampleReader(index, "train", Undecoded(), memory_bytes=0)
    decoded = SampleReader(index, "train", InputsOnly(inputs), memory_bytes=0)
    random = np.random.default_rng(0)
    episodes = itertools.count()
    draw: Callable[[Any], tuple[Any, int, int]]
    if request.workload == "episodes":
        source = ClassEpisodes(index, "train", ways=Ways(5, 5, 15), seed=0, inputs=inputs)
        source._reader = decoded
        draw = DrawEpisode(source, request.member_bytes)
    else:
        draw = DrawSamples(decoded if _is_decoded(request) else raw, inputs, request.member_bytes)

    def arguments() -> Iterable[Any]:
        if request.workload == "episodes":
            return episodes
        order = np.arange(request.num_samples)
        if request.workload == "at random":
            order = random.permutation(request.num_samples)
        return (order[at : at + BATCH_SIZE].tolist() for at in range(0, len(order), BATCH_SIZE))

    def batches() -> Batches:
        if not request.num_workers:
            for _, num_samples, num_bytes in map(draw, arguments()):
                yield num_samples, num_bytes
            return
        with drawn_ahead(
            draw, arguments(), read_ahead=4 * request.num_workers, num_workers=request.num_workers
        ) as ahead:
            for _, num_samples, num_bytes in ahead:
                yield num_samples, num_bytes

    return batches


class Undecoded:
    """A sample's members as bytes."""

    def __call__(self, members: Any) -> dict[str, NDArray[np.uint8]]:
        return {extension: np.frombuffer(payload, np.uint8) for extension, payload in members.items()}


class DrawSamples:
    """(samples, how many, bytes of their members) by their numbers; decoded ones as a batch."""

    def __init__(self, reader: Any, inputs: Any, member_bytes: float) -> None:
        self._reader, self._inputs, self._member_bytes = reader, inputs, member_bytes

    def __call__(self, numbers: list[int]) -> tuple[Any, int, int]:
        samples = _whole(self._reader.read(numbers))
        if "inputs" in samples[0]:
            batch = self._inputs.batch([sample["inputs"] for sample in samples])
            return batch, len(numbers), round(len(numbers) * self._member_bytes)
        return samples, len(numbers), round(len(numbers) * self._member_bytes)


class DrawEpisode:
    """(episode, how many samples it has, bytes of their members) by its number."""

    def __init__(self, source: Any, member_bytes: float) -> None:
        self._source, self._member_bytes = source, member_bytes

    def __call__(self, number: int) -> tuple[Any, int, int]:
        count = NUM_EPISODE_SAMPLES
        return self._source.episode(number), count, round(count * self._member_bytes)


class OfWebdataset:
    """The member that counts of a sample as webdataset gives it, decoded or not."""

    def __init__(self, extension: str, is_decoded: bool) -> None:
        self._extension, self._is_decoded = extension, is_decoded

    def __call__(self, sample: dict[str, Any]) -> Any:
        payload = sample[self._extension]
        return decode(self._extension, payload) if self._is_decoded else payload


class OfStreaming(OfWebdataset):
    """The same of mosaicml-streaming, and of several as a batch."""

    def batch(self, samples: list[dict[str, Any]]) -> Any:
        payloads = [self(sample) for sample in samples]
        return side_by_side(payloads) if self._is_decoded else payloads


def side_by_side(arrays: Sequence[NDArray[Any]]) -> Any:
    """A batch as torch's loader sends it: a tensor."""
    import torch

    return torch.from_numpy(np.stack(arrays))


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    """What webdataset is given to open s3:// with: fsspec, in its default way."""
    import fsspec

    return fsspec.open(url, mode).open()


def _whole(samples: Sequence[Any]) -> list[Any]:
    broken = [sample for sample in samples if not isinstance(sample, dict)]
    if broken:
        raise RuntimeError(f"the data just made are damaged: {broken[0]}")
    return list(samples)


CONTENDERS: dict[str, Callable[[Request], Callable[[], Batches]]] = {
    "cat": cat,
    "boto3": boto3_get,
    "tarfile": python_tarfile,
    "memory": memory,
    "webdataset": webdataset,
    "mosaicml-streaming": streaming,
    "metaloom": metaloom,
    "metaloom, cached": metaloom_cached,
}
