"""Samples and bytes per second, as metaloom and others read them from shards: prints a table per workload.

    python -m benchmarks.episodes [--workloads decoded episodes] [--sets jpg] [--num-workers 0 1 2]
        [--streaming-python VENV/bin/python] [--json FILE] [--quick]

All contenders read the same samples, made here: from local disk, which is in the page cache by then, and from
an S3 server on this machine. Each row is a process of its own (see `episode_rows.py`); passes alternate
between the rows of a table, so that a noisy machine hits all alike, and medians are shown. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.episode_data import DataSet, make
from benchmarks.episode_rows import Pass, Request, Workload
from tests.object_store import ObjectStore, running_object_store

REPOSITORY = Path(__file__).parent.parent
STREAMING = "mosaicml-streaming"
EXTENSIONS = ("npy", "png", "jpg")
WORKLOADS: tuple[Workload, ...] = ("in order", "at random", "decoded", "episodes")
# Who takes part, by storage and workload; the first is what ratios are to.
ENTRIES: Mapping[tuple[str, Workload], Sequence[str]] = {
    ("local", "in order"): ("webdataset", "cat", "tarfile", STREAMING, "metaloom"),
    ("local", "at random"): ("tarfile", STREAMING, "metaloom"),
    ("local", "decoded"): ("memory", "webdataset", STREAMING, "metaloom"),
    ("local", "episodes"): ("memory", "metaloom"),
    ("s3", "in order"): ("webdataset", "boto3", STREAMING, "metaloom", "metaloom, cached"),
    ("s3", "episodes"): ("memory", "metaloom", "metaloom, cached"),
}
WITH_WORKERS = ("webdataset", STREAMING, "metaloom", "metaloom, cached")
# Where mosaicml-streaming has rows with workers: its loader goes in order, and from a bucket it fetches whole
# files before the first batch, with which the clock of a row with workers starts.
LOADED = (("local", "in order"), ("local", "decoded"))
S3_SHARE = 4  # of the arrays, one part in so many goes to the bucket
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass
class Row:
    """What was measured of one contender: its passes, or why there are none."""

    contender: str
    num_workers: int
    passes: list[Pass] = dataclasses.field(default_factory=list)
    failure: str | None = None

    @property
    def samples_per_s(self) -> float:
        """The median over the passes; 0 where there is none."""
        return statistics.median([p.num_samples / p.wall_s for p in self.passes] or [0.0])

    @property
    def mb_per_s(self) -> float:
        """The median over the passes, in 10^6 bytes of members."""
        return statistics.median([p.num_bytes / p.wall_s / 1e6 for p in self.passes] or [0.0])

    @property
    def cpu_us(self) -> float:
        """Processor time for a sample in the row's own process, in microseconds: the least of the passes."""
        return min((p.cpu_s / max(1, p.num_samples) * 1e6 for p in self.passes), default=0.0)


@dataclasses.dataclass(frozen=True)
class Block:
    """The rows of one workload on one set, from one storage."""

    storage: str
    workload: Workload
    extension: str
    rows: list[Row]


class Measuring:
    """The process that measures one row."""

    def __init__(self, row: Row, request: Request, *, python: str, environment: Mapping[str, str]) -> None:
        self.row = row
        # A file, since a pipe that nobody reads would block a library that prints a lot.
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            # Not with -m: what is sent to workers has to be of a module that they can import.
            [
                python,
                "-c",
                "from benchmarks.episode_rows import main; main()",
                json.dumps(dataclasses.asdict(request)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def add_pass(self, *, counts: bool) -> None:
        """Has one more pass made, which need not count."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self.row.failure is not None:
            return
        try:
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.row.failure = self._last_words()
        elif counts:
            self.row.passes.append(Pass(**json.loads(answer)))

    def end(self) -> None:
        """Ends the process, if it has not ended itself."""
        self._process.communicate()
        self._complaints.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines()
        if lines and lines[-1].startswith("ModuleNotFoundError"):
            return "not installed"
        return f"failed ({lines[-1]})" if lines else f"failed (exit code {code})"


@dataclasses.dataclass(frozen=True)
class Place:
    """A data set where a storage has it: its shards, and the same in the format of mosaicml-streaming."""

    storage: str
    data: DataSet
    url: str
    mds: str
    environment: Mapping[str, str]


def measure(place: Place, workload: Workload, options: argparse.Namespace) -> Block:
    """Measures all contenders of one workload on one set."""
    data = place.data
    block = Block(place.storage, workload, data.extension, [])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.ExitStack() as ending:
        running = []
        for contender in ENTRIES[place.storage, workload]:
            if options.contenders and contender not in options.contenders:
                continue
            for num_workers in options.num_workers if contender in WITH_WORKERS else [0]:
                if contender == STREAMING and num_workers and (place.storage, workload) not in LOADED:
                    continue
                row = Row(contender, num_workers)
                block.rows.append(row)
                own = Path(folder, f"{len(block.rows)}")
                own.mkdir()
                request = Request(
                    contender=contender,
                    workload=workload,
                    url=data.folder if contender == "memory" else place.url,
                    extension=data.extension,
                    shards=data.shards,
                    num_samples=data.num_samples,
                    member_bytes=data.num_bytes / data.num_samples,
                    file_bytes=sum(Path(data.folder, shard).stat().st_size for shard in data.shards),
                    mds=place.mds,
                    folder=str(own),
                    num_workers=num_workers,
                    limit_s=options.seconds,
                )
                python = options.streaming_python if contender == STREAMING else sys.executable
                measuring = Measuring(row, request, python=python, environment=place.environment)
                ending.callback(measuring.end)
                measuring.add_pass(counts=False)
                running.append(measuring)
        for _ in range(options.repeats):
            for measuring in running:
                measuring.add_pass(counts=True)
    return block


def table(block: Block) -> str:
    """The block as it is printed."""
    reference = block.rows[0]
    title = f"{block.storage}, {block.workload}, {block.extension}"
    lines = [
        title,
        f"{'':22}{'workers':>8}{'samples/s':>11}{'MB/s':>9}{'/ ' + reference.contender:>14}{'cpu us':>9}",
    ]
    for row in block.rows:
        start = f"{row.contender:22}{row.num_workers:8}"
        if not row.passes:
            lines.append(f"{start}  {row.failure}")
            continue
        ratio = row.samples_per_s / reference.samples_per_s if reference.passes else float("nan")
        end = f"{row.cpu_us:9.1f}" if not row.num_workers else f"{'':9}"
        lines.append(f"{start}{row.samples_per_s:11.0f}{row.mb_per_s:9.0f}{ratio:14.2f}{end}")
        if row.failure is not None:
            lines[-1] += f"  {row.failure}"
    return "\n".join(lines)


def written_for_streaming(data: DataSet, folder: Path, python: str) -> None:
    """Writes a set in the format of mosaicml-streaming, if that is installed."""
    words = [python, "-m", "benchmarks.episode_mds", data.extension, str(folder)]
    shards = [f"{data.folder}/{shard}" for shard in data.shards]
    subprocess.run([*words, *shards], cwd=REPOSITORY, capture_output=True, check=False)


@contextlib.contextmanager
def places(options: argparse.Namespace) -> Iterator[list[Place]]:
    """The data, made; and the S3 server, which runs inside."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        found = []
        sizes = {"npy": options.arrays, "png": options.images, "jpg": options.images}
        for extension in options.sets:
            data = make(folder / extension, extension, sizes[extension])
            mds = folder / f"{extension}-mds"
            written_for_streaming(data, mds, options.streaming_python)
            found.append(Place("local", data, data.folder, str(mds), {}))
        if "s3" in options.storages:
            store = stack.enter_context(running_object_store(folder / "server.log", rclone=options.rclone))
            for extension in options.sets:
                if extension == "png":
                    continue
                num_samples = sizes[extension] // (S3_SHARE if extension == "npy" else 1) // 100 * 100
                found.append(_uploaded(store, folder / "s3", extension, max(500, num_samples), options))
        yield [place for place in found if place.storage in options.storages]


def _uploaded(
    store: ObjectStore, folder: Path, extension: str, num_samples: int, options: argparse.Namespace
) -> Place:
    data = make(folder / extension, extension, num_samples)
    mds = folder / f"{extension}-mds"
    written_for_streaming(data, mds, options.streaming_python)
    bucket = store.new_bucket()
    store.upload(Path(data.folder), f"{bucket}/data")
    if mds.exists():
        store.upload(mds, f"{bucket}/mds")
    # mosaicml-streaming reads the address from a variable of its own.
    environment = {**store.environment, "S3_ENDPOINT_URL": store.endpoint}
    return Place("s3", data, f"{bucket}/data", f"{bucket}/mds", environment)


def _is_more_of_the_same(place: Place, workload: Workload) -> bool:
    """Undecoded, and from a bucket, PNGs are bytes like JPEGs."""
    return place.data.extension == "png" and (place.storage == "s3" or workload in ("in order", "at random"))


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    found: dict[str, Any] = {}
    for name in ("metaloom", "webdataset", "pillow", "numpy", "torch", "s3fs", "moto"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    return {**found, "python": platform.python_version(), "cores": cores, "load": os.getloadavg()[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="NAME")
    parser.add_argument("--sets", nargs="+", choices=EXTENSIONS, default=EXTENSIONS, metavar="EXTENSION")
    parser.add_argument("--storages", nargs="+", choices=["local", "s3"], default=["local", "s3"])
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2], metavar="W")
    parser.add_argument("--arrays", type=int, default=8000, metavar="N", help="of 128 KiB; a multiple of 100")
    parser.add_argument("--images", type=int, default=20000, metavar="N", help="a multiple of 100")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="after a pass that does not count"
    )
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="a pass ends after so long")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where data are made; default: as tempfile"
    )
    parser.add_argument(
        "--streaming-python", default=sys.executable, metavar="FILE", help=f"interpreter that has {STREAMING}"
    )
    parser.add_argument(
        "--rclone", metavar="FILE", help="that program, whose S3 server takes the place of moto's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--quick", action="store_true", help="see that it runs: few samples, one short pass")
    options = parser.parse_args(arguments)
    if options.quick:
        options.arrays, options.images, options.repeats, options.seconds = 500, 500, 1, 0.02
    about = environment()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    blocks = []
    with places(options) as found:
        for workload in options.workloads:
            for place in found:
                if (place.storage, workload) not in ENTRIES or _is_more_of_the_same(place, workload):
                    continue
                block = measure(place, workload, options)
                print(f"\n{table(block)}", flush=True)
                blocks.append(block)
                if options.json is not None:  # after every block, since a whole run takes long
                    figures = {"environment": about, "blocks": [dataclasses.asdict(b) for b in blocks]}
                    options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
