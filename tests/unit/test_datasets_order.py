"""Which sample, class or source comes when: epochs, windows, mixtures."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from metaloom.datasets import (
    NUM_STREAMS,
    Batch,
    ClassSamples,
    DocumentEpisodes,
    DocumentSamples,
    Episode,
    EpisodeSource,
    GroupSamples,
    MixedSamples,
    Mixture,
    Rehearsed,
    Window,
    order,
)
from metaloom.datasets.decoders import ArrayInputs, ClassTargets, ImageInputs
from metaloom.datasets.order import ClassWindows, EpochOrder
from metaloom.errors import StreamError
from tests.tiny_sets import class_set, document_set, group_set


def epoch_order(lengths: list[int], seed: int = 0) -> EpochOrder:
    return EpochOrder(np.array(lengths, np.int64), purpose="test", seed=seed, split="train")


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=1500),
    stretch_bytes=st.sampled_from([16, 50, 1 << 22]),
    epoch=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_each_item_comes_once_per_epoch_whatever_the_sizes(
    lengths: list[int], stretch_bytes: int, epoch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "STRETCH_BYTES", stretch_bytes)
        items = epoch_order(lengths)
        drawn = [items.item(epoch * len(lengths) + place) for place in range(len(lengths))]
    assert sorted(drawn) == list(range(len(lengths)))


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_stream_is_within_eight_stretches_at_a_time(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    monkeypatch.setattr(order, "STRETCH_BYTES", 1000)
    rng = np.random.default_rng(5)
    lengths = rng.integers(20, 200, size=11_003)
    ends = np.cumsum(lengths)
    assert ends[-1] > 1000 * 8 * NUM_STREAMS
    items = epoch_order(lengths.tolist())
    M = len(lengths)
    by_stream: dict[int, list[int]] = {}
    for number in range(epoch * M, (epoch + 1) * M):
        by_stream.setdefault(number % NUM_STREAMS, []).append(int(ends[items.item(number)] - 1) // 1000)
    for stretches in by_stream.values():
        first = {stretch: place for place, stretch in reversed(list(enumerate(stretches)))}
        last = {stretch: place for place, stretch in enumerate(stretches)}
        open_at_once = [
            sum(first[stretch] <= place <= last[stretch] for stretch in first)
            for place in range(len(stretches))
        ]
        assert max(open_at_once) <= 8
        assert np.mean(open_at_once) > 4  # and they are shuffled, not gone through one by one
    # Neighbours in a stretch do not stay neighbours.
    drawn = [items.item(number) for number in range(0, M, NUM_STREAMS)]
    assert np.mean(np.abs(np.diff(drawn)) == 1) < 0.2


def test_orders_differ_by_epoch_and_seed_and_not_by_what_was_asked_before() -> None:
    def drawn(items: EpochOrder, epoch: int) -> list[int]:
        return [items.item(epoch * 50 + place) for place in range(50)]

    lengths = [1] * 50
    one, other = epoch_order(lengths), epoch_order(lengths)
    epochs = [drawn(one, epoch) for epoch in range(4)]
    assert [drawn(other, epoch) for epoch in (3, 1, 2, 0)] == [epochs[e] for e in (3, 1, 2, 0)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert drawn(epoch_order(lengths, seed=1), 0) != epochs[0]


def test_streams_that_cross_the_end_of_an_epoch_apart_shuffle_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    shuffle = EpochOrder._order

    def noted(self: EpochOrder, epoch: int) -> NDArray[np.int64]:
        made.append(epoch)
        return shuffle(self, epoch)

    monkeypatch.setattr(EpochOrder, "_order", noted)
    items = epoch_order([1] * 100)
    for place in range(90, 110):
        items.item(place)
        items.item(place + 10)
    assert made == [0, 1]


# ---------------------------------------------------------------- windows


@given(num_classes=st.integers(2, 40), size=st.integers(1, 40), num_episodes=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_stream_stays_in_a_window_and_goes_through_all_classes(
    num_classes: int, size: int, num_episodes: int
) -> None:
    classes = np.arange(num_classes) * 3 + 1  # rows of usable classes need not be neighbours
    windows = ClassWindows(classes, Window(size, num_episodes), seed=0, split="train")
    stream = 17
    per_round = num_episodes * max(1, num_classes // min(size, num_classes))
    seen = [
        tuple(windows.classes(stream + NUM_STREAMS * position).tolist()) for position in range(3 * per_round)
    ]
    if size >= num_classes:
        assert set(seen) == {tuple(classes.tolist())}
        return
    for start in range(0, len(seen), num_episodes):
        assert len(set(seen[start : start + num_episodes])) == 1
    for start in range(0, len(seen), per_round):
        turn = list(itertools.chain.from_iterable(dict.fromkeys(seen[start : start + per_round])))
        assert len(turn) == len(set(turn)) == num_classes // size * size
        assert set(turn) <= set(classes.tolist())


# ---------------------------------------------------------------- mixtures


class Own(EpisodeSource):
    """Episodes that tell their own number."""

    def episode(self, number: int) -> Episode:
        part = {"inputs": np.array([number]), "targets": np.array([number])}
        return Episode(number=number, task=str(number), support=part, query=part)


@given(
    weights=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    num_blocks=st.integers(1, 4),
    stream=st.integers(0, NUM_STREAMS - 1),
)
@settings(max_examples=30, deadline=None)
def test_shares_are_exact_and_own_numbers_follow_one_another(
    weights: list[int], num_blocks: int, stream: int
) -> None:
    mixture = Mixture([Own()] * len(weights), weights, seed=0, split="train")
    places = [mixture.place(stream + NUM_STREAMS * position) for position in range(256 * num_blocks)]
    for source, weight in enumerate(weights):
        own = [number for which, number in places if which == source]
        assert own == [stream + NUM_STREAMS * position for position in range(len(own))]
        assert abs(len(own) - 256 * num_blocks * weight / sum(weights)) < 1


def test_a_mixtures_sources_are_shuffled_within_a_block() -> None:
    mixture = Mixture([Own(), Own()], [1, 1], seed=0, split="train")
    sources = [mixture.place(NUM_STREAMS * position)[0] for position in range(256)]
    assert 90 < sum(a != b for a, b in itertools.pairwise(sources)) < 166  # of 255; 127 +- 8 of a coin
    other = Mixture([Own(), Own()], [1, 1], seed=1, split="train")
    assert [other.place(NUM_STREAMS * position)[0] for position in range(256)] != sources


def test_a_parts_documents_come_once_in_each_of_its_own_epochs(tmp_path: Path) -> None:
    parts = [
        document_set(tmp_path / str(size), {"train": [size] * count}) for size, count in ((50, 40), (60, 24))
    ]
    sources = [
        DocumentEpisodes(part, "train", num_support=1, num_query=1, sequence_length=4, seed=0)
        for part in parts
    ]
    mixture = Mixture(sources, [5, 3], seed=0, split="train")
    places = {number: mixture.place(number) for number in range(32 * NUM_STREAMS)}
    assert len(set(places.values())) == len(places)  # no source repeats a number
    for source, num_tasks in ((0, 40), (1, 24)):
        tasks = {
            mixture.episode(number).task
            for number, (which, own) in places.items()
            if which == source and num_tasks <= own < 2 * num_tasks
        }
        assert len(tasks) == num_tasks
    assert mixture.episode(7).number == 7


def test_a_part_of_less_than_one_episode_in_256_is_refused() -> None:
    Mixture([Own(), Own()], [1, 255], seed=0, split="train")
    with pytest.raises(
        StreamError,
        match=r"data\.parts: a weight is 1 of 257 in all; a part needs at least one episode in 256: raise it",
    ):
        Mixture([Own(), Own()], [1, 256], seed=0, split="train")
    with pytest.raises(StreamError, match="a weight is 1 of nan in all"):
        Mixture([Own(), Own()], [1, float("nan")], seed=0, split="train")


def test_mixed_samples_keep_the_classes_of_their_sources_apart(tmp_path: Path) -> None:
    images = ImageInputs(size=6)
    parts = [
        ClassSamples(class_set(tmp_path / str(row), sizes), "train", seed=0, inputs=images)
        for row, sizes in enumerate(([3, 4], [5, 6, 7]))
    ]
    mixed = MixedSamples(parts, [1, 3], seed=0, purpose="pretrain")
    assert mixed.num_classes == 5
    targets = mixed.batch(0, 4000).arrays["targets"]
    counts = Counter(targets.tolist())
    expected = {0: 500, 1: 500, 2: 1000, 3: 1000, 4: 1000}
    assert counts.keys() == expected.keys()
    # Chi-square of 4 degrees of freedom: above 23.5 once in ten thousand seeds.
    assert sum((counts[row] - count) ** 2 / count for row, count in expected.items()) < 23.5
    again = MixedSamples(parts, [1, 3], seed=0, purpose="pretrain").batch(0, 4000)
    assert np.array_equal(again.arrays["targets"], targets)
    other = MixedSamples(parts, [1, 3], seed=0, purpose="baseline").batch(0, 4000)
    assert not np.array_equal(other.arrays["targets"], targets)


def test_mixed_samples_leave_classes_that_the_data_state_as_they_are(tmp_path: Path) -> None:
    users = group_set(tmp_path / "users")  # of sample n, the first input is n and the class n % 3
    words: dict[str, Any] = {"inputs": ArrayInputs((2,)), "targets": ClassTargets(3)}
    stated = [GroupSamples(users, "train", seed=seed, **words) for seed in range(2)]
    mixed = MixedSamples(stated, [1, 1], seed=0, purpose="pretrain")
    batch = mixed.batch(0, 200).arrays
    assert mixed.num_classes == 3
    np.testing.assert_array_equal(batch["targets"], batch["inputs"][:, 0] % 3)
    own = ClassSamples(class_set(tmp_path / "own", [3, 4]), "train", seed=0, inputs=ImageInputs(size=6))
    both = MixedSamples([own, stated[0]], [1, 0], seed=0, purpose="pretrain")
    assert both.num_classes == 5
    assert set(both.batch(0, 50).arrays["targets"].tolist()) == {3, 4}


def test_what_is_rehearsed_follows_from_the_number_and_inner_and_outer_data_differ(tmp_path: Path) -> None:
    texts = document_set(tmp_path, {"train": [500] * 3, "rehearsal": [4000, 3000]})
    tasks = DocumentEpisodes(texts, "train", num_support=1, num_query=1, sequence_length=32, seed=0)

    def rehearsed(num_inner: int, num_outer: int, split: str = "train", seed: int = 0) -> Rehearsed:
        samples = DocumentSamples(texts, ["rehearsal"], sequence_length=32, seed=9)
        counts = {"num_inner": num_inner, "num_outer": num_outer}
        return Rehearsed(tasks, samples, **counts, seed=seed, split=split)

    def drawn(source: Rehearsed, number: int) -> list[bytes]:
        episode = source.episode(number)
        assert episode.task == tasks.episode(number).task
        parts = [part["inputs"] for part in (episode.rehearsal, episode.outer_rehearsal) if part is not None]
        return [row.tobytes() for part in parts for row in part]

    one = rehearsed(5, 3)
    assert [drawn(one, n) for n in range(4)] == [drawn(rehearsed(5, 3), n) for n in (0, 1, 2, 3)]
    assert drawn(one, 2) == drawn(one, 2)
    rows = [row for number in range(40) for row in drawn(one, number)]
    # 40 x 8 of 6936 stretches, drawn evenly with replacement: that 20 would be equal happens to no seed.
    assert len(set(rows)) > len(rows) - 20
    episode = one.episode(0)
    assert episode.rehearsal is not None
    assert episode.outer_rehearsal is not None
    assert episode.rehearsal["targets"].shape == (5, 32)
    assert episode.outer_rehearsal["targets"].shape == (3, 32)
    assert drawn(rehearsed(5, 3, split="validation"), 0) != drawn(one, 0) != drawn(rehearsed(5, 3, seed=1), 0)
    assert rehearsed(0, 3).episode(0).rehearsal is None
    assert rehearsed(3, 0).episode(0).outer_rehearsal is None
    assert isinstance(DocumentSamples(texts, ["train"], sequence_length=4, seed=0).batch(0, 2), Batch)
