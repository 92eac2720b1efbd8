"""Tasks that the data state themselves: groups, documents of tokens, ready episodes, texts to classify."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaloom.datasets import (
    ArrayInputs,
    ClassEpisodes,
    ClassTargets,
    DocumentEpisodes,
    DocumentSamples,
    GroupEpisodes,
    GroupSamples,
    ImageInputs,
    Index,
    Inputs,
    NumberTargets,
    ReadyEpisodes,
    ReadySamples,
    Sample,
    SampleError,
    SplitSamples,
    Storage,
    Targets,
    TextInputs,
    Ways,
    document_episodes,
    write_shards,
)
from metaloom.datasets.storage import Extent
from metaloom.errors import StreamError
from tests.tiny_sets import (
    GROUP_SIZES,
    class_set,
    document_set,
    facts,
    group_set,
    marked,
    npy,
    png,
    ready_set,
)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return group_set(tmp_path_factory.mktemp("users"))


# ---------------------------------------------------------------- groups


def group_episodes(users: Index, targets: Targets, *, seed: int = 0) -> GroupEpisodes:
    return GroupEpisodes(
        users, "train", inputs=ArrayInputs((2,)), targets=targets, num_support=3, num_query=2, seed=seed
    )


def test_each_group_comes_once_per_epoch_with_samples_of_its_own_drawn_anew(users: Index) -> None:
    source = group_episodes(users, NumberTargets(2))
    large = [row for row, size in enumerate(GROUP_SIZES) if size >= 5]
    assert source.num_tasks == len(large)
    orders, drawn = set(), set()
    for epoch in range(4):
        episodes = [source.episode(epoch * len(large) + place) for place in range(len(large))]
        orders.add(tuple(episode.task for episode in episodes))
        assert sorted(episode.task for episode in episodes) == [f"user {row}" for row in large]
        for episode in episodes:
            assert episode.group == episode.task
            assert episode.support["inputs"].shape == (3, 2)
            assert episode.query["inputs"].dtype == episode.query["targets"].dtype == np.float32
            inputs = np.concatenate([episode.support["inputs"], episode.query["inputs"]])
            targets = np.concatenate([episode.support["targets"], episode.query["targets"]])
            numbers = inputs[:, 0].astype(int).tolist()
            assert len(set(numbers)) == 5
            assert set(inputs[:, 1].astype(int)) == {int(episode.task.removeprefix("user "))}
            np.testing.assert_array_equal(targets, [[n, -n] for n in numbers])
            drawn.add((episode.task, tuple(numbers)))
    assert len(orders) == 4
    assert len(drawn) > 3 * len(large)


def test_queries_may_be_the_support_examples_themselves(users: Index) -> None:
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": NumberTargets(2), "seed": 0}
    source = GroupEpisodes(users, "train", num_support=5, num_query=None, **words)
    assert source.num_tasks == sum(size >= 5 for size in GROUP_SIZES)
    for number in range(4):
        episode = source.episode(number)
        assert episode.support["inputs"].shape == (5, 2)
        for name, value in episode.support.items():
            np.testing.assert_array_equal(value, episode.query[name])
    with pytest.raises(StreamError, match=r"data\.num_support is 10, but the largest group .*; lower it\."):
        GroupEpisodes(users, "train", num_support=10, num_query=None, **words)


def test_groups_drawn_by_size_come_as_often_as_they_have_samples(users: Index) -> None:
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": NumberTargets(2), "seed": 0}
    source = GroupEpisodes(users, "train", num_support=3, num_query=2, by_size=True, **words)
    names = [source.episode(number).task for number in range(2000)]
    assert source.episode(7).task == names[7]
    sizes = {f"user {row}": size for row, size in enumerate(GROUP_SIZES) if size >= 5}
    expected = {name: 2000 * size / sum(sizes.values()) for name, size in sizes.items()}
    assert set(names) == set(expected)
    statistic = sum((names.count(name) - count) ** 2 / count for name, count in expected.items())
    assert statistic < 18.5  # the 99 % quantile of chi square with 7 degrees: there are at most 8 such groups


def test_classes_of_groups_mean_the_same_in_all(users: Index) -> None:
    source = group_episodes(users, ClassTargets(3))
    for number in range(6):
        query = source.episode(number).query
        np.testing.assert_array_equal(query["targets"], query["inputs"][:, 0].astype(int) % 3)
        assert query["targets"].dtype == np.int64


@pytest.fixture
def fruit(tmp_path: Path) -> Index:
    """Classes with groups; split `test` lacks a class, so that its rows are others. An input is its class."""
    order = ["apple", "banana", "cherry"]

    def split(names: list[str]) -> SplitSamples:
        samples = [
            Sample(
                f"{row}-{n}",
                {"npy": npy(np.array([order.index(name), n], np.float32)), "cls": name.encode()},
                {"class": row, "group": n % 2},
            )
            for row, name in enumerate(names)
            for n in range(6)
        ]
        return SplitSamples(samples, classes=names, groups=["u", "v"])

    splits = {"train": split([*reversed(order)]), "test": split(order[1:])}
    index = write_shards(tmp_path, splits, dataset="fruit", layout="classes", source={})
    named = {name: dataclasses.replace(table, cls_holds="name") for name, table in index.splits.items()}
    return dataclasses.replace(index, splits=named)  # as of foreign tars


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_that_has_a_name_is_the_same_target_in_every_split(fruit: Index, split: str) -> None:
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": ClassTargets(3), "seed": 0}
    source = GroupEpisodes(fruit, split, num_support=2, num_query=3, **words)
    episodes = [source.episode(number) for number in range(4)]
    parts = [part for episode in episodes for part in (episode.support, episode.query)]
    for part in [*parts, GroupSamples(fruit, split, **words).batch(0, 50).arrays]:
        np.testing.assert_array_equal(part["targets"], part["inputs"][:, 0])
        assert part["targets"].dtype == np.int64
    assert not any(episode.broken for episode in episodes)


def test_another_number_of_classes_than_the_index_has_is_refused(fruit: Index) -> None:
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": ClassTargets(2), "seed": 0}
    match = r"data\.targets\.num_classes is 2, and the splits of fruit at .* have 3 classes in all; set it to"
    for open_it in (
        lambda: GroupEpisodes(fruit, "test", num_support=1, num_query=1, **words),
        lambda: GroupSamples(fruit, "test", **words),
    ):
        with pytest.raises(StreamError, match=match):
            open_it()


def test_batches_of_groups_hold_all_samples_evenly(users: Index) -> None:
    samples = GroupSamples(users, "train", inputs=ArrayInputs((2,)), targets=ClassTargets(3), seed=0)
    assert samples.num_classes == 3
    batch = samples.batch(1, 2000).arrays
    counts = np.bincount(batch["inputs"][:, 0].astype(int), minlength=sum(GROUP_SIZES))
    expected = 2000 / sum(GROUP_SIZES)
    assert ((counts - expected) ** 2 / expected).sum() < 2 * sum(GROUP_SIZES)
    np.testing.assert_array_equal(batch["targets"], batch["inputs"][:, 0].astype(int) % 3)
    numbers = GroupSamples(users, "train", inputs=ArrayInputs((2,)), targets=NumberTargets(2), seed=0)
    assert numbers.num_classes is None


def test_groups_that_are_too_small_or_missing_are_refused(users: Index, tmp_path: Path) -> None:
    with pytest.raises(
        StreamError,
        match=r"data\.num_support \+ data\.num_query is 6 \+ 4 = 10, but the largest group of .* has 9 sam",
    ):
        GroupEpisodes(
            users,
            "train",
            inputs=ArrayInputs((2,)),
            targets=ClassTargets(3),
            num_support=6,
            num_query=4,
            seed=0,
        )
    bare = class_set(tmp_path)
    with pytest.raises(StreamError, match=r"split 'train' of tiny at .* have no groups; pack .* --group"):
        GroupSamples(bare, "train", inputs=ImageInputs(6), targets=ClassTargets(10), seed=0)


# ---------------------------------------------------------------- texts


def test_documents_of_tokens_are_cut_as_those_of_bytes(tmp_path: Path) -> None:
    index = document_set(tmp_path, {"train": [40, 60, 25]}, tokens=True)
    source = DocumentEpisodes(
        index, "train", num_support=2, num_query=1, sequence_length=9, vocabulary=200, seed=0
    )
    assert source.num_tasks == 2  # 30 tokens each
    for number in range(4):
        episode = source.episode(number)
        rows = np.concatenate([episode.support["inputs"], episode.query["inputs"]])
        targets = np.concatenate([episode.support["targets"], episode.query["targets"]])
        np.testing.assert_array_equal(rows.ravel(), rows[0, 0] + np.arange(30).reshape(3, 10)[:, :9].ravel())
        np.testing.assert_array_equal(targets, rows + 1)
    small = DocumentEpisodes(
        index, "train", num_support=1, num_query=1, sequence_length=9, vocabulary=90, seed=0
    )
    tasks = [small.episode(number) for number in range(6)]
    assert {task.task for task in tasks} == {"train/0"}  # the tokens of the others are beyond the vocabulary
    reasons = [broken.reason for task in tasks for broken in task.broken]
    assert any(reason.startswith("cannot be decoded: tokens go from 40 to 99, and") for reason in reasons)


def test_texts_are_classified_cut_and_filled_up(tmp_path: Path) -> None:
    texts = [b"a", b"bc", b"d" * 30, b"efg", b"hi", b"jklm"]
    samples = [
        Sample(f"t{n}", {"txt": text, "cls": str(n // 3).encode()}, {"class": n // 3})
        for n, text in enumerate(texts)
    ]
    index = write_shards(
        tmp_path,
        {"train": SplitSamples(samples, classes=["one", "two"])},
        dataset="texts",
        layout="classes",
        source={},
    )
    source = ClassEpisodes(index, "train", ways=Ways(2, 2, 1), inputs=TextInputs(8), seed=0)
    episode = source.episode(0)
    rows = np.concatenate([episode.support["inputs"], episode.query["inputs"]])
    assert rows.shape == (6, 8)
    assert rows.dtype == np.int64
    found = sorted(bytes(row[row >= 0].astype(np.uint8)) for row in rows)
    assert found == sorted(text[:8] for text in texts)
    assert all((row[row.argmin() :] == -1).all() for row in rows if (row < 0).any())


# ---------------------------------------------------------------- ready episodes


def regression(number: int, num_support: int = 3, num_query: int = 2) -> dict[str, bytes]:
    """A ready episode whose numbers tell what it is."""
    arrays = {
        part: np.arange(count * 4, dtype=np.float64).reshape(count, 4) + 100 * number + first
        for part, count, first in (("support", num_support, 0), ("query", num_query, 50))
    }
    members = {f"{part}.inputs.npy": npy(array) for part, array in arrays.items()}
    return members | {f"{part}.targets.npy": npy(array.sum(axis=1)) for part, array in arrays.items()}


def ready(index: Index, inputs: Inputs, targets: Targets | None, **options: Any) -> ReadyEpisodes:
    words: dict[str, Any] = {"num_support": 3, "num_query": 2, "seed": 0} | options
    return ReadyEpisodes(index, "train", inputs=inputs, targets=targets, **words)


def test_ready_episodes_come_once_per_epoch_as_they_were_made(tmp_path: Path) -> None:
    index = ready_set(
        tmp_path, [regression(n) | {"json": facts(task=f"sine {n}")} for n in range(7)], groups=["a", "b"]
    )
    source = ready(index, ArrayInputs((4,)), NumberTargets(1))
    assert source.num_tasks == 7
    orders = set()
    for epoch in range(3):
        episodes = [source.episode(epoch * 7 + place) for place in range(7)]
        orders.add(tuple(episode.task for episode in episodes))
        assert sorted(episode.task for episode in episodes) == [f"sine {n}" for n in range(7)]
        for episode in episodes:
            number = int(episode.task.removeprefix("sine "))
            assert episode.group == "ab"[number % 2]
            for part, count, first in ((episode.support, 3, 0), (episode.query, 2, 50)):
                expected = np.arange(count * 4).reshape(count, 4) + 100 * number + first
                np.testing.assert_array_equal(part["inputs"], expected.astype(np.float32))
                np.testing.assert_array_equal(part["targets"], expected.sum(axis=1, keepdims=True))
    assert len(orders) == 3


def test_examples_may_be_members_of_their_own_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    members = {f"support.{n}.png": png(marked(n)) for n in range(11)} | {"query.0.png": png(marked(900))}
    members |= {"support.targets.npy": npy(np.arange(11) % 4), "query.targets.npy": npy([3])}
    index = ready_set(tmp_path, [members | {"json": facts(num_ways=4, group="rain")}])
    images = ImageInputs(size=6)
    episode = ready(index, images, ClassTargets(5), num_support=11, num_query=1).episode(3)
    expected = np.stack([marked(n) for n in range(11)])[:, :, :, None]
    np.testing.assert_array_equal(episode.support["inputs"], expected)  # 10 is behind 9, not behind 1
    assert episode.support["targets"].tolist() == [n % 4 for n in range(11)]
    assert (episode.num_ways, episode.group, episode.task) == (4, "rain", "e000")
    arrays = {"support.inputs.npy": npy(np.stack([marked(n) for n in range(11)]))}
    arrays |= {name: content for name, content in members.items() if not name.startswith("support.1")}
    together = {n: c for n, c in arrays.items() if n.count(".") == 2 and not n[8:9].isdigit()}
    (tmp_path / "together").mkdir()
    again = ready_set(tmp_path / "together", [together | {"query.0.png": members["query.0.png"]}])
    same = ready(again, images, ClassTargets(5), num_support=11, num_query=1).episode(3)
    np.testing.assert_array_equal(same.support["inputs"], expected)


def test_colour_images_of_one_array_are_taken_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    members = {"support.inputs.npy": npy(pixels[:3]), "query.inputs.npy": npy(pixels[3:])}
    members |= {"support.targets.npy": npy([0, 1, 2]), "query.targets.npy": npy([0, 1])}
    episode = ready(ready_set(tmp_path, [members]), ImageInputs(6, 3), ClassTargets(3)).episode(0)
    np.testing.assert_array_equal(episode.support["inputs"], pixels[:3], strict=True)


def test_ragged_episodes_keep_their_own_counts(tmp_path: Path) -> None:
    index = ready_set(tmp_path, [regression(0, 1, 2), regression(1, 3, 1)])
    source = ready(index, ArrayInputs((4,)), NumberTargets(1), is_ragged=True)
    counts = {
        (len(each.support["targets"]), len(each.query["targets"]))
        for each in (source.episode(0), source.episode(1))
    }
    assert counts == {(1, 2), (3, 1)}


def test_next_tokens_are_the_targets_and_nothing_counts_behind_the_end(tmp_path: Path) -> None:
    tokens = np.array([[5, 6, 7], [8, 9, -1], [3, -1, -1]])
    members = {"support.inputs.npy": npy(tokens), "query.inputs.npy": npy(np.add(tokens[:2], [1, 1, 0]))}
    source = ready(ready_set(tmp_path, [members]), TextInputs(4, 50), None)
    support = source.episode(0).support
    assert support["inputs"].tolist() == [[5, 6, 7, -1], [8, 9, -1, -1], [3, -1, -1, -1]]
    assert support["targets"].tolist() == [[6, 7, -100, -100], [9, -100, -100, -100], [-100] * 4]
    assert source.episode(0).query["targets"].tolist() == [[7, 7, -100, -100], [10, -100, -100, -100]]


CASES: dict[str, tuple[Mapping[str, bytes], str]] = {
    "fewer": (regression(0, 2), "support: it has 2 examples, and 3 are expected"),
    "more": (regression(0, 3, 5), "query: it has 5 examples, and 2 are expected"),
    "shape": (
        regression(0) | {"query.inputs.npy": npy(np.zeros((2, 5)))},
        r"query: inputs are \[2, 5\], and \['N', 4\] is expected",
    ),
    "nan": (
        regression(0) | {"query.inputs.npy": npy(np.full((2, 4), np.nan))},
        "numbers that are not finite in float32",
    ),
    "targets": (
        regression(0) | {"query.targets.npy": npy(np.zeros((2, 2)))},
        r"query: targets have the shape \[2, 2\], and \[N, 1\] is expected",
    ),
    "count": (
        regression(0) | {"query.targets.npy": npy(np.zeros(3))},
        r"query: targets are \[3, 1\], inputs \[2, 4\]",
    ),
    "no targets": (
        {name: content for name, content in regression(0).items() if name != "support.targets.npy"},
        r"support: it has no support\.targets\.npy",
    ),
    "no inputs": (
        {name: content for name, content in regression(0).items() if name != "support.inputs.npy"},
        r"support: it has neither support\.inputs\.npy nor examples support\.0 to support\.0",
    ),
    "gap": (
        {
            **{name: content for name, content in regression(0).items() if name != "support.inputs.npy"},
            **{f"support.{n}.npy": npy(np.zeros(4)) for n in (0, 2, 3)},
        },
        r"support: it has neither .* nor examples support\.0 to support\.2",
    ),
    "json": (regression(0) | {"json": b"{"}, "cannot be decoded"),
    "list": (regression(0) | {"json": b"[]"}, r"its json is \[\], and an object is expected"),
    "ways": (
        regression(0) | {"json": facts(num_ways=1)},
        "its json is .*, whose num_ways, if any, is at least 2",
    ),
    "shared": (
        regression(0) | {"query.inputs.npy": npy(np.arange(8.0)[::-1].reshape(2, 4)[:, ::-1])},
        "example 0 of its query has the inputs of example 1 of its support, and they must share none",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_ready_episode_that_is_not_as_expected_is_broken(tmp_path: Path, case: str) -> None:
    members, reason = CASES[case]
    index = ready_set(tmp_path, [members, regression(7)])
    source = ready(index, ArrayInputs((4,)), NumberTargets(1))
    episodes = [source.episode(0), source.episode(1)]
    assert [episode.task for episode in episodes] == ["e001", "e001"]  # another takes its place
    (broken,) = {each for episode in episodes for each in episode.broken}
    assert (broken.shard, broken.key) == ("train-00000.tar", "e000")
    alone = ready_set(tmp_path / "alone", [members])
    with pytest.raises(SampleError, match=f"{reason}.*There is no other to take its place: mend the data"):
        ready(alone, ArrayInputs((4,)), NumberTargets(1)).episode(0)


@pytest.mark.parametrize(("num_ways", "is_broken"), [(3, True), (4, False), (5, False), (6, True)])
def test_targets_are_below_the_ways_and_ways_within_the_classes(
    tmp_path: Path, num_ways: int, is_broken: bool
) -> None:
    members = regression(0) | {"json": facts(num_ways=num_ways)}
    members |= {"support.targets.npy": npy([0, 1, 2]), "query.targets.npy": npy([0, 3])}
    source = ready(ready_set(tmp_path, [members]), ArrayInputs((4,)), ClassTargets(5))
    if not is_broken:
        assert source.episode(0).num_ways == num_ways
        return
    match = (
        f"its num_ways is {num_ways}, and it must be more than its largest target, 3, and at most the number "
        "of classes, 5"
    )
    with pytest.raises(SampleError, match=match):
        source.episode(0)


def test_texts_of_support_and_query_are_apart(tmp_path: Path) -> None:
    members = {
        "support.inputs.npy": npy([[5, 6], [7, 8]]),
        "query.inputs.npy": npy([[1, -1, -1], [7, 8, -1]]),
    }
    source = ready(ready_set(tmp_path, [members]), TextInputs(4, 50), None, num_support=2)
    with pytest.raises(
        SampleError, match="example 1 of its query has the inputs of example 1 of its support"
    ):
        source.episode(0)


def test_an_empty_split_has_no_episodes(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"split 'train' of ready at .* has no episodes"):
        ready(ready_set(tmp_path, []), ArrayInputs((4,)), NumberTargets(1))


def test_examples_of_ready_episodes_make_ordinary_batches(tmp_path: Path) -> None:
    index = ready_set(tmp_path, [regression(n) for n in range(4)])
    samples = ReadySamples(ready(index, ArrayInputs((4,)), NumberTargets(1)), split="train", seed=0)
    batch = samples.batch(0, 2000).arrays
    assert batch["inputs"].shape == (2000, 4)
    # Each of the 4 * 5 examples is as likely: of 19 degrees of freedom chi-square is above 50 once in 7000.
    _, counts = np.unique(batch["inputs"][:, 0], return_counts=True)
    assert len(counts) == 20
    assert ((counts - 100) ** 2 / 100).sum() < 50
    # Small batches are not of support alone.
    small = [samples.batch(number, 1).arrays["inputs"][0, 0] % 100 for number in range(40)]
    assert 4 < sum(first >= 50 for first in small) < 28
    np.testing.assert_allclose(batch["targets"][:, 0], batch["inputs"].sum(axis=1))
    assert set((batch["inputs"][:, 0] // 100).astype(int)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(samples.batch(0, 2000).arrays["inputs"], batch["inputs"])
    assert not np.array_equal(samples.batch(1, 2000).arrays["inputs"], batch["inputs"])


# ---------------------------------------------------------------- how often storage is asked


@pytest.fixture
def num_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples storage was asked for, each time that it was."""
    counts: list[int] = []
    read_extents = Storage.read_extents

    def counted(self: Storage, extents: Sequence[Extent]) -> list[bytes]:
        counts.append(len(extents))
        return read_extents(self, extents)

    monkeypatch.setattr(Storage, "read_extents", counted)
    return counts


def test_the_documents_of_a_batch_are_read_together(tmp_path: Path, num_asked: list[int]) -> None:
    index = document_set(tmp_path, {"train": [50] * 30, "rehearsal": [60] * 30})
    samples = DocumentSamples(index, ["train", "rehearsal"], sequence_length=40, seed=0)
    samples.batch(0, 24)
    assert len(num_asked) == 2  # of each split its own
    assert 10 < sum(num_asked) <= 24


def test_documents_are_read_together_up_to_a_limit(
    tmp_path: Path, num_asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = document_set(tmp_path, {"train": [50] * 30})
    whole = DocumentSamples(index, ["train"], sequence_length=40, seed=0).batch(0, 24).arrays
    num_asked.clear()
    monkeypatch.setattr(document_episodes, "_READ_TOGETHER_BYTES", 3 * int(index.split("train").length[0]))
    parts = DocumentSamples(index, ["train"], sequence_length=40, seed=0).batch(0, 24).arrays
    assert 4 < len(num_asked) <= 8
    assert max(num_asked) <= 3
    np.testing.assert_array_equal(parts["inputs"], whole["inputs"])


def test_ready_episodes_are_read_some_at_a_time(tmp_path: Path, num_asked: list[int]) -> None:
    index = ready_set(tmp_path, [regression(n) for n in range(20)])
    source = ready(index, ArrayInputs((4,)), NumberTargets(1))
    together = list(source.episodes(range(20)))
    assert num_asked == [8, 8, 4]
    for number, episode in enumerate(together):
        alone = source.episode(number)
        assert (episode.number, episode.task) == (number, alone.task)
        np.testing.assert_array_equal(episode.support["inputs"], alone.support["inputs"])
    num_asked.clear()
    ReadySamples(source, split="train", seed=0).batch(0, 16)
    assert len(num_asked) <= 2
