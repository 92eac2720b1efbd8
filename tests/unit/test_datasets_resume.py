"""A position is a step: what comes next follows from it alone, reads little, and the reader stays small."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import reader_memory
from metaloom.datasets import (
    BrokenSample,
    ClassEpisodes,
    DocumentEpisodes,
    Episode,
    EpisodeSource,
    EpisodeStream,
    ImageInputs,
    Index,
    SampleReader,
    StorageSettings,
    TextInputs,
    Ways,
)
from metaloom.datasets.class_episodes import InputsOnly
from tests.flaky_server import FlakyServer, running_flaky_server
from tests.object_store import ObjectStore
from tests.sources import same_episode
from tests.tiny_sets import class_set, document_set, numbers_of

IMAGES = ImageInputs(size=6)


def classes_of(index: Index) -> EpisodeSource:
    return ClassEpisodes(index, "train", ways=Ways(3, 1, 2), inputs=IMAGES, seed=1)


def documents_of(index: Index) -> EpisodeSource:
    return DocumentEpisodes(index, "train", num_support=1, num_query=1, sequence_length=20, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes and documents, each of many times the bytes that a few episodes take."""
    found = tmp_path_factory.mktemp("resume")
    class_set(found / "classes", [30] * 30, shard_limit_bytes=200_000)
    document_set(found / "documents", {"train": [50 + n % 40 for n in range(400)]})
    return found


@pytest.fixture(scope="module")
def source(folder: Path) -> EpisodeSource:
    return classes_of(Index.load(folder / "classes"))


def drawn(
    source: EpisodeSource, tasks_per_step: int, steps: range, *, world_size: int, num_workers: int = 0
) -> list[list[Episode]]:
    """The episodes of each step, those of all ranks together."""
    parts: list[list[list[Episode]]] = []
    for rank in range(world_size):
        stream = EpisodeStream(
            source,
            tasks_per_step=tasks_per_step,
            rank=rank,
            world_size=world_size,
            start_step=steps.start,
            stop_step=steps.stop,
            num_workers=num_workers,
        )
        with stream:
            found = list(stream)
        assert [step for step, _ in found] == list(steps)
        parts.append([episodes for _, episodes in found])
    return [list(itertools.chain.from_iterable(of_ranks)) for of_ranks in zip(*parts, strict=True)]


def require_numbers(source: EpisodeSource, found: list[list[Episode]], first: int) -> None:
    episodes = list(itertools.chain.from_iterable(found))
    assert [episode.number for episode in episodes] == list(range(first, first + len(episodes)))
    assert all(same_episode(episode, source.episode(episode.number)) for episode in episodes)


@given(
    tasks_per_step=st.integers(1, 9),
    start=st.integers(0, 2**30),
    segments=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_any_stops_and_world_sizes_give_the_episodes_of_the_step_alone(
    source: EpisodeSource, tasks_per_step: int, start: int, segments: list[tuple[int, int]]
) -> None:
    step, found = start, []
    for num_steps, world_size in segments:
        found += drawn(source, tasks_per_step, range(step, step + num_steps), world_size=world_size)
        step += num_steps
    require_numbers(source, found, start * tasks_per_step)


def test_workers_come_and_go_between_restarts(source: EpisodeSource) -> None:
    found = drawn(source, 3, range(5, 8), world_size=1, num_workers=2)
    found += drawn(source, 3, range(8, 10), world_size=2, num_workers=1)
    found += drawn(source, 3, range(10, 11), world_size=3)
    require_numbers(source, found, 15)


# ---------------------------------------------------------------- bytes


@pytest.fixture
def server(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that the URL s3://set leads to, and which notes what it is asked for."""
    with running_flaky_server() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def bytes_sent(server: FlakyServer) -> dict[str, int]:
    """Bytes by file, by what the server was asked."""
    sent: dict[str, int] = {}
    for method, path, stretch in server.requests:
        if method == "GET":
            start, stop = stretch.removeprefix("bytes=").split("-")
            name = path.rpartition("/")[2]
            sent[name] = sent.get(name, 0) + int(stop) + 1 - int(start)
    return sent


@pytest.mark.parametrize("block_bytes", [None, 4096])
@pytest.mark.parametrize("kind", ["classes", "documents"])
def test_a_resume_in_mid_epoch_reads_the_index_the_columns_and_what_it_draws(
    kind: str, block_bytes: int | None, folder: Path, server: FlakyServer, tmp_path: Path
) -> None:
    """Bytes <= index.json + every .columns + for each sample drawn its length, rounded outwards to blocks
    where there is a cache; drawn are the episodes of the step and of the `read_ahead` steps behind it."""
    for path in (folder / kind).iterdir():
        server.files[f"/set/{path.name}"] = path.read_bytes()
    rules = StorageSettings(
        cache_folder=None if block_bytes is None else str(tmp_path), block_bytes=block_bytes or 1 << 20
    )
    index = Index.load("s3://set", rules)
    source = classes_of(index) if kind == "classes" else documents_of(index)
    step = 3217
    stream = EpisodeStream(
        source,
        tasks_per_step=4,
        rank=0,
        world_size=1,
        read_ahead=2,
        start_step=step,
        stop_step=step + 3,
    )
    with stream:
        episodes = [episode for _, episodes in stream for episode in episodes]
    assert [episode.number for episode in episodes] == list(range(4 * step, 4 * (step + 3)))

    table = index.split("train")
    if kind == "classes":
        samples = {n for e in episodes for part in (e.support, e.query) for n in numbers_of(part["inputs"])}
    else:
        samples = {int(episode.task.removeprefix("train/")) for episode in episodes}
    described = sum((folder / kind / name).stat().st_size for name in ("index.json", "train.columns"))
    covered: set[tuple[int, int]] = set()  # (shard, block) or (shard, byte)
    unit = block_bytes or 1
    for n in samples:
        first, last = int(table.offset[n]), int(table.offset[n] + table.length[n]) - 1
        covered |= {(int(table.shard[n]), place) for place in range(first // unit, last // unit + 1)}
    sent = bytes_sent(server)
    of_shards = sum(size for name, size in sent.items() if name.endswith(".tar"))
    assert sum(sent.values()) - of_shards == described
    assert of_shards == index.storage.num_bytes_fetched
    assert of_shards <= unit * len(covered)
    longest = int(table.length.max())
    overhead = 0 if block_bytes is None else 2 * (block_bytes - 1)
    assert of_shards <= len(samples) * (longest + overhead)  # as docs/data.md states it
    # Not a replay: neither what comes before in the epoch, nor a shard as a whole.
    assert of_shards < sum(shard.num_bytes for shard in index.shards) / 3
    index.close()


# ---------------------------------------------------------------- memory


def test_a_walk_through_all_samples_keeps_within_the_stated_bound(tmp_path: Path) -> None:
    """600 MB, of which 8 MiB may be kept decoded; benchmarks/reader_memory.py walks through 10 GB."""
    index = reader_memory.make_set(tmp_path, num_shards=60, samples_per_shard=1000)
    assert sum(shard.num_bytes for shard in index.shards) > 600e6
    found = reader_memory.walk_apart(tmp_path, "epoch", 8 << 20)
    assert found["num_samples"] == 60_000
    assert found["peak"] - found["before"] < reader_memory.most_bytes(60_000, 8 << 20)


def test_what_is_kept_of_a_sample_keeps_no_more_than_it_counts(tmp_path: Path) -> None:
    """Of long texts that are cut, and of small arrays in large tar entries, only what is shown stays."""
    index = document_set(tmp_path, {"train": [6000] * 10})
    reader = SampleReader(index, "train", InputsOnly(TextInputs(8)))
    (one,) = reader.read([0])
    tracemalloc.start()
    try:
        reader.read(list(range(1, 10)))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < reader.kept_bytes + 10_000  # and caches of the storage
    assert not isinstance(one, BrokenSample)
    (again,) = reader.read([0])
    assert not isinstance(again, BrokenSample)
    with pytest.raises(ValueError, match="read-only"):
        again["inputs"][0] = 1
