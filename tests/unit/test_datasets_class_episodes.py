"""Few-shot tasks from class-grouped data: which classes, samples, labels and distortions an episode has."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets import (
    NUM_STREAMS,
    Affine,
    ClassEpisodes,
    ClassSamples,
    Episode,
    ImageInputs,
    Index,
    SampleError,
    VariableWays,
    Ways,
    Window,
)
from metaloom.datasets.class_episodes import fixed_labels
from metaloom.datasets.pixels import as_numbers
from metaloom.errors import StreamError
from metaloom.recipe import load_recipe
from metaloom.sources import episode_source, open_data
from tests.commands import RECIPES
from tests.tiny_sets import CLASS_SIZES, class_set, numbers_of

IMAGES = ImageInputs(size=6)
CLASS_OF = [row for row, size in enumerate(CLASS_SIZES) for _ in range(size)]
TOLERATED = 1e-4  # of seeds would fail; these are fixed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return class_set(tmp_path_factory.mktemp("tiny"))


def chi_square_bound(degrees: int) -> float:
    """What a chi-square exceeds with the probability TOLERATED (Wilson and Hilferty 1931)."""
    z, spread = 3.719, 2 / (9 * degrees)
    return float(degrees * (1 - spread + z * math.sqrt(spread)) ** 3)


def chi_square(counts: dict[int, int] | Counter[int], expected: float, values: int) -> float:
    return sum((counts.get(value, 0) - expected) ** 2 / expected for value in range(values))


def classes_of(episode: Episode, class_of: list[int] = CLASS_OF) -> list[int]:
    """The class of each label, checked for every sample."""
    found: dict[int, set[int]] = {}
    for part in (episode.support, episode.query):
        for number, target in zip(numbers_of(part["inputs"]), part["targets"].tolist(), strict=True):
            found.setdefault(target, set()).add(class_of[number])
    assert sorted(found) == list(range(len(found)))
    assert all(len(each) == 1 for each in found.values())
    return [next(iter(found[label])) for label in range(len(found))]


def require_apart(episode: Episode) -> None:
    """No sample comes twice, be it in one part or in both."""
    numbers = numbers_of(episode.support["inputs"]) + numbers_of(episode.query["inputs"])
    assert len(set(numbers)) == len(numbers)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)).filter(
    lambda shape: sum(size >= shape[1] + shape[2] for size in CLASS_SIZES) >= shape[0]
)


@given(shape=shapes, seed=st.integers(0, 2**63), number=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_support_and_query_never_share_a_sample(
    tiny: Index, shape: tuple[int, int, int], seed: int, number: int
) -> None:
    n_way, n_shot, n_query = shape
    episode = ClassEpisodes(tiny, "train", ways=Ways(*shape), inputs=IMAGES, seed=seed).episode(number)
    require_apart(episode)
    assert len(set(classes_of(episode))) == n_way
    assert episode.support["inputs"].shape == (n_way * n_shot, 6, 6, 1)
    assert np.bincount(episode.query["targets"]).tolist() == [n_query] * n_way
    assert episode.task == " | ".join(f"class {row:03}" for row in sorted(classes_of(episode)))
    assert episode.num_ways == n_way
    assert episode.broken == ()


def test_classes_samples_and_labels_come_equally_often(tiny: Index) -> None:
    source = ClassEpisodes(tiny, "train", ways=Ways(4, 1, 1), inputs=IMAGES, seed=0)
    classes: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    of_largest: Counter[int] = Counter()
    for number in range(1500):
        episode = source.episode(number)
        drawn = classes_of(episode)
        classes.update(drawn)
        labels.update(label for label, row in enumerate(drawn) if row == 3)
        of_largest.update(n for n in numbers_of(episode.query["inputs"]) if CLASS_OF[n] == 7)
    num_classes = len(CLASS_SIZES)
    # Drawn without replacement, counts of classes vary less than those of independent draws.
    assert chi_square(classes, 1500 * 4 / num_classes, num_classes) < chi_square_bound(num_classes - 1)
    assert chi_square(labels, sum(labels.values()) / 4, 4) < chi_square_bound(3)
    first = CLASS_OF.index(7)
    shifted = Counter({n - first: count for n, count in of_largest.items()})
    assert chi_square(shifted, sum(shifted.values()) / 20, 20) < chi_square_bound(19)


def test_kept_labels_are_always_the_same_and_each_episode_has_all_of_them(tiny: Index) -> None:
    source = ClassEpisodes(tiny, "train", ways=Ways(3, 1, 1), inputs=IMAGES, labels="kept", seed=5)
    label_of: dict[int, set[int]] = {}
    for number in range(200):
        episode = source.episode(number)
        require_apart(episode)
        for label, row in enumerate(classes_of(episode)):
            label_of.setdefault(row, set()).add(label)
    assert len(label_of) == len(CLASS_SIZES)
    assert all(len(labels) == 1 for labels in label_of.values())
    dealt = Counter(next(iter(labels)) for labels in label_of.values())
    assert max(dealt.values()) - min(dealt.values()) <= 1
    others = ClassEpisodes(tiny, "train", ways=Ways(3, 1, 1), inputs=IMAGES, labels="kept", seed=6)
    rows = classes_of(others.episode(0))
    assert any({label} != label_of[row] for label, row in enumerate(rows))
    for seed in range(5):
        labels = fixed_labels(100, 7, seed=seed, split="train")
        assert set(np.bincount(labels, minlength=7).tolist()) == {14, 15}


def test_twenty_ways_mix_classes_of_any_shards(tmp_path: Path) -> None:
    index = class_set(tmp_path, [4] * 40, shard_limit_bytes=20_000)
    assert len(index.shards) > 10
    shard_of_class = index.split("train").shard[::4]
    class_of = [n // 4 for n in range(160)]
    source = ClassEpisodes(index, "train", ways=Ways(20, 1, 1), inputs=IMAGES, seed=0)
    for number in range(10):
        drawn = classes_of(source.episode(number), class_of)
        assert len(set(drawn)) == 20
        assert len({int(shard_of_class[row]) for row in drawn}) > len(index.shards) // 2


# ---------------------------------------------------------------- variable ways and shots


def drawn_by_the_paper(
    rng: random.Random, sizes: list[int], rules: VariableWays
) -> tuple[int, list[int], int]:
    """(ways, shots of each class, query samples per class): Triantafillou et al. 2020, section 3.2, on
    classes of these sizes; the minima of the appendix of their code are `rules`."""
    ways = rng.randint(rules.min_way, min(rules.max_way, len(sizes)))
    chosen = rng.sample(sizes, ways)
    q = min([rules.max_query] + [math.floor(0.5 * im) for im in chosen])
    beta = 1.0 - rng.random()
    total = 0
    for im in chosen:
        total += math.ceil(beta * min(rules.max_shot, im - q))
    total = min(rules.max_support, total)
    proportional = [math.exp(rng.uniform(math.log(0.5), math.log(2.0))) * im for im in chosen]
    ratio = [weight / sum(proportional) for weight in proportional]
    shots = [min(math.floor(r * (total - ways)) + 1, im - q) for r, im in zip(ratio, chosen, strict=True)]
    return ways, shots, q


@pytest.mark.parametrize(
    ("rules", "sizes"),
    [
        (VariableWays(2, 6, 30, 10, 3), [2, 3, 5, 8, 13, 21, 34, 55, 8, 8]),
        (VariableWays(3, 50, 50, 100, 10), [2, 3, 5, 8, 13, 21, 34, 55, 8, 8]),
        (VariableWays(2, 3, 4, 2, 1), [2, 3, 5, 8, 13, 21, 34, 55, 8, 8]),
        (VariableWays(5, 8, 400, 100, 10), [1000] * 10),  # where classes differ by their draws alone
    ],
)
def test_variable_ways_and_shots_agree_with_the_paper(rules: VariableWays, sizes: list[int]) -> None:
    plain = random.Random(0)
    expected = np.array([measures(*drawn_by_the_paper(plain, sizes, rules)) for _ in range(6000)])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(6000):
        ways = rules.num_classes(rng, len(sizes))
        chosen = rng.choice(np.array(sizes, np.int64), ways, replace=False)
        shots, q = rules.draw(rng, chosen)
        assert rules.min_way <= ways <= min(rules.max_way, len(sizes))
        assert 1 <= q <= min(rules.max_query, int(chosen.min()) // 2)
        assert (shots >= 1).all()
        assert (shots <= chosen - q).all()
        assert shots.sum() <= rules.max_support
        drawn.append(measures(ways, shots.tolist(), q))
    found = np.array(drawn)
    error = np.sqrt((found.var(axis=0) + expected.var(axis=0)) / 6000) + 1e-12
    assert (np.abs(found.mean(axis=0) - expected.mean(axis=0)) / error < 4.5).all()
    # Spreads too: a share that was always 1 has nearly the right ways, and not these.
    assert np.allclose(found.std(axis=0), expected.std(axis=0), rtol=0.1, atol=1e-12)


def measures(ways: int, shots: list[int], num_query: int) -> list[float]:
    return [ways, sum(shots), max(shots), min(shots), max(shots) / min(shots), num_query]


def test_episodes_of_variable_ways_keep_all_bounds(tiny: Index) -> None:
    rules = VariableWays(min_way=2, max_way=6, max_support=20, max_shot=5, max_query=3)
    source = ClassEpisodes(tiny, "train", ways=rules, inputs=IMAGES, seed=0)
    seen = set()
    for number in range(150):
        episode = source.episode(number)
        require_apart(episode)
        rows = classes_of(episode)
        assert episode.num_ways == len(rows)
        shots = np.bincount(episode.support["targets"])
        queries = np.bincount(episode.query["targets"])
        assert len(shots) == len(queries) == len(rows)
        assert len(set(queries.tolist())) == 1
        assert shots.sum() <= 20
        assert 1 <= queries[0] <= 3
        assert all(s + queries[0] <= CLASS_SIZES[row] for s, row in zip(shots, rows, strict=True))
        seen.add(len(rows))
    assert seen == {2, 3, 4, 5, 6}


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("ways", [Ways(3, 2, 3), VariableWays(2, 3, 10, 5, 2)])
def test_an_episodes_classes_lie_in_its_streams_window_and_all_get_their_turn(
    tiny: Index, ways: Ways | VariableWays
) -> None:
    source = ClassEpisodes(tiny, "train", ways=ways, inputs=IMAGES, window=Window(4, 12), seed=0)
    met: set[int] = set()
    for stream, stay in itertools.product((0, 9, 63), range(2)):
        drawn = [
            classes_of(source.episode(stream + NUM_STREAMS * (12 * stay + position)))
            for position in range(12)
        ]
        assert all(len(rows) == 3 or isinstance(ways, VariableWays) for rows in drawn)
        rows = set(itertools.chain.from_iterable(drawn))
        assert len(rows) == 4
        met |= rows
    # Of classes that are too small for these tasks, a window holds none.
    usable = {row for row, size in enumerate(CLASS_SIZES) if size >= ways.min_samples}
    for number in range(0, 200 * NUM_STREAMS, 3 * NUM_STREAMS):
        met |= set(classes_of(source.episode(number)))
    assert met == usable


# ---------------------------------------------------------------- distortion


def test_what_is_asked_for_is_distorted_alone(tiny: Index) -> None:
    def source(affine: Affine | None, query_affine: Affine | None) -> ClassEpisodes:
        return ClassEpisodes(
            tiny, "train", ways=Ways(3, 2, 1), inputs=IMAGES, affine=affine, query_affine=query_affine, seed=2
        )

    turn = Affine(rotate_deg=90)
    plain, asked, both = (source(*pair).episode(4) for pair in ((None, None), (None, turn), (turn, turn)))
    assert np.array_equal(plain.support["inputs"], asked.support["inputs"])
    assert not np.array_equal(as_numbers(plain.query["inputs"]), asked.query["inputs"])
    assert np.array_equal(plain.query["targets"], asked.query["targets"])
    assert not np.array_equal(as_numbers(plain.support["inputs"]), both.support["inputs"])
    once = source(turn, None).episode(4)
    assert np.array_equal(once.support["inputs"], both.support["inputs"])
    assert not np.array_equal(once.query["inputs"], both.query["inputs"])


def test_all_channels_are_distorted_alike() -> None:
    image = np.random.default_rng(0).random((5, 1, 9, 9)).astype(np.float32)
    colours = np.concatenate([image, 0.5 * image, image], axis=1)
    affine = Affine(rotate_deg=40, shear_deg=20, scale=0.3, shift_px=2)
    moved = affine.distort(colours, np.random.default_rng(7))
    assert moved.shape == colours.shape
    assert np.array_equal(moved[:, 0], moved[:, 2])
    np.testing.assert_allclose(moved[:, 1], 0.5 * moved[:, 0], atol=1e-6)
    grey = affine.distort(image[:, 0], np.random.default_rng(7))
    np.testing.assert_array_equal(moved[:, 0], grey)  # channels take no draws of their own
    assert not np.array_equal(moved[:, 0], image[:, 0])


def test_query_images_are_augmented_in_training_alone(tmp_path: Path) -> None:
    class_set(tmp_path / "set", splits=("train", "validation", "test"))
    words = [f"data.url={tmp_path}/set", "data.inputs.size=6"]
    plain = load_recipe(RECIPES / "smoke.yaml", words)
    augmented = load_recipe(RECIPES / "smoke.yaml", [*words, "data.query_affine={rotate_deg: 90}"])
    data = open_data(plain)
    for split in ("train", "validation", "test"):
        without, distorted = (
            episode_source(recipe, data, split, seed=0, num_steps=1).episode(3)
            for recipe in (plain, augmented)
        )
        is_same = np.array_equal(without.query["inputs"], distorted.query["inputs"])
        assert without.query["inputs"].dtype == np.uint8
        assert is_same == (split != "train")
        assert np.array_equal(without.support["inputs"], distorted.support["inputs"])
    data.close()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"ways": Ways(11, 1, 1)},
            r"data\.n_way is 11, but split 'train' of tiny at .* has 10 classes; lower data\.n_way to",
        ),
        (
            {"ways": Ways(3, 5, 7)},
            r"takes 12 samples of each of 3 classes, and 2 of the 10 classes .* have so many; lower the "
            r"samples per class to at most 9, or",
        ),
        (
            {"ways": VariableWays(min_way=11, max_way=12)},
            r"data\.variable\.min_way is 11, but split 'train'",
        ),
        (
            {"ways": VariableWays(2, 5), "labels": "kept"},
            r"data\.labels is kept, .* data\.variable draws tasks of any number",
        ),
        (
            {"ways": Ways(5, 1, 1), "window": Window(4, 1)},
            r"data\.window\.num_classes is 4, and a task may have 5 classes; raise it to at least that",
        ),
        (
            {"ways": Ways(2, 1, 1), "window": Window(4, 1), "labels": "kept"},
            r"data\.window draws from a few classes at a time, and data\.labels is kept: leave one out",
        ),
        (
            {"ways": Ways(4, 4, 4), "labels": "kept", "seed": 1},
            r"data\.labels is kept, and [1-3] of the 4 labels have no class with 8 samples in split 'train'",
        ),
    ],
)
def test_tasks_that_the_data_cannot_give_are_refused(
    tiny: Index, options: dict[str, Any], match: str
) -> None:
    words: dict[str, Any] = {"seed": 0} | options
    with pytest.raises(StreamError, match=match):
        ClassEpisodes(tiny, "train", inputs=IMAGES, **words)


def test_variable_ways_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(StreamError, match=r"min_way is 6, max_way 5 and max_support 500; they must not fall"):
        VariableWays(6, 5)
    with pytest.raises(StreamError, match=r"data\.variable\.max_shot is 0; it must be at least 1"):
        VariableWays(max_shot=0)


def test_a_wrong_reading_of_all_samples_ends_soon(tmp_path: Path) -> None:
    index = class_set(tmp_path, [1200, 1200])
    source = ClassEpisodes(index, "train", ways=Ways(2, 1, 1), inputs=ImageInputs(size=6), seed=0)
    assert source.episode(0).broken == ()
    (tmp_path / "other").mkdir()
    broken = class_set(tmp_path / "other", [1200, 1200], broken_images=range(2400))
    with pytest.raises(
        SampleError, match=r"cannot be decoded: .*\. So were 999 that were tried before it"
    ) as e:
        ClassEpisodes(broken, "train", ways=Ways(2, 1, 1), inputs=IMAGES, seed=0).episode(0)
    assert len(set(e.value.all_broken)) == 1000
    with pytest.raises(SampleError, match="No other of its class is whole: mend the data"):
        ClassSamples(broken, "train", inputs=IMAGES, seed=0).batch(0, 1)
