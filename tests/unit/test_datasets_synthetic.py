"""Computed tasks: their distributions, their functions against closed forms and symmetries, their order."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from metaloom.datasets import EpisodeStream
from metaloom.datasets.episodes import Arrays
from metaloom.datasets.synthetic import (
    Equivariant1d,
    Equivariant2d,
    NonExclusiveSinusoids,
    Sinusoids,
    SyntheticEpisodes,
    SyntheticSamples,
    TaskFamily,
    UnequalScales,
)
from metaloom.errors import StreamError

Floats = NDArray[np.float64]

FAMILIES: tuple[Callable[[], TaskFamily], ...] = (
    Sinusoids,
    NonExclusiveSinusoids,
    lambda: Equivariant1d(rank=2, length=9),
    lambda: Equivariant2d(flips=True, size=6, num_filters=2),
    lambda: UnequalScales(scales={"small": 1.0, "large": 100.0}, length=9, num_targets=4),
)
each_family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make().name)
# float32 rounding of a target of a few units.
ROUNDING = 1e-6


def episodes(
    family: TaskFamily, split: str = "train", *, num_tasks: int | None = None, seed: int = 0
) -> SyntheticEpisodes:
    """Tasks of three support and four query examples."""
    return SyntheticEpisodes(family, split, num_support=3, num_query=4, num_tasks=num_tasks, seed=seed)


def both(source: SyntheticEpisodes, number: int) -> Arrays:
    """Support and query of an episode in one."""
    episode = source.episode(number)
    return {name: np.concatenate([episode.support[name], episode.query[name]]) for name in episode.support}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


# ---------------------------------------------------------------- every family


@each_family
@pytest.mark.parametrize("num_tasks", [None, 5])
def test_an_episode_has_the_shapes_that_its_family_states(
    make: Callable[[], TaskFamily], num_tasks: int | None
) -> None:
    family = make()
    episode = episodes(family, num_tasks=num_tasks).episode(2)
    for part, count in ((episode.support, 3), (episode.query, 4)):
        assert part["inputs"].shape == (count, *family.input_shape)
        assert part["targets"].shape == (count, family.num_targets)
        assert part["inputs"].dtype == part["targets"].dtype == np.float32


@each_family
@pytest.mark.parametrize("num_tasks", [None, 5])
def test_an_episode_follows_from_its_number_alone(
    make: Callable[[], TaskFamily], num_tasks: int | None
) -> None:
    source = episodes(make(), num_tasks=num_tasks)
    first = both(source, 7)
    both(source, 40)
    again = both(pickle.loads(pickle.dumps(source)), 7)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.array_equal(array, both(source, 8)[name])
        assert not np.array_equal(array, both(episodes(make(), num_tasks=num_tasks, seed=1), 7)[name])


@each_family
@pytest.mark.parametrize("num_tasks", [None, 5])
def test_splits_differ(make: Callable[[], TaskFamily], num_tasks: int | None) -> None:
    inputs = [
        {row.tobytes() for number in range(5) for row in both(source, number)["inputs"]}
        for source in (
            episodes(make(), split, num_tasks=num_tasks) for split in ("train", "validation", "test")
        )
    ]
    assert all(len(rows) == 35 for rows in inputs)
    assert len(set[bytes]().union(*inputs)) == 105


def test_another_process_computes_the_same_episode() -> None:
    code = """
import sys
from metaloom.datasets.synthetic import Equivariant1d, SyntheticEpisodes
family = Equivariant1d(rank=2)
source = SyntheticEpisodes(family, "test", num_support=3, num_query=4, num_tasks=9, seed=4)
episode = source.episode(123)
print(episode.support["targets"].tobytes().hex(), episode.query["targets"].tobytes().hex(), end="")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = episodes(Equivariant1d(rank=2), "test", num_tasks=9, seed=4).episode(123)
    expected = [part["targets"].tobytes().hex() for part in (own.support, own.query)]
    assert finished.stdout.split() == expected


@pytest.mark.parametrize("num_tasks", [None, 5])
def test_workers_compute_what_a_thread_computes(num_tasks: int | None) -> None:
    family = Equivariant1d(rank=2, length=9)
    source = episodes(family, num_tasks=num_tasks)
    with EpisodeStream(
        source, tasks_per_step=2, rank=0, world_size=1, start_step=0, stop_step=2, num_workers=1
    ) as stream:
        for step, drawn in stream:
            for place, episode in enumerate(drawn):
                expected = source.episode(2 * step + place)
                np.testing.assert_array_equal(episode.support["targets"], expected.support["targets"])
                np.testing.assert_array_equal(episode.query["inputs"], expected.query["inputs"])


@pytest.mark.parametrize(("num_support", "num_query"), [(0, 1), (1, 0)])
def test_a_task_has_support_and_query(num_support: int, num_query: int) -> None:
    with pytest.raises(StreamError, match=r"data\.num_(support|query) is 0; it must be at least 1"):
        SyntheticEpisodes(
            Sinusoids(), "train", num_support=num_support, num_query=num_query, num_tasks=None, seed=0
        )


# ---------------------------------------------------------------- finitely many tasks


@each_family
def test_each_of_finitely_many_tasks_comes_once_an_epoch_with_the_same_examples(
    make: Callable[[], TaskFamily],
) -> None:
    source = episodes(make(), num_tasks=4)

    def rows(number: int) -> frozenset[bytes]:
        arrays = both(source, number)
        return frozenset(x.tobytes() + y.tobytes() for x, y in zip(*arrays.values(), strict=True))

    epochs = [[rows(number) for number in range(start, start + 4)] for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    names = [{source.episode(number).task for number in range(start, start + 4)} for start in (0, 4)]
    assert names[0] == names[1]


def test_which_examples_are_support_is_drawn_anew() -> None:
    source = episodes(Sinusoids(), num_tasks=1)
    supports = {source.episode(number).support["inputs"].tobytes() for number in range(20)}
    assert len(supports) > 10
    every = {float(x) for number in range(20) for x in source.episode(number).support["inputs"].ravel()}
    assert len(every) == 7


def test_finitely_many_tasks_are_the_same_at_every_seed_of_a_run() -> None:
    one, other = (episodes(Sinusoids(), num_tasks=3, seed=seed) for seed in (0, 1))
    tasks = [{tuple(np.sort(both(source, n)["inputs"].ravel())) for n in range(3)} for source in (one, other)]
    assert tasks[0] == tasks[1]


# ---------------------------------------------------------------- ordinary batches


@each_family
def test_ordinary_samples_of_finitely_many_tasks_are_their_examples(make: Callable[[], TaskFamily]) -> None:
    family = make()
    samples = SyntheticSamples(family, "train", num_tasks=3, num_examples=7, seed=5)
    assert samples.num_classes is None
    batch = samples.batch(0, 40).arrays
    of_tasks = [both(episodes(family, num_tasks=3), number) for number in range(3)]
    known = {
        x.tobytes() + y.tobytes()
        for arrays in of_tasks
        for x, y in zip(arrays["inputs"], arrays["targets"], strict=True)
    }
    drawn = [x.tobytes() + y.tobytes() for x, y in zip(batch["inputs"], batch["targets"], strict=True)]
    assert set(drawn) <= known
    assert len(set(drawn)) > 10
    np.testing.assert_array_equal(samples.batch(0, 40).arrays["inputs"], batch["inputs"])
    assert not np.array_equal(samples.batch(1, 40).arrays["inputs"], batch["inputs"])


def test_ordinary_samples_without_end_are_each_of_another_task() -> None:
    samples = SyntheticSamples(Sinusoids(), "train", num_tasks=None, num_examples=7, seed=5)
    batch = samples.batch(0, 4000).arrays
    assert batch["inputs"].shape == batch["targets"].shape == (4000, 1)
    x, y = batch["inputs"].ravel(), batch["targets"].ravel()
    # E[y | x] = E[A] E[sin(x - phase)] = -2.55 * 2 cos(x) / pi: of the mean task, not of one task. The
    # slope of y over it has a standard error of 0.04.
    mean = -2.55 * 2 * np.cos(x) / np.pi
    assert (mean @ y) / (mean @ mean) == pytest.approx(1.0, abs=0.15)


# ---------------------------------------------------------------- sinusoids


def test_sinusoids_are_the_closed_form() -> None:
    source = episodes(Sinusoids())
    for number in range(20):
        arrays = both(source, number)
        x, y = (arrays[name].astype(np.float64).ravel() for name in ("inputs", "targets"))
        # a sin(x - p) = b sin(x) + c cos(x), with b = a cos(p), c = -a sin(p): the fit leaves nothing.
        basis = np.stack([np.sin(x), np.cos(x)], axis=1)
        (b, c), *_ = np.linalg.lstsq(basis, y)
        np.testing.assert_allclose(basis @ [b, c], y, atol=ROUNDING)
        assert 0.1 - ROUNDING <= np.hypot(b, c) <= 5.0 + ROUNDING
        assert 0.0 <= np.arctan2(-c, b) <= np.pi  # the phase is subtracted, as in the authors' code


def test_sinusoids_have_the_amplitudes_phases_and_inputs_of_the_paper() -> None:
    draws = rng()
    tasks = [Sinusoids().task(draws, split="train") for _ in range(4000)]
    amplitudes = np.array([task.amplitude for task in tasks])
    phases = np.array([task.phase for task in tasks])
    inputs = tasks[0].inputs(draws, 4000)
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, np.pi), (inputs, -5.0, 5.0)):
        assert_uniform(values, low, high)
    assert abs(np.corrcoef(amplitudes, phases)[0, 1]) < 0.08  # five standard errors


def assert_uniform(values: Floats, low: float, high: float) -> None:
    """Values of a uniform distribution: within its bounds, its moments right to five standard errors."""
    width, num = high - low, values.size
    assert low <= values.min() < low + 0.01 * width
    assert high - 0.01 * width < values.max() <= high
    assert values.mean() == pytest.approx((low + high) / 2, abs=5 * width / np.sqrt(12 * num))
    assert values.var() == pytest.approx(width**2 / 12, rel=5 * np.sqrt(0.8 / num))


# ---------------------------------------------------------------- sinusoids that are not exclusive


def test_the_input_of_a_training_task_tells_its_amplitude() -> None:
    source = episodes(NonExclusiveSinusoids(noise_std=0.0))
    amplitudes = np.linspace(0.1, 4.0, 20)
    seen = set()
    for number in range(200):
        arrays = both(source, number)
        u, code = arrays["inputs"][:, :1].astype(np.float64), arrays["inputs"][:, 1:]
        assert (code.sum(axis=1) == 1.0).all()
        (which,) = set(code.argmax(axis=1).tolist())
        seen.add(which)
        assert np.abs(u).max() <= 5.0
        np.testing.assert_allclose(arrays["targets"], amplitudes[which] * np.sin(u), atol=ROUNDING)
    assert len(seen) == 20


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_input_of_a_new_task_tells_nothing(split: str) -> None:
    draws, family = rng(), NonExclusiveSinusoids()
    tasks = [family.task(draws, split=split) for _ in range(4000)]
    amplitudes = np.array([task.amplitude for task in tasks])
    codes = np.array([task.code for task in tasks])
    assert_uniform(amplitudes, 0.1, 4.0)
    assert np.bincount(codes, minlength=20).min() > 120  # of 200 expected: more than five standard errors
    assert abs(np.corrcoef(amplitudes, codes)[0, 1]) < 0.08  # five standard errors


def test_targets_have_the_noise_of_the_paper() -> None:
    plain, noisy = (NonExclusiveSinusoids(noise_std=std) for std in (0.0, 0.1))
    arrays = [family.examples(rng(3), 20_000, split="train") for family in (plain, noisy)]
    np.testing.assert_array_equal(arrays[0]["inputs"], arrays[1]["inputs"])
    noise = arrays[1]["targets"] - arrays[0]["targets"]
    assert noise.std() == pytest.approx(0.1, rel=5 / np.sqrt(40_000))  # five standard errors
    assert abs(noise.mean()) < 5 * 0.1 / np.sqrt(20_000)


def test_some_rows_are_those_of_all() -> None:
    family = NonExclusiveSinusoids()
    whole = family.examples(rng(3), 8, split="train")
    part = family.examples(rng(3), 8, split="train", rows=slice(5, 7))
    for name, array in whole.items():
        np.testing.assert_array_equal(part[name], array[5:7])


# ---------------------------------------------------------------- equivariant layers of one dim


def test_a_layer_of_rank_one_is_a_convolution() -> None:
    task = Equivariant1d(rank=1, length=12).task(rng(), split="train")
    inputs = task.inputs(rng(1), 5)
    for row, target in zip(inputs, task.targets(inputs), strict=True):
        expected = np.correlate(row, task.filters[0], mode="valid")
        np.testing.assert_allclose(target, expected, rtol=1e-13)  # sums of three products in another order


def shift_error(family: Equivariant1d) -> float:
    """How far targets of shifted inputs are from shifted targets."""
    task = family.task(rng(), split="train")
    inputs = task.inputs(rng(1), 5)
    shifted = task.targets(np.roll(inputs, 2, axis=1))[:, 2:]
    return float(np.abs(shifted - task.targets(inputs)[:, :-2]).max())


def test_shifting_the_input_shifts_the_target_at_rank_one_alone() -> None:
    assert shift_error(Equivariant1d(rank=1)) == 0.0
    assert shift_error(Equivariant1d(rank=2)) > 0.1


@pytest.mark.parametrize("rank", [1, 2])
def test_filters_of_all_places_and_tasks_are_mixed_in_the_same_way(rank: int) -> None:
    family, again = Equivariant1d(rank=rank), Equivariant1d(rank=rank)
    draws = rng()
    # [P, tasks * F]: one and the same weights [P, R] times bases [R, tasks * F].
    train = np.concatenate([family.task(draws, split="train").filters for _ in range(30)], axis=1)
    test = np.concatenate([again.task(draws, split="test").filters for _ in range(30)], axis=1)
    values = np.linalg.svd(np.concatenate([train, test], axis=1), compute_uv=False)
    assert (values[:rank] > 1.0).all()
    assert (values[rank:] < 1e-12).all()  # rounding


def test_filters_are_means_of_standard_normal_ones() -> None:
    family, draws = Equivariant1d(rank=5, length=20), rng()
    filters = np.stack([family.task(draws, split="train").filters for _ in range(4000)])
    assert np.abs(filters.mean(axis=0)).max() < 0.08  # five standard errors of a deviation below 1
    # Weights that sum to 1 make variances of 1/5 at least.
    variances = filters.var(axis=0)
    assert 0.18 < variances.min() < variances.max() < 1.0
    ones = np.stack([Equivariant1d(rank=1).task(draws, split="train").filters[0] for _ in range(4000)])
    np.testing.assert_allclose(ones.var(axis=0), 1.0, rtol=5 * np.sqrt(2 / 4000))  # five standard errors


def test_inputs_are_standard_normal() -> None:
    for family in (Equivariant1d(), Equivariant2d(size=10)):
        inputs = family.task(rng(), split="train").inputs(rng(1), 400)
        assert inputs.std() == pytest.approx(1.0, rel=5 / np.sqrt(2 * inputs.size))  # five standard errors
        assert abs(inputs.mean()) < 5 / np.sqrt(inputs.size)


# ---------------------------------------------------------------- equivariant layers of two dims


def channels(family: Equivariant2d, inputs: Floats, *, turns: int = 4) -> Floats:
    """A task's targets as `[N, C, M, R, P, P]`: filters, mirrored or not, turns."""
    task = family.task(rng(), split="train")
    targets = task.targets(inputs)
    side = inputs.shape[-1] - task.filters.shape[-1] + 1
    return targets.reshape(len(inputs), len(task.filters), -1, turns, side, side)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("turns", "filter_size"), [(4, 2), (4, 3), (8, 3)])
def test_turning_an_image_turns_each_channel_and_moves_it_on(
    flips: bool, turns: Literal[4, 8], filter_size: int
) -> None:
    family = Equivariant2d(turns=turns, flips=flips, size=7, num_filters=2, filter_size=filter_size)
    inputs = rng(1).standard_normal((3, 1, 7, 7))
    turned = channels(family, np.rot90(inputs, axes=(2, 3)), turns=turns)
    expected = np.roll(np.rot90(channels(family, inputs, turns=turns), axes=(4, 5)), turns // 4, axis=3)
    np.testing.assert_allclose(turned, expected, atol=1e-14)  # the same sums in another order


@pytest.mark.parametrize("turns", [4, 8])
def test_mirroring_an_image_mirrors_each_channel_and_swaps_the_orientations(turns: Literal[4, 8]) -> None:
    family = Equivariant2d(turns=turns, flips=True, size=7, num_filters=2)
    inputs = rng(1).standard_normal((3, 1, 7, 7))
    mirrored = channels(family, inputs[..., ::-1], turns=turns)
    swapped = -np.arange(turns) % turns
    expected = channels(family, inputs, turns=turns)[:, :, ::-1][:, :, :, swapped][..., ::-1]
    np.testing.assert_allclose(mirrored, expected, atol=1e-14)  # the same sums in another order


@pytest.mark.parametrize("flips", [False, True])
def test_a_turn_by_45_degrees_moves_a_filter_on_by_one_place_of_its_ring(flips: bool) -> None:
    """But for the height of the ring: 1 at the edges, exp(-(sqrt(2) - 1)^2 / 0.32) in the corners."""
    filters = Equivariant2d(turns=8, flips=flips).task(rng(), split="train").filters
    # Counter-clockwise from the right.
    ring = filters[..., [1, 0, 0, 0, 1, 2, 2, 2], [2, 2, 1, 0, 0, 0, 1, 2]]
    heights = np.where(np.arange(8) % 2 == 0, 1.0, math.exp(-((math.sqrt(2) - 1) ** 2) / 0.32))
    assert filters.shape == (3, 16 if flips else 8, 3, 3)
    assert abs(filters[:, 0] - filters[:, 1]).max() > 0.1
    middle = filters[..., 1, 1]
    np.testing.assert_array_equal(middle, np.broadcast_to(middle[:, :1], middle.shape))
    for first in range(0, filters.shape[1], 8):
        values = (ring / heights)[:, first : first + 8]
        for turns in range(8):
            np.testing.assert_allclose(values[:, turns], np.roll(values[:, 0], turns, axis=-1), atol=1e-14)


def test_filters_of_45_degrees_are_as_wide_as_those_of_e2cnn() -> None:
    """Variances along the six directions that its filters span, by e2cnn 0.2.3: `R2Conv` of 8 rotations, from
    the trivial to the regular representation, with the weights of `generalized_he_init`."""
    family, draws = Equivariant2d(turns=8, num_filters=100), rng()
    tasks = [family.task(draws, split="train").filters for _ in range(60)]
    filters = np.concatenate(tasks)[:, 0].reshape(-1, 9)  # one orientation, of 6000 filters
    variances = np.linalg.svd(filters, compute_uv=False) ** 2 / len(filters)
    edge, corner = 4.0, 4 * math.exp(-2 * (math.sqrt(2) - 1) ** 2 / 0.32)
    shares = 2 * np.array([edge, corner]) / (edge + corner) / 8  # of cos and sin of twice the angle
    expected = sorted([shares[0], 1 / 8, 1 / 8, shares[1], 1 / 16, 1 / 16], reverse=True)
    np.testing.assert_allclose(variances[:6], expected, rtol=5 * math.sqrt(2 / 6000))  # five standard errors
    np.testing.assert_allclose(variances[6:], 0.0, atol=1e-28)
    np.testing.assert_allclose(expected, [0.1862, 0.125, 0.125, 0.0638, 0.0625, 0.0625], atol=1e-4)


def test_shifting_an_image_shifts_the_target() -> None:
    family = Equivariant2d(size=7, num_filters=2)
    inputs = rng(1).standard_normal((3, 1, 7, 7))
    shifted = channels(family, np.roll(inputs, 1, axis=3))[..., 1:]
    np.testing.assert_array_equal(shifted, channels(family, inputs)[..., :-1])


def test_a_channel_is_the_correlation_with_its_filter() -> None:
    family = Equivariant2d(flips=True, size=5, num_filters=2)
    filters = family.task(rng(), split="train").filters[:, 0]
    inputs = rng(1).standard_normal((1, 1, 5, 5))
    found = channels(family, inputs)[0]
    for row in range(3):
        for column in range(3):
            window = inputs[0, 0, row : row + 3, column : column + 3]
            plain, mirrored = (
                (filters * window).sum(axis=(1, 2)),
                (filters[..., ::-1] * window).sum(axis=(1, 2)),
            )
            np.testing.assert_allclose(found[:, 0, 0, row, column], plain, atol=1e-14)
            np.testing.assert_allclose(found[:, 1, 0, row, column], mirrored, atol=1e-14)


def test_targets_of_two_dims_have_variance_one() -> None:
    family, draws = Equivariant2d(size=8, num_filters=1), rng()
    targets = [family.examples(draws, 4, split="train")["targets"] for _ in range(1000)]
    # The variance of a task's targets is that of chi-squared of nine values over nine: five standard errors.
    assert np.var(targets) == pytest.approx(1.0, abs=5 * np.sqrt(2 / 9 / 1000))


# ---------------------------------------------------------------- regressions of unequal size


SCALES = {"small": 1.0, "middle": 3.0, "large": 100.0}


def test_groups_come_in_turn_in_episodes_without_end_and_in_epochs() -> None:
    family = UnequalScales(scales=SCALES, length=5, num_targets=4)
    endless = episodes(family)
    assert [endless.episode(number).group for number in range(6)] == [*SCALES, *SCALES]
    counted = episodes(family, num_tasks=6)
    epoch = [counted.episode(number) for number in range(6)]
    assert sorted(str(episode.group) for episode in epoch) == sorted([*SCALES, *SCALES])
    assert all(episode.group == tuple(SCALES)[int(episode.task.split()[-1]) % 3] for episode in epoch)
    assert episodes(Sinusoids()).episode(0).group is None


def test_targets_are_scaled_hyperbolic_tangents_of_matrices_that_all_splits_share() -> None:
    """Found from examples alone: atanh(y / scale) is linear in x, and its matrix is a group's for good."""
    length, num_targets = 5, 4
    family = UnequalScales(scales=SCALES, length=length, num_targets=num_targets)

    def matrix(split: str, group: int) -> Floats:
        arrays = family.examples(rng(group), 400, split=split, group=group)
        inputs = arrays["inputs"].astype(np.float64)
        values = arrays["targets"].astype(np.float64) / list(SCALES.values())[group]
        assert (np.abs(values) <= 1.0).all()
        small = (np.abs(values) < 0.99).all(axis=1)  # where float32 leaves digits to atanh
        found, *_ = np.linalg.lstsq(inputs[small], np.arctanh(values[small]), rcond=None)
        return np.asarray(found, np.float64)

    for group in range(3):
        np.testing.assert_allclose(matrix("train", group), matrix("test", group), rtol=1e-3, atol=1e-3)
    assert np.abs(matrix("train", 0) - matrix("train", 1)).max() > 0.5


def test_what_regressions_share_is_larger_than_what_they_have_of_their_own() -> None:
    family = UnequalScales(scales={str(number): 1.0 for number in range(8)}, length=100, num_targets=80)
    weights = np.stack([10.0 * family.task(rng(), split="train", group=group).weights for group in range(8)])
    assert np.var(weights.mean(axis=0)) == pytest.approx(10.0 + 3.5 / 8, rel=0.05)
    assert np.var(weights - weights.mean(axis=0), ddof=0) == pytest.approx(3.5 * 7 / 8, rel=0.05)
    inputs = family.examples(rng(), 2000, split="train")["inputs"]
    assert float(np.var(inputs)) == pytest.approx(1.0, rel=0.02)


def test_ordinary_samples_are_of_all_groups() -> None:
    family = UnequalScales(scales=SCALES, length=5, num_targets=4)
    batch = SyntheticSamples(family, "train", num_tasks=None, num_examples=1, seed=0).batch(0, 300)
    largest = np.abs(batch.arrays["targets"]).max(axis=1)
    counts = [int(((low < largest) & (largest <= high)).sum()) for low, high in ((0, 1), (1, 3), (3, 100))]
    assert all(count > 50 for count in counts)
