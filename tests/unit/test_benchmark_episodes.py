"""The benchmark of reading, by itself: these are tests of the measuring, not of speed."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import episode_rows, episodes
from benchmarks.episode_data import make
from benchmarks.episode_rows import CONTENDERS, Pass, Request, timed
from benchmarks.episodes import Block, Row, table


def test_the_driver_prints_rows_of_every_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--sets", "jpg", "--workloads", "episodes", "--num-workers", "1"]
    words += ["--contenders", "memory", "metaloom"]
    figures = tmp_path / "figures.json"
    episodes.main([*words, "--folder", str(tmp_path), "--json", str(figures)])
    printed = capsys.readouterr().out
    blocks = json.loads(figures.read_text())["blocks"]
    assert [(block["storage"], block["workload"]) for block in blocks] == [
        ("local", "episodes"),
        ("s3", "episodes"),
    ]
    for row in itertools.chain.from_iterable(block["rows"] for block in blocks):
        assert row["contender"] in printed
        assert row["failure"] is None
        (found,) = row["passes"]
        assert found["num_samples"] > 0
        assert found["wall_s"] > 0.0
    assert list(tmp_path.iterdir()) == [figures]


# webdataset leaves its files to the collector.
_LEAKS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    "contender", ["cat", "tarfile", pytest.param("webdataset", marks=_LEAKS), "metaloom"]
)
@pytest.mark.parametrize("extension", ["npy", "jpg"])
def test_contenders_read_all_samples_in_order(contender: str, extension: str, tmp_path: Path) -> None:
    data = make(tmp_path / "data", extension, 200)
    request = Request(
        contender=contender,
        workload="in order",
        url=data.folder,
        extension=extension,
        shards=data.shards,
        num_samples=data.num_samples,
        member_bytes=data.num_bytes / data.num_samples,
        file_bytes=sum((tmp_path / "data" / name).stat().st_size for name in data.shards),
        mds="",
        folder=str(tmp_path),
        num_workers=0,
        limit_s=1e9,
    )
    found = timed(CONTENDERS[contender](request)(), request.limit_s, has_workers=False)
    assert found.num_samples == pytest.approx(200)
    assert found.num_bytes == pytest.approx(data.num_bytes, abs=200)  # a rounded mean each


def test_the_data_are_what_is_said_of_them(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "png", 200)
    num_bytes = 0
    for shard in data.shards:
        with tarfile.open(tmp_path / "data" / shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    num_bytes += member.size
                    file = tar.extractfile(member)
                    assert file is not None
                    assert episode_rows.decode("png", file.read()).shape == (84, 84, 3)
    assert num_bytes == data.num_bytes


def test_the_clock_of_a_row_with_workers_starts_with_the_first_batch() -> None:
    def batches() -> Generator[tuple[float, float], None, None]:
        yield from [(64, 640), (10, 100), (5, 50)]

    assert timed(batches(), 1e9, has_workers=True).num_samples == 15
    assert timed(batches(), 1e9, has_workers=False).num_bytes == 790
    assert timed(batches(), 0.0, has_workers=True).num_samples == 10


def test_rates_are_medians_and_ratios_are_to_the_first_row() -> None:
    def row(name: str, *walls_s: float) -> Row:
        return Row(name, 0, [Pass(1000, 2_000_000, wall_s, wall_s / 2) for wall_s in walls_s])

    missing = Row("mosaicml-streaming", 0, failure="not installed")
    rows = [row("webdataset", 1.0, 4.0, 2.0), row("metaloom", 1.0, 0.5, 1.0), missing]
    lines = table(Block("local", "in order", "npy", rows)).splitlines()
    assert lines[2].split() == ["webdataset", "0", "500", "1", "1.00", "500.0"]
    assert lines[3].split() == ["metaloom", "0", "1000", "2", "2.00", "250.0"]
    assert lines[4].split()[2:] == ["not", "installed"]


def test_npy_payloads_are_as_numpy_wrote_them(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "npy", 100)
    with tarfile.open(tmp_path / "data" / data.shards[0]) as tar:
        first = next(member for member in tar if member.name.endswith(".npy"))
        file = tar.extractfile(first)
        assert file is not None
        expected = np.random.default_rng(0).random((32, 1016), np.float32)
        assert np.array_equal(episode_rows.decode("npy", file.read()), expected)
