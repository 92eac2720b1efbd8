"""Episodes are functions of their number alone: wherever they are drawn, whatever is damaged or fails."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets import (
    ArrayInputs,
    BrokenSample,
    ClassEpisodes,
    ClassSamples,
    ClassTargets,
    DocumentEpisodes,
    DocumentSamples,
    Episode,
    EpisodeSource,
    GroupEpisodes,
    GroupSamples,
    ImageInputs,
    Index,
    Mixture,
    NumberTargets,
    ReadyEpisodes,
    Rehearsed,
    SampleError,
    SampleReader,
    StorageSettings,
    VariableWays,
    Ways,
)
from metaloom.datasets.class_episodes import InputsOnly
from metaloom.errors import StreamError
from tests.object_store import ObjectStore
from tests.sources import same_episode
from tests.tiny_sets import (
    CLASS_SIZES,
    GROUP_SIZES,
    class_set,
    damage,
    document_set,
    group_set,
    npy,
    numbers_of,
    ready_set,
)

IMAGES = ImageInputs(size=6)
FAST = StorageSettings(num_attempts=5, backoff_s=0.001, timeout_s=30)
CLASS_OF = [row for row, size in enumerate(CLASS_SIZES) for _ in range(size)]
KINDS = ("classes", "variable", "groups", "documents", "ready", "rehearsed", "mixture")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set of every layout."""
    folder = tmp_path_factory.mktemp("sets")
    class_set(folder / "classes")
    group_set(folder / "groups")
    document_set(folder / "documents", {"train": [300, 420, 260, 500], "rehearsal": [900]})
    rng = np.random.default_rng(0)
    arrays = [
        {
            f"{part}.{name}.npy": npy(rng.normal(size=(2, 1)))
            for part in ("support", "query")
            for name in names
        }
        for names in [("inputs", "targets")] * 9
    ]
    ready_set(folder / "ready", arrays)
    return folder


def source_of(kind: str, url: str, settings: StorageSettings | None = None) -> EpisodeSource:
    """A source of that kind on the data sets under a URL."""

    def index(name: str) -> Index:
        return Index.load(f"{url}/{name}", settings or FAST)

    match kind:
        case "classes":
            return ClassEpisodes(index("classes"), "train", ways=Ways(3, 1, 2), inputs=IMAGES, seed=3)
        case "variable":
            ways = VariableWays(2, 5, 12, 4, 2)
            return ClassEpisodes(index("classes"), "train", ways=ways, inputs=IMAGES, seed=3)
        case "groups":
            inputs, targets = ArrayInputs((2,)), NumberTargets(2)
            return GroupEpisodes(
                index("groups"), "train", inputs=inputs, targets=targets, num_support=2, num_query=1, seed=3
            )
        case "documents":
            counts = {"num_support": 2, "num_query": 1, "sequence_length": 60}
            return DocumentEpisodes(index("documents"), "train", **counts, seed=3)
        case "ready":
            return ReadyEpisodes(
                index("ready"),
                "train",
                inputs=ArrayInputs((1,)),
                targets=NumberTargets(1),
                num_support=2,
                num_query=2,
                seed=3,
            )
        case "rehearsed":
            samples = DocumentSamples(index("documents"), ["rehearsal"], sequence_length=60, seed=3)
            return Rehearsed(
                source_of("documents", url, settings),
                samples,
                num_inner=2,
                num_outer=1,
                seed=3,
                split="train",
            )
        case "mixture":
            parts = [source_of(part, url, settings) for part in ("classes", "variable")]
            return Mixture(parts, [2, 1], seed=3, split="train")
    raise AssertionError(kind)


def require_same(found: list[Episode], expected: list[Episode]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert same_episode(one, other)
        # Two reasons for one damage are one damage, and URLs differ between copies.
        assert [(b.shard, b.key) for b in one.broken] == [(b.shard, b.key) for b in other.broken]
        assert (one.num_ways, one.group) == (other.num_ways, other.group)


# ---------------------------------------------------------------- purity


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_does_not_depend_on_what_was_drawn_before_nor_on_the_object(kind: str, sets: Path) -> None:
    source = source_of(kind, str(sets))
    numbers = [*range(8), 1000, 2**40]
    expected = [source.episode(number) for number in numbers]
    require_same([source.episode(number) for number in reversed(numbers)], expected[::-1])
    copy = pickle.loads(pickle.dumps(source))
    require_same([copy.episode(number) for number in numbers], expected)
    require_same([source_of(kind, str(sets)).episode(number) for number in numbers[:3]], expected[:3])


def test_another_process_draws_the_same(sets: Path) -> None:
    code = (
        "import pickle, sys\n"
        "from tests.unit.test_datasets_broken import KINDS, source_of\n"
        "drawn = [source_of(kind, sys.argv[1]).episode(number) for kind in KINDS for number in (5, 2)]\n"
        "sys.stdout.buffer.write(pickle.dumps(drawn))"
    )
    done = subprocess.run([sys.executable, "-c", code, sets], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    expected = [source_of(kind, str(sets)).episode(number) for kind in KINDS for number in (5, 2)]
    require_same(pickle.loads(done.stdout), expected)


@pytest.mark.parametrize(("kind", "has_cache"), [("classes", False), ("classes", True), ("ready", False)])
def test_an_object_store_gives_the_same_as_the_disk(
    kind: str, has_cache: bool, sets: Path, s3: ObjectStore, tmp_path: Path
) -> None:
    bucket = s3.new_bucket()
    s3.upload(sets / kind, f"{bucket}/{kind}")
    rules = StorageSettings(cache_folder=str(tmp_path) if has_cache else None, block_bytes=4096)
    source, expected = source_of(kind, bucket, rules), source_of(kind, str(sets))
    for _ in range(1 + has_cache):  # the second time from the cache
        require_same([source.episode(n) for n in range(3)], [expected.episode(n) for n in range(3)])
        source = pickle.loads(pickle.dumps(source))


# ---------------------------------------------------------------- damaged samples


def damaged_classes(folder: Path, flipped: set[int], undecodable: set[int]) -> Index:
    index = class_set(folder, broken_images=undecodable)
    damage(folder, index, flipped)
    return Index.load(folder, FAST)


NUMBERS = st.sets(st.integers(0, sum(CLASS_SIZES) - 1), max_size=25)


@given(flipped=NUMBERS, undecodable=NUMBERS, variable=st.booleans(), labels=st.booleans())
@settings(max_examples=20, deadline=None)
def test_episodes_of_damaged_classes_are_whole_and_come_again(
    tmp_path_factory: pytest.TempPathFactory,
    flipped: set[int],
    undecodable: set[int],
    variable: bool,
    labels: bool,
) -> None:
    index = damaged_classes(tmp_path_factory.mktemp("damaged"), flipped, undecodable)
    whole = [n for n in range(len(CLASS_OF)) if n not in flipped | undecodable]
    left = np.bincount([CLASS_OF[n] for n in whole], minlength=len(CLASS_SIZES))
    if (left >= 3).sum() < 8:  # tasks must be possible in every case
        return
    ways = VariableWays(2, 3, 6, 2, 1) if variable else Ways(2, 1, 2)
    words: dict[str, Any] = {"ways": ways, "inputs": IMAGES, "seed": 1}
    if labels and not variable:
        words["labels"] = "kept"
    source = ClassEpisodes(index, "train", **words)
    episodes = [source.episode(number) for number in range(25)]
    table = index.split("train")
    named = {(index.shards[int(table.shard[n])].name, table.key(n)) for n in flipped | undecodable}
    for episode in episodes:
        support, query = numbers_of(episode.support["inputs"]), numbers_of(episode.query["inputs"])
        assert set(support + query) <= set(whole)
        assert len(set(support + query)) == len(support + query)
        for part, found in ((episode.support, support), (episode.query, query)):
            class_of_label = {(t, CLASS_OF[n]) for t, n in zip(part["targets"].tolist(), found, strict=True)}
            assert len(class_of_label) == len({target for target, _ in class_of_label})
        assert {(b.shard, b.key) for b in episode.broken} <= {
            (s.name, k) for s in index.shards for _, k in named
        }
        assert len(set(episode.broken)) == len(episode.broken)
    fresh = ClassEpisodes(index, "train", **words)
    require_same([fresh.episode(n) for n in reversed(range(25))], episodes[::-1])


@pytest.mark.parametrize("kind", ["classes", "groups", "documents", "ready"])
def test_what_is_whole_stays_as_it_was_and_what_is_not_is_named(
    kind: str, tmp_path: Path, sets: Path
) -> None:
    """Only an episode that would have had a damaged sample changes; a class or group keeps its tasks."""
    subprocess.run(["cp", "-r", sets / kind, tmp_path / kind], check=True)
    index = Index.load(tmp_path / kind)
    table = index.split("train")
    chosen = {"classes": [8, 20, 33], "groups": [1, 4, 33]}.get(kind, [1])
    damage(tmp_path / kind, index, chosen)
    source, expected = source_of(kind, str(tmp_path)), source_of(kind, str(sets))
    named: dict[str, BrokenSample] = {}
    for number in range(80):
        found, before = source.episode(number), expected.episode(number)
        if not found.broken:
            assert same_episode(found, before)
            continue
        named |= {broken.key: broken for broken in found.broken}
        if kind in ("classes", "groups"):
            assert found.task == before.task
            assert all((a == b).all() for a, b in zip(*shared_places(found, before), strict=True))
        else:
            assert table.key(chosen[0]) in (before.task, found.broken[0].key)
            assert found.task != table.key(chosen[0])
    assert sorted(named) == [table.key(number) for number in chosen]
    for number, broken in zip(chosen, (named[key] for key in sorted(named)), strict=True):
        assert broken.url == str(tmp_path / kind)
        assert broken.shard == index.shards[int(table.shard[number])].name
        assert f"instead of {int(table.crc32[number]):08x}" in broken.reason
        shown = (
            f"{broken.url}/{broken.shard}: sample {broken.key!r} is damaged: bytes {table.offset[number]} to"
        )
        assert str(broken).startswith(shown)


def shared_places(found: Episode, before: Episode) -> tuple[list[Any], list[Any]]:
    """Targets of classes, or nothing for groups, whose targets change with their samples."""
    if found.support["targets"].dtype != np.int64:
        return [], []
    return (
        [found.support["targets"], found.query["targets"]],
        [before.support["targets"], before.query["targets"]],
    )


def test_a_group_without_enough_whole_samples_gives_its_place_to_another(tmp_path: Path) -> None:
    index = group_set(tmp_path)
    table = index.split("train")
    first = [int(n) for n in np.flatnonzero(table.attributes["group"] == 0)]
    damage(tmp_path, index, first)
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": ClassTargets(3), "seed": 0}
    source = GroupEpisodes(Index.load(tmp_path), "train", num_support=2, num_query=1, **words)
    tasks = [source.episode(number) for number in range(source.num_tasks)]
    assert len(tasks) == sum(size >= 3 for size in GROUP_SIZES)
    (other,) = [task for task in tasks if task.broken]
    assert {broken.key for broken in other.broken} == {table.key(n) for n in first}
    assert other.task != "user 0"
    batch = GroupSamples(Index.load(tmp_path), "train", **words).batch(0, 300)
    assert {broken.key for broken in batch.broken} == {table.key(n) for n in first}
    assert 0 not in batch.arrays["inputs"][:, 1]
    damage(tmp_path, index, set(range(table.num_samples)) - set(first))
    source = GroupEpisodes(Index.load(tmp_path), "train", num_support=2, num_query=1, **words)
    with pytest.raises(
        SampleError, match="No group has enough samples that can be read: mend the data"
    ) as caught:
        source.episode(0)
    # Of each group that is a task, at least the two were met that leave it too few.
    assert len(set(caught.value.all_broken)) == len(caught.value.all_broken)
    assert len(caught.value.all_broken) >= 2 * source.num_tasks


@pytest.mark.parametrize("kind", ["documents", "ready", "samples"])
def test_the_only_whole_one_is_found_and_none_is_tried_twice(kind: str, tmp_path: Path) -> None:
    folder, num_tasks = tmp_path / ("ready" if kind == "ready" else "documents"), 40
    if kind == "ready":
        arrays = [np.full((2, 1), n) for n in range(2 * num_tasks)]
        rows = zip(arrays[::2], arrays[1::2], strict=True)
        index = ready_set(
            folder,
            [
                {"support.inputs.npy": npy(s), "query.inputs.npy": npy(q)}
                | {f"{part}.targets.npy": npy(s) for part in ("support", "query")}
                for s, q in rows
            ],
        )
    else:
        index = document_set(folder, {"train": [200] * num_tasks})
    table = index.split("train")
    damage(folder, index, set(range(num_tasks)) - {17})

    def draw() -> tuple[BrokenSample, ...]:
        if kind == "samples":
            samples = DocumentSamples(Index.load(folder), ["train"], sequence_length=60, seed=3)
            return samples.batch(0, 5).broken
        source = source_of(kind, str(tmp_path))
        found = [source.episode(number) for number in range(num_tasks)]
        assert {episode.task for episode in found} == {table.key(17)}
        return max((episode.broken for episode in found), key=len)

    met = draw()
    assert len(set(met)) == len(met) > 5
    damage(folder, index, {17})
    with pytest.raises(SampleError, match=r"So were 39 that were tried before it: mend the data") as caught:
        draw()
    error = pickle.loads(pickle.dumps(caught.value))
    assert {broken.key for broken in error.all_broken} == {table.key(n) for n in range(num_tasks)}
    assert len(error.all_broken) == num_tasks


def test_batches_take_another_sample_of_the_same_class(tmp_path: Path) -> None:
    index = damaged_classes(tmp_path, {0, 1, 30}, {40})
    samples = ClassSamples(index, "train", inputs=IMAGES, seed=0)
    batch = samples.batch(0, 600)
    numbers = numbers_of(batch.arrays["inputs"])
    assert [CLASS_OF[number] for number in numbers] == batch.arrays["targets"].tolist()
    assert not {0, 1, 30, 40} & set(numbers)
    assert {broken.key for broken in batch.broken} == {f"train/{n:05}" for n in (0, 1, 30, 40)}
    again = ClassSamples(index, "train", inputs=IMAGES, seed=0).batch(0, 600)
    assert np.array_equal(again.arrays["inputs"], batch.arrays["inputs"])


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        ("missing", "is lost: the shard is missing"),
        ("truncated", r"is cut off: .*is truncated"),
        ("class", r"cannot be decoded: its cls says class 0, the index 1"),
        ("large", r"has 2048 bytes, over the limit of 2000"),
    ],
)
def test_each_kind_of_damage_has_its_reason(hurt: str, reason: str, tmp_path: Path) -> None:
    class_set(tmp_path, [2, 2])
    index = Index.load(tmp_path, FAST)
    shard = tmp_path / "train-00000.tar"
    if hurt == "missing":
        shard.unlink()
    if hurt == "truncated":
        shard.write_bytes(shard.read_bytes()[: int(index.split("train").offset[3]) + 10])
    if hurt == "class":
        attributes = {"class": np.array([0, 1, 1, 1], np.int32)}
        table = dataclasses.replace(index.split("train"), attributes=attributes)
        index = dataclasses.replace(index, splits={"train": table})
    limit = {"sample_limit_bytes": 2000} if hurt == "large" else {}
    reader = SampleReader(index, "train", InputsOnly(IMAGES), **limit)
    (found,) = reader.read([1 if hurt == "class" else 3])
    assert isinstance(found, BrokenSample)
    assert re.match(reason, found.reason), found.reason


# ---------------------------------------------------------------- storage that fails


@dataclasses.dataclass
class Failing:
    """The data sets at a URL in memory, where the next reads fail."""

    url: str
    num_faults: int = 0


@pytest.fixture
def failing(sets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(sets), "/failing-sets", recursive=True)
    state = Failing("memory://failing-sets")
    read = MemoryFileSystem.cat_file

    def cat_file(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        if state.num_faults:
            state.num_faults -= 1
            raise TimeoutError("planted")
        content: bytes = read(self, path, start=start, end=end)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    yield state
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_storage_changes_no_episode_and_is_no_skip(
    kind: str, sets: Path, failing: Failing
) -> None:
    source, expected = source_of(kind, failing.url), source_of(kind, str(sets))
    num_met = 0
    for number in range(12):
        failing.num_faults = 4  # of five attempts
        found = source.episode(number)
        num_met += 4 - failing.num_faults
        assert found.broken == ()
        assert same_episode(found, expected.episode(number))
    assert num_met >= 12  # what is kept in memory meets none


def test_a_fault_that_stays_stops_and_breaks_no_sample(failing: Failing, sets: Path) -> None:
    source = source_of("classes", failing.url)
    failing.num_faults = 10_000
    match = r"in 5 attempts .*planted.*The storage, or the way there, is at fault, not the data"
    with pytest.raises(StreamError, match=match) as caught:
        source.episode(0)
    assert not isinstance(caught.value, SampleError)
    failing.num_faults = 0
    require_same([source.episode(0)], [source_of("classes", str(sets)).episode(0)])
