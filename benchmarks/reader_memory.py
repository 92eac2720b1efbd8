"""What the reader keeps in memory while it walks a data set that is larger than that.

    python -m benchmarks.reader_memory FOLDER [--shards 100] [--samples-per-shard 10000]

makes a data set of a million samples and 10.24 GB in a folder (once: its shards are hard links to one file
of 102 MB, with columns of their own), reads every sample once in the order of an epoch, then class episodes,
each in a process of its own, and prints what these took. Linux alone: memory is read from /proc/self/status.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metaloom.datasets import (
    ArrayInputs,
    ClassEpisodes,
    Index,
    Sample,
    SampleReader,
    SplitSamples,
    Ways,
    write_shards,
)
from metaloom.datasets.class_episodes import InputsOnly
from metaloom.datasets.index import INDEX_NAME, ShardEntry
from metaloom.datasets.order import EpochOrder
from metaloom.datasets.reader import MEMORY_BYTES
from metaloom.datasets.shards import SplitColumns, write_index

NUM_FLOATS = 2400  # a sample takes 9728 bytes as npy, and 10,240 in its shard
PER_CLASS = 500
READ_AT_A_TIME = 16
NUM_EPISODES = 4000
WORKLOADS = ("epoch", "episodes")


@dataclass(frozen=True)
class Memory:
    """What a process holds, in bytes: `anonymous` is its own, `mapped` can be read again from files."""

    anonymous: int
    mapped: int

    @classmethod
    def now(cls) -> Memory:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {
            name: int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in lines)
            if "kB" in rest
        }
        return cls(kib["RssAnon"] << 10, (kib["RssFile"] + kib["RssShmem"]) << 10)


def make_set(folder: Path, *, num_shards: int, samples_per_shard: int) -> Index:
    """A class-grouped data set whose shards are one file under many names; what is there is taken."""
    if (folder / INDEX_NAME).exists():
        return Index.load(folder)
    (folder / "one").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def samples() -> Iterator[Sample]:
        for number in range(samples_per_shard):
            stream = io.BytesIO()
            np.save(stream, rng.random(NUM_FLOATS, np.float32), allow_pickle=False)
            yield Sample(f"{number:08}", {"npy": stream.getvalue()}, {"class": 0})

    split = SplitSamples(samples(), classes=["all"])
    one = write_shards(
        folder / "one",
        {"train": split},
        dataset="one",
        layout="classes",
        source={},
        shard_limit_bytes=1 << 40,
    )
    (shard,) = one.shards
    table = one.split("train")
    content = memoryview((folder / "one" / shard.name).read_bytes())
    num_samples = num_shards * samples_per_shard
    columns = SplitColumns(classes=[f"class {row}" for row in range(-(-num_samples // PER_CLASS))])
    shards = []
    for row in range(num_shards):
        name = f"train-{row:05}.tar"
        os.link(folder / "one" / shard.name, folder / name)
        shards.append(ShardEntry(name, shard.num_bytes, shard.sha256, samples_per_shard))
        for place, (offset, length) in enumerate(
            zip(table.offset.tolist(), table.length.tolist(), strict=True)
        ):
            number = row * samples_per_shard + place
            columns.add(
                f"{number:08}",
                shard=row,
                offset=offset,
                length=length,
                crc32=zlib.crc32(content[offset : offset + length]),
                members=["npy"],
                attributes={"class": number // PER_CLASS},
            )
    write_index(folder, shards, {"train": columns}, dataset="synthetic", layout="classes", source={})
    return Index.load(folder)


def walk(folder: Path, workload: str, memory_bytes: int) -> dict[str, float]:
    """Reads in this process; what it held at which time, in bytes, and how much it read.

    Args:
        workload: `epoch`, every sample once; `episodes`, 5-way 1-shot ones with 15 query samples a class.
        memory_bytes: the most that decoded samples may take, of an epoch; episodes have their source's own.
    """
    before = Memory.now()
    index = Index.load(folder)
    table = index.split("train")
    peak = opened = Memory.now()
    begin = time.monotonic()
    decode = InputsOnly(ArrayInputs((NUM_FLOATS,)))

    def epoch() -> int:
        nonlocal peak
        reader = SampleReader(index, "train", decode, memory_bytes=memory_bytes)
        order = EpochOrder(np.asarray(table.length), purpose="walk", seed=0, split="train")
        seen = np.zeros(table.num_samples, bool)
        for start in range(0, table.num_samples, READ_AT_A_TIME):
            stop = min(start + READ_AT_A_TIME, table.num_samples)
            numbers = [order.item(number) for number in range(start, stop)]
            assert all(isinstance(found, dict) for found in reader.read(numbers))
            seen[numbers] = True
            peak = max(peak, Memory.now(), key=lambda memory: memory.anonymous)
        assert seen.all()
        return table.num_samples

    def episodes() -> int:
        nonlocal peak
        source = ClassEpisodes(index, "train", ways=Ways(5, 1, 15), inputs=ArrayInputs((NUM_FLOATS,)), seed=0)
        for number in range(NUM_EPISODES):
            assert not source.episode(number).broken
            peak = max(peak, Memory.now(), key=lambda memory: memory.anonymous)
        return NUM_EPISODES * 80

    works: dict[str, Callable[[], int]] = {"epoch": epoch, "episodes": episodes}
    num_read = works[workload]()
    after = Memory.now()
    return {
        "num_samples": num_read,
        "num_bytes": num_read * int(table.length[0]),
        "seconds": time.monotonic() - begin,
        "before": before.anonymous,
        "opened": opened.anonymous,
        "peak": peak.anonymous,
        "after": after.anonymous,
        "mapped": after.mapped - before.mapped,
    }


def walk_apart(folder: Path, workload: str, memory_bytes: int = MEMORY_BYTES) -> dict[str, float]:
    """`walk` in a new process."""
    words = [sys.executable, "-m", "benchmarks.reader_memory", str(folder), "--walk", workload]
    words += ["--memory-bytes", str(memory_bytes)]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found


def most_bytes(num_samples: int, memory_bytes: int) -> int:
    """What a walk may take beside the interpreter and the mapped columns: the bound that is promised.

    Decoded samples; 24 bytes a sample for the order of two epochs, and 64 more for a moment while one is
    made; 48 MiB for code and buffers.
    """
    return memory_bytes + 88 * num_samples + (48 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--memory-bytes", type=int, default=MEMORY_BYTES)
    parser.add_argument("--walk", choices=WORKLOADS, help="only this, in this process, as JSON")
    options = parser.parse_args()
    if options.walk is not None:
        print(json.dumps(walk(options.folder, options.walk, options.memory_bytes)))
        return
    index = make_set(options.folder, num_shards=options.shards, samples_per_shard=options.samples_per_shard)
    table = index.split("train")
    total = sum(shard.num_bytes for shard in index.shards)
    print(f"{table.num_samples} samples, {total / 1e9:.2f} GB in {len(index.shards)} shards")
    print(f"bound: {most_bytes(table.num_samples, options.memory_bytes) / 2**20:.0f} MiB above the start")
    names = ("before", "opened", "peak", "after", "mapped")
    print(f"{'MiB':10}" + "".join(f"{name:>10}" for name in names) + f"{'samples':>10}{'GB':>8}{'s':>8}")
    for workload in WORKLOADS:
        found = walk_apart(options.folder, workload, options.memory_bytes)
        cells = "".join(f"{found[name] / 2**20:10.0f}" for name in names)
        rest = f"{found['num_samples']:10.0f}{found['num_bytes'] / 1e9:8.2f}{found['seconds']:8.1f}"
        print(f"{workload:10}{cells}{rest}")


if __name__ == "__main__":
    main()
