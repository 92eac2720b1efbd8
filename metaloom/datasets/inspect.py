"""One episode of a data set, as pictures or text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.class_episodes import ClassEpisodes, Ways
from metaloom.datasets.contact_sheet import ClassImages, class_images
from metaloom.datasets.decoders import (
    ANY_VOCABULARY,
    DECODING_ERRORS,
    IMAGES,
    PAD,
    ImageInputs,
    open_image,
    read_npy,
    read_tokens,
)
from metaloom.datasets.document_episodes import DocumentEpisodes
from metaloom.datasets.draws import generator
from metaloom.datasets.index import Index, SplitTable
from metaloom.datasets.members import Members
from metaloom.datasets.reader import SampleReader
from metaloom.errors import StreamError

_MAX_LETTERS = 100  # of one example
_STRETCH = 64  # tokens of one example of a document
_WAYS, _QUERY = 5, 3  # where they are not said, and there are so many
_ADVICE = "Look at another episode; metaloom data verify --decode names what is damaged."


@dataclass(frozen=True)
class Ask:
    """Which episode to show, and of what size.

    Args:
        number: of the episode, from 0.
        n_way: classes; None takes 5, or all where there are fewer.
        n_shot: support examples of a class; of a document, stretches of text.
        n_query: query examples, likewise; None takes 3, or fewer where classes are too small for so many.
        tokenizer: file by which tokens become text again; None shows their numbers.
    """

    number: int
    n_way: int | None = None
    n_shot: int = 1
    n_query: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("episode", self.number, 0),
            ("n-way", self.n_way, 1),
            ("n-shot", self.n_shot, 1),
            ("n-query", self.n_query, 1),
        ):
            if value is not None and value < least:
                raise StreamError(f"--{name} is {value}; it must be at least {least}.")


@dataclass(frozen=True)
class ClassTexts:
    """The examples of one class, or of a whole episode without classes, as text."""

    label: str
    support: Sequence[str]
    query: Sequence[str]


@dataclass(frozen=True)
class ShownEpisode:
    """One episode: images or texts by class; `task` is what its source calls it."""

    title: str
    images: Sequence[ClassImages] = ()
    texts: Sequence[ClassTexts] = ()
    task: str = ""

    @property
    def columns(self) -> Sequence[ClassImages]:
        """What a contact sheet shows.

        Raises:
            StreamError: the episode holds no images.
        """
        if not self.images:
            raise StreamError(
                f"{self.title}: there are no images to draw; leave --out out to see it as text."
            )
        return self.images


def draw_episode(index: Index, split: str, ask: Ask) -> ShownEpisode:
    """One episode of a split; the same for the same arguments.

    Raises:
        StreamError: the split has too few classes or samples, or a sample cannot be read.
    """
    table = index.split(split)
    title = f"{index.dataset}, {split}, episode {ask.number}"
    if index.layout == "episodes":
        return _ready_episode(index, table, ask, title)
    if index.layout == "documents":
        return _document_episode(index, table, ask, title)
    if index.layout == "classes" and "variant" in table.attributes:
        n_way = min(_WAYS, len(table.classes)) if ask.n_way is None else ask.n_way
        ways = Ways(n_way, ask.n_shot, _QUERY if ask.n_query is None else ask.n_query)
        source = ClassEpisodes(index, split, ways=ways, inputs=_as_they_are(index, split), seed=0)
        episode = source.episode(ask.number)
        images = class_images(episode.support, episode.query)
        return ShownEpisode(title, images, task=episode.task)
    return _drawn_episode(index, table, ask, title)


def shown_text(episode: ShownEpisode) -> str:
    """The episode in lines: support over query, class by class."""
    lines = [episode.title, *([episode.task] if episode.task else [])]
    for of_class in episode.texts:
        lines.append(f"{of_class.label}")
        for name, examples in (("support", of_class.support), ("query", of_class.query)):
            lines += [f"  {name:<7}  {_one_line(example)}" for example in examples]
    for images in episode.images:
        lines.append(f"{images.label}: {len(images.support)} support, {len(images.query)} query images")
    if episode.images:
        lines.append("draw them with --out FILE.png")
    return "\n".join(lines)


def read_members(index: Index, split: str, numbers: Sequence[int]) -> list[dict[str, bytes]]:
    """The members of some samples by extension.

    Raises:
        StreamError: one is damaged.
    """
    found = []
    for sample in SampleReader(index, split, _undecoded, memory_bytes=0).read(numbers):
        if isinstance(sample, BrokenSample):
            raise SampleError(sample, _ADVICE)
        found.append({name: payload.tobytes() for name, payload in sample.items()})
    return found


@contextmanager
def _shown(index: Index, table: SplitTable, number: int) -> Iterator[None]:
    """Names the sample that cannot be decoded within the block, or has not what its layout says.

    Raises:
        SampleError: it is so.
    """
    try:
        yield
    except DECODING_ERRORS as error:
        shard = index.shards[int(table.shard[number])].name
        broken = BrokenSample(index.url, shard, table.key(number), f"cannot be shown: {error}")
        raise SampleError(broken, _ADVICE) from error


def _undecoded(members: Members) -> dict[str, NDArray[np.uint8]]:
    return {name: np.frombuffer(payload, np.uint8) for name, payload in members.items()}


def _as_they_are(index: Index, split: str) -> ImageInputs:
    """Images in the size and colours of the split's first one."""
    (members,) = read_members(index, split, [0])
    with _shown(index, index.split(split), 0):
        pixels = _decoded(members)
    return ImageInputs(size=max(pixels.shape[:2]), channels=1 if pixels.ndim == 2 else 3)


def _drawn_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    if index.layout == "groups":
        # An episode is one group.
        rows, names, n_way, what = table.attributes["group"], table.groups, 1, "groups"
    else:
        rows, names, what = table.attributes["class"], table.classes, "classes"
        n_way = min(_WAYS, len(names)) if ask.n_way is None else ask.n_way
    sizes = np.bincount(rows, minlength=len(names))
    n_query = _fitting_query(sizes, n_way, ask.n_shot) if ask.n_query is None else ask.n_query
    needed = ask.n_shot + n_query
    fit = np.flatnonzero(sizes >= needed)
    if len(fit) < n_way:
        raise StreamError(
            f"{len(fit)} {what} of split {table.name!r} have {needed} samples (--n-shot {ask.n_shot} "
            f"and --n-query {n_query}), but an episode has {n_way}; lower --n-way, --n-shot or --n-query."
        )
    rng = generator("inspect", 0, table.name, ask.number)
    images: list[ClassImages] = []
    texts: list[ClassTexts] = []
    for row in rng.permutation(fit)[:n_way]:
        numbers = rng.permutation(np.flatnonzero(rows == row))[:needed]
        members = read_members(index, table.name, numbers.tolist())
        pixels, words = [], []
        are_images = all(_image_in(sample) is not None for sample in members)
        for number, sample in zip(numbers.tolist(), members, strict=True):
            with _shown(index, table, number):
                if are_images:
                    pixels.append(_decoded(sample))
                else:
                    words.append(_words(sample, ask.tokenizer))
        if are_images:
            images.append(ClassImages(names[row], pixels[: ask.n_shot], pixels[ask.n_shot :]))
        else:
            texts.append(ClassTexts(names[row], words[: ask.n_shot], words[ask.n_shot :]))
    return ShownEpisode(title, images, texts)


def _fitting_query(sizes: NDArray[np.int64], n_way: int, n_shot: int) -> int:
    """The most query examples, up to `_QUERY` and at least one, for which there are enough classes."""
    fitting = (n for n in range(_QUERY, 1, -1) if np.count_nonzero(sizes >= n_shot + n) >= n_way)
    return next(fitting, 1)


def _document_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    n_query = _QUERY if ask.n_query is None else ask.n_query
    if "txt" in table.members:
        source = DocumentEpisodes(
            index,
            table.name,
            num_support=ask.n_shot,
            num_query=n_query,
            sequence_length=_STRETCH,
            seed=0,
        )
        episode = source.episode(ask.number)
        parts = [
            [bytes(row.astype(np.uint8)).decode(errors="replace") for row in part["inputs"]]
            for part in (episode.support, episode.query)
        ]
        return ShownEpisode(title, texts=[ClassTexts(episode.task, parts[0], parts[1])])
    number = ask.number % table.num_samples
    (members,) = read_members(index, table.name, [number])
    with _shown(index, table, number):
        found = _tokens(members)
    stretches = [found[i : i + _STRETCH] for i in range(0, len(found), _STRETCH)]
    words = [_decode_tokens(tokens, ask.tokenizer) for tokens in stretches[: ask.n_shot + n_query]]
    shown = ClassTexts(table.key(number), words[: ask.n_shot], words[ask.n_shot :])
    return ShownEpisode(title, texts=[shown])


def _ready_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    number = ask.number % table.num_samples
    (members,) = read_members(index, table.name, [number])
    with _shown(index, table, number):
        label, pictures, texts = _ready_parts(index, table.key(number), members, ask)
    if texts:
        return ShownEpisode(title, texts=[ClassTexts(label, *texts)])
    return ShownEpisode(title, [ClassImages(label, *pictures)], task=label)


def _ready_parts(
    index: Index, key: str, members: Mapping[str, bytes], ask: Ask
) -> tuple[str, list[list[NDArray[np.uint8]]], list[list[str]]]:
    """The name of a ready episode, and support and query as images, or else as texts.

    Raises:
        one of DECODING_ERRORS: it is none.
    """
    about = json.loads(members.get("json", b"{}"))
    if type(about) is not dict:
        raise ValueError(f"its json is a {type(about).__name__}, and an object is expected")
    names = about.get("classes")
    is_bytes = index.source.get("input_kind") == "text" and index.source.get("tokenizer") is None
    label = str(about.get("task", key))
    pictures = [_pictures(members, part) for part in ("support", "query")]
    if all(pictures):
        return label, pictures, []
    parts = []
    for part in ("support", "query"):
        inputs = _rows(members, f"{part}.inputs.npy")
        if inputs.ndim < 2:
            raise ValueError(f"{part}.inputs.npy has the shape {list(inputs.shape)}, which is of no examples")
        targets: Any = [None] * len(inputs)
        if f"{part}.targets.npy" in members:
            targets = _rows(members, f"{part}.targets.npy")
        if len(targets) != len(inputs):
            raise ValueError(f"its {part} has {len(inputs)} inputs and {len(targets)} targets")
        parts.append(
            [
                f"{_target(target, names)}{_example(row, ask.tokenizer, is_bytes=is_bytes)}"
                for row, target in zip(inputs, targets, strict=True)
            ]
        )
    return label, [], parts


def _pictures(members: Mapping[str, bytes], part: str) -> list[NDArray[np.uint8]]:
    """The images of a part of a ready episode; none where its examples are others."""
    if f"{part}.inputs.npy" in members:
        inputs = _rows(members, f"{part}.inputs.npy")
        is_picture = inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[3] == 3)
        return list(inputs) if inputs.dtype == np.uint8 and is_picture and inputs.size else []
    examples = (
        {extension: members[f"{part}.{row}.{extension}"]}
        for row in range(len(members))
        for extension in IMAGES
        if f"{part}.{row}.{extension}" in members
    )
    return [_decoded(example) for example in examples]


def _target(target: Any, names: Any) -> str:
    if target is None:
        return ""
    if names is not None and np.ndim(target) == 0:
        if not isinstance(names, list) or not 0 <= int(target) < len(names):
            raise ValueError(f"a target is {int(target)}, and its json has no such entry of classes")
        return f"{names[int(target)]}: "
    return f"{np.array2string(np.asarray(target), precision=4)}: "


def _example(row: NDArray[Any], tokenizer: str | None, *, is_bytes: bool) -> str:
    if row.dtype.kind == "f":
        return np.array2string(row, precision=4, threshold=10)
    tokens = row[row != PAD]
    if is_bytes:
        return bytes(tokens.astype(np.uint8)).decode(errors="replace")
    return _decode_tokens(tokens, tokenizer)


def _words(members: Mapping[str, bytes], tokenizer: str | None) -> str:
    """One sample as text."""
    if "txt" in members:
        return members["txt"].decode(errors="replace")
    if "tokens.npy" in members:
        return _decode_tokens(_tokens(members), tokenizer)
    if "npy" in members:
        array = read_npy(members["npy"])
        shown = np.array2string(array, precision=4, threshold=10)
        if "target.npy" in members:
            shown += f" -> {np.array2string(read_npy(members['target.npy']), precision=4)}"
        return shown
    if "json" in members:
        return members["json"].decode(errors="replace")
    return ", ".join(f"{name} ({len(payload)} bytes)" for name, payload in members.items())


def _decode_tokens(tokens: NDArray[Any], tokenizer: str | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    from metaloom.datasets.pack.payloads import load_tokenizer

    return str(load_tokenizer(tokenizer).decode(tokens.tolist()))


def _image_in(members: Mapping[str, bytes]) -> str | None:
    """Its extension."""
    return next((extension for extension in IMAGES if extension in members), None)


def _decoded(members: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """uint8 [H, W] or [H, W, 3].

    Raises:
        one of DECODING_ERRORS: it is no image, or has too many pixels.
    """
    extension = _image_in(members)
    if extension is None:
        raise ValueError(f"it has {', '.join(members)}, and none of {', '.join(IMAGES)}")
    image = open_image(extension, members[extension])
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _tokens(members: Mapping[str, bytes]) -> NDArray[Any]:
    """int32 [L]; raises ValueError if there are none."""
    if "tokens.npy" not in members:
        raise ValueError(f"it has {', '.join(members)}, and no tokens.npy")
    return read_tokens("tokens.npy", members["tokens.npy"], vocabulary=ANY_VOCABULARY)


def _rows(members: Mapping[str, bytes], name: str) -> NDArray[Any]:
    """The array of a member, `[N, ...]`; raises ValueError if there is none."""
    if name not in members:
        raise ValueError(f"it has {', '.join(members)}, and no {name}")
    array = read_npy(members[name])
    if not array.ndim:
        raise ValueError(f"{name} is a single number")
    return array


def _one_line(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _MAX_LETTERS else shown[: _MAX_LETTERS - 1] + "…"
