"""Episodes and batches: pure functions of their number, with support and query kept apart."""

import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metaloom.datasets import (
    Affine,
    ClassEpisodes,
    ClassSamples,
    DocumentEpisodes,
    DocumentSamples,
    Episode,
    Index,
    Sample,
    SplitSamples,
    Ways,
    make_dataset,
    write_shards,
)
from metaloom.datasets.affine import output_to_input, resample
from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import Arrays
from metaloom.datasets.pixels import as_numbers
from metaloom.errors import StreamError
from tests.tiny_sets import document_set

Owners = dict[bytes, set[tuple[int, int]]]
AFFINE = Affine(rotate_deg=15, shear_deg=10, scale=0.15, shift_px=2)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_dataset("glyphs", tmp_path_factory.mktemp("glyphs"), max_per_split=12).index


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Index:
    sizes = {"train": [3000, 4000, 800, 5000, 2600], "test": [3000, 3500], "rehearsal": [900, 4000]}
    return document_set(tmp_path_factory.mktemp("documents"), sizes)


def text_of(index: Index, split: str, number: int) -> bytes:
    """The text of a document, past the sources under test."""
    table = index.split(split)
    path = Path(index.url) / index.shards[int(table.shard[number])].name
    with tarfile.open(path) as tar:
        member = tar.extractfile(f"{table.key(number)}.txt")
        assert member is not None
        return member.read()


def same(a: Arrays | None, b: Arrays | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(a[name], b[name]) for name in ("inputs", "targets"))


def same_episode(a: Episode, b: Episode) -> bool:
    return (
        (a.number, a.task) == (b.number, b.task)
        and same(a.support, b.support)
        and same(a.query, b.query)
        and same(a.rehearsal, b.rehearsal)
    )


def owners(index: Index, split: str) -> Owners:
    """Image -> the (class, variant) pairs that have it, read by tarfile."""
    table = index.split(split)
    found = defaultdict(set)
    for n in range(table.num_samples):
        path = Path(index.url) / index.shards[int(table.shard[n])].name
        with tarfile.open(path) as tar:
            member = tar.extractfile(f"{table.key(n)}.png")
            assert member is not None
            image = np.asarray(Image.open(member))
        pair = (int(table.attributes["class"][n]), int(table.attributes["variant"][n]))
        found[image.tobytes()].add(pair)
    return found


@pytest.fixture(scope="module")
def faces_of_glyphs(glyphs: Index) -> Owners:
    return owners(glyphs, "train")


@given(
    n_way=st.integers(1, 12),
    counts=st.integers(2, 12).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total - 1))),
    seed=st.integers(0, 2**63),
    number=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_support_and_query_share_no_face_and_no_sample(
    glyphs: Index, faces_of_glyphs: Owners, n_way: int, counts: tuple[int, int], seed: int, number: int
) -> None:
    n_shot, n_query = counts[1], counts[0] - counts[1]
    source = ClassEpisodes(glyphs, "train", ways=Ways(n_way, n_shot, n_query), seed=seed)
    episode = source.episode(number)
    table = faces_of_glyphs
    faces: dict[str, set[int]] = {}
    classes: dict[int, set[int]] = defaultdict(set)
    for name, part, count in (("support", episode.support, n_shot), ("query", episode.query, n_query)):
        inputs, targets = part["inputs"], part["targets"]
        assert inputs.shape == (n_way * count, 28, 28, 1)
        assert inputs.dtype == np.uint8
        assert targets.dtype == np.int64
        assert np.bincount(targets, minlength=n_way).tolist() == [count] * n_way
        pairs = [table[image.tobytes()] for image in inputs]
        assert all(len(pair) == 1 for pair in pairs)
        flat = [next(iter(pair)) for pair in pairs]
        assert len(set(flat)) == n_way * count
        faces[name] = {variant for _, variant in flat}
        for target, (number_of_class, _) in zip(targets, flat, strict=True):
            classes[int(target)].add(number_of_class)
    assert not faces["support"] & faces["query"]
    assert all(len(found) == 1 for found in classes.values())
    assert len(set.union(*classes.values())) == n_way
    names = [glyphs.split("train").classes[c] for c in set.union(*classes.values())]
    assert episode.task == " | ".join(sorted(names))


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_a_class_episode_is_a_function_of_its_number(glyphs: Index, affine: Affine | None) -> None:
    def source(split: str = "train", seed: int = 3) -> ClassEpisodes:
        return ClassEpisodes(glyphs, split, ways=Ways(5, 1, 3), seed=seed, affine=affine)

    one, other = source(), source()
    forwards = [one.episode(n) for n in range(6)]
    backwards = [other.episode(n) for n in reversed(range(6))][::-1]
    assert all(same_episode(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert len({e.task for e in forwards}) > 1
    assert not same(forwards[0].support, source(seed=4).episode(0).support)
    assert not same(forwards[0].support, source("test").episode(0).support)


def test_labels_are_shuffled(glyphs: Index, faces_of_glyphs: Owners) -> None:
    source = ClassEpisodes(glyphs, "train", ways=Ways(12, 1, 1), seed=0)
    table = faces_of_glyphs
    orders = set()
    for n in range(4):
        images = source.episode(n).support["inputs"]
        orders.add(tuple(next(iter(table[image.tobytes()]))[0] for image in images))
    assert len(orders) == 4


def test_every_class_and_face_is_drawn_in_the_long_run(glyphs: Index) -> None:
    source = ClassEpisodes(glyphs, "train", ways=Ways(5, 1, 2), seed=0)
    seen = {image.tobytes() for n in range(300) for image in source.episode(n).support["inputs"]}
    assert len(seen) == 12 * 12


def test_an_affine_of_no_size_gives_the_original(glyphs: Index) -> None:
    plain = ClassEpisodes(glyphs, "train", ways=Ways(5, 2, 3), seed=1)
    still = ClassEpisodes(glyphs, "train", ways=Ways(5, 2, 3), seed=1, affine=Affine())
    moved = ClassEpisodes(glyphs, "train", ways=Ways(5, 2, 3), seed=1, affine=AFFINE)
    for part in ("support", "query"):
        of_plain, of_still, of_moved = (getattr(each.episode(7), part) for each in (plain, still, moved))
        np.testing.assert_array_equal(as_numbers(of_plain["inputs"]), of_still["inputs"], strict=True)
        np.testing.assert_array_equal(of_plain["targets"], of_still["targets"])
        assert of_moved["inputs"].shape == of_still["inputs"].shape
        assert not np.array_equal(of_still["inputs"], of_moved["inputs"])
    assert plain.episode(7).task == moved.episode(7).task


def test_whole_shifts_quarter_turns_and_doubling_move_pixels_exactly() -> None:
    image = np.random.default_rng(0).random((1, 5, 5)).astype(np.float32)
    one = np.eye(2, dtype=np.float32)[None]
    none = np.zeros((1, 2), np.float32)
    down = resample(image, one, np.array([[1, 0]], np.float32))
    np.testing.assert_array_equal(down[0, 1:], image[0, :-1])
    assert (down[0, 0] == 0).all()
    left = resample(image, one, np.array([[0, -2]], np.float32))
    np.testing.assert_array_equal(left[0, :, :3], image[0, :, 2:])
    assert (left[0, :, 3:] == 0).all()
    turned = resample(image, np.array([[[0, 1], [-1, 0]]], np.float32), none)
    assert np.array_equal(turned[0], np.rot90(image[0])) or np.array_equal(turned[0], np.rot90(image[0], -1))
    halved = resample(image, 2 * one, none)
    np.testing.assert_array_equal(halved[0, 1:4, 1:4], image[0, ::2, ::2])
    half = resample(image, one, np.array([[0, 0.5]], np.float32))
    np.testing.assert_allclose(half[0, :, 1:], (image[0, :, 1:] + image[0, :, :-1]) / 2, atol=1e-7)
    half_down = resample(image, one, np.array([[0.5, 0]], np.float32))
    np.testing.assert_allclose(half_down[0, 1:], (image[0, 1:] + image[0, :-1]) / 2, atol=1e-7)
    far = resample(image, one, np.array([[1e6, -1e6]], np.float32))
    assert (far == 0).all()


def test_the_matrix_undoes_scale_then_slant_then_rotation() -> None:
    angle, slant, scale_y, scale_x = 0.3, 0.2, 1.3, 0.8
    rotate = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    forwards = rotate @ np.array([[1, 0], [-slant, 1]]) @ np.diag([scale_y, scale_x])
    arguments = [np.array([value], np.float32) for value in (angle, slant, scale_y, scale_x)]
    np.testing.assert_allclose(output_to_input(*arguments)[0], np.linalg.inv(forwards), rtol=1e-5)


def test_distorted_images_stay_in_range_and_keep_most_of_their_ink(glyphs: Index) -> None:
    batch = ClassSamples(glyphs, "train", seed=0, affine=AFFINE).batch(0, 64).arrays
    plain = ClassSamples(glyphs, "train", seed=0).batch(0, 64).arrays
    assert np.array_equal(batch["targets"], plain["targets"])
    assert 0 <= batch["inputs"].min() <= batch["inputs"].max() <= 1
    assert batch["inputs"].sum() == pytest.approx(as_numbers(plain["inputs"]).sum(), rel=0.15)


def test_bounds_of_an_affine_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Affine\.scale is -1; it must be 0 or more"):
        Affine(scale=-1)
    with pytest.raises(ValueError, match=r"Affine\.shear_deg is 85; it must be below 80"):
        Affine(shear_deg=85)


def test_too_many_classes_or_samples_are_refused_with_both_numbers(glyphs: Index) -> None:
    with pytest.raises(
        StreamError, match=r"data\.n_way is 13, but split 'validation' .* has 12 classes; lower"
    ):
        ClassEpisodes(glyphs, "validation", ways=Ways(13, 1, 1), seed=0)
    with pytest.raises(
        StreamError, match=r"data\.n_shot \+ data\.n_query is 5 \+ 8 = 13, but .* has 12 variants \(faces\)"
    ):
        ClassEpisodes(glyphs, "validation", ways=Ways(2, 5, 8), seed=0)
    with pytest.raises(StreamError, match=r"data\.n_query is 0; it must be at least 1"):
        ClassEpisodes(glyphs, "validation", ways=Ways(2, 5, 0), seed=0)


def test_a_layout_of_the_other_kind_is_refused(glyphs: Index, documents: Index) -> None:
    with pytest.raises(StreamError, match=r"has layout 'documents', and what is drawn here needs 'classes'"):
        ClassEpisodes(documents, "train", ways=Ways(2, 1, 1), seed=0)
    with pytest.raises(StreamError, match=r"has layout 'classes', and what is drawn here needs 'documents'"):
        DocumentSamples(glyphs, ["train"], sequence_length=8, seed=0)


def test_classes_that_lack_a_variant_are_refused(tmp_path: Path) -> None:
    samples = [Sample(f"s{n}", {"png": b"x"}, {"class": n // 2, "variant": n % 2}) for n in range(3)]
    split = SplitSamples(samples, classes=["a", "b"])
    index = write_shards(tmp_path, {"train": split}, dataset="mine", layout="classes", source={})
    with pytest.raises(
        StreamError, match=r"3 samples for 2 classes of 2 variants; every class must have each"
    ):
        ClassSamples(index, "train", seed=0)


@given(
    num_support=st.integers(1, 5),
    num_query=st.integers(1, 5),
    length=st.integers(1, 200),
    seed=st.integers(0, 1000),
    number=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_support_and_query_are_disjoint_stretches_of_one_document(
    documents: Index, num_support: int, num_query: int, length: int, seed: int, number: int
) -> None:
    source = DocumentEpisodes(
        documents, "train", num_support=num_support, num_query=num_query, sequence_length=length, seed=seed
    )
    episode = source.episode(number)
    text = text_of(documents, "train", int(episode.task.removeprefix("train/")))
    taken: list[int] = []
    for part, count in ((episode.support, num_support), (episode.query, num_query)):
        assert part["inputs"].shape == part["targets"].shape == (count, length)
        assert part["inputs"].dtype == part["targets"].dtype == np.int64
        np.testing.assert_array_equal(part["inputs"][:, 1:], part["targets"][:, :-1])
        for inputs, targets in zip(part["inputs"], part["targets"], strict=True):
            stretch = bytes([*inputs.tolist(), int(targets[-1])])
            if length < 4:  # too short to be found in one place only
                assert stretch in text
                continue
            start = text.find(stretch)
            assert text.count(stretch) == 1
            taken += range(start, start + length + 1)
    assert len(taken) == len(set(taken))


def test_an_epoch_has_each_long_enough_document_once_in_an_order_of_its_own(documents: Index) -> None:
    source = DocumentEpisodes(
        documents, "train", num_support=2, num_query=2, sequence_length=256, seed=0
    )  # 1028 bytes: the document of 800 is too short
    assert source.num_tasks == 4
    epochs = [[source.episode(4 * epoch + i).task for i in range(4)] for epoch in range(6)]
    assert all(sorted(epoch) == ["train/0", "train/1", "train/3", "train/4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_document_episode_is_a_function_of_its_number(documents: Index) -> None:
    def source(seed: int = 3) -> DocumentEpisodes:
        return DocumentEpisodes(
            documents,
            "train",
            num_support=2,
            num_query=1,
            sequence_length=64,
            seed=seed,
        )

    one, other = source(), source()
    forwards = [one.episode(n) for n in range(10)]
    backwards = [other.episode(n) for n in reversed(range(10))][::-1]
    assert all(same_episode(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not same(forwards[0].support, source(seed=4).episode(0).support)


def test_documents_that_are_all_too_short_are_refused_with_the_sum(documents: Index) -> None:
    with pytest.raises(
        StreamError,
        match=r"\(4 \+ 4\) \* \(512 \+ 1\) = 4104 tokens, but the longest document of split "
        r"'test' .* has 3500;",
    ):
        DocumentEpisodes(documents, "test", num_support=4, num_query=4, sequence_length=512, seed=0)
    with pytest.raises(
        StreamError, match=r"data\.sequence_length is 4000, but no document of test, rehearsal"
    ):
        DocumentSamples(documents, ["test", "rehearsal"], sequence_length=4000, seed=0)
    with pytest.raises(StreamError, match=r"pretrain\.sequence_length is 4000, but no document of test"):
        DocumentSamples(documents, ["test"], sequence_length=4000, seed=0, key="pretrain.sequence_length")
    with pytest.raises(StreamError, match=r"data\.num_support is 0; it must be at least 1"):
        DocumentEpisodes(documents, "test", num_support=0, num_query=4, sequence_length=5, seed=0)


def test_every_stretch_is_equally_likely(documents: Index) -> None:
    source = DocumentSamples(documents, ["rehearsal"], sequence_length=896, seed=0)
    texts = [text_of(documents, "rehearsal", n) for n in range(2)]
    batch = source.batch(0, 4000).arrays
    starts = [
        next((n, text.find(s)) for n, text in enumerate(texts) if s in text)
        for s in (bytes(row.astype(np.uint8)) for row in batch["inputs"])
    ]
    assert {start for n, start in starts if n == 0} == {0, 1, 2, 3}  # 900 - 896 stretches with a target
    in_first = sum(n == 0 for n, _ in starts)
    expected = 4000 * 4 / (4 + 3104)
    assert abs(in_first - expected) < 6 * np.sqrt(expected)
    assert same(
        batch, DocumentSamples(documents, ["rehearsal"], sequence_length=896, seed=0).batch(0, 4000).arrays
    )
    assert not same(batch, source.batch(1, 4000).arrays)


def test_class_batches_cover_all_classes(glyphs: Index, faces_of_glyphs: Owners) -> None:
    source = ClassSamples(glyphs, "train", seed=0)
    assert source.num_classes == 12
    batch = source.batch(0, 500).arrays
    assert set(batch["targets"].tolist()) == set(range(12))
    table = faces_of_glyphs
    for image, target in zip(batch["inputs"], batch["targets"], strict=True):
        assert {number for number, _ in table[image.tobytes()]} == {int(target)}


def test_draws_depend_on_every_argument() -> None:
    values = {
        float(generator(*arguments).random())  # type: ignore[arg-type]
        for arguments in [
            ("a", 0),
            ("b", 0),
            ("a", 1),
            ("a", 0, 0),
            ("a", 0, "0"),
            ("a", 0, 0, 0),
            ("a", 0, 1),
        ]
    }
    assert len(values) == 7
    assert generator("a", 0, "x", 3).random() == generator("a", 0, "x", 3).random()
