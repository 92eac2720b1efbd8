"""What there is to see of a data set: counts, how large its classes are, one episode."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.class_episodes import ClassEpisodes, Ways
from metaloom.datasets.contact_sheet import ClassImages, class_images
from metaloom.datasets.decoders import MAX_PIXELS, PAD, ImageInputs, read_npy
from metaloom.datasets.document_episodes import DocumentEpisodes
from metaloom.datasets.draws import generator
from metaloom.datasets.index import Index, SplitTable
from metaloom.datasets.members import Members
from metaloom.datasets.reader import SampleReader
from metaloom.errors import StreamError

_IMAGES = ("png", "jpg", "jpeg", "webp")
_BAR = 40  # letters of the longest bar
_MAX_BARS = 20
_MAX_LETTERS = 100  # of one example
_STRETCH = 64  # tokens of one example of a document


@dataclass(frozen=True)
class Ask:
    """Which episode to show, and of what size.

    Args:
        number: of the episode, from 0.
        n_way: classes.
        n_shot: support examples of a class; of a document, stretches of text.
        n_query: query examples, likewise.
        tokenizer: file by which tokens become text again; None shows their numbers.
    """

    number: int
    n_way: int = 5
    n_shot: int = 1
    n_query: int = 3
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("episode", self.number, 0),
            ("n-way", self.n_way, 1),
            ("n-shot", self.n_shot, 1),
            ("n-query", self.n_query, 1),
        ):
            if value < least:
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


def counts(table: SplitTable) -> tuple[str, str, str, str, str]:
    """A line of a table: split, samples, classes, groups, members."""
    group = table.attributes.get("group")
    num_groups = "" if group is None else str(len(np.unique(group)))
    num_classes = str(len(table.classes)) if table.classes else ""
    return (table.name, str(table.num_samples), num_classes, num_groups, ", ".join(table.members))


def histogram(table: SplitTable) -> list[str]:
    """How many samples the classes have, as bars of text; empty for a split without classes.

    Many classes of different sizes are put into ranges.
    """
    rows = table.attributes.get("class")
    if rows is None or not table.classes:
        return []
    sizes = np.bincount(rows, minlength=len(table.classes))
    if len(sizes) <= _MAX_BARS:
        title, bars = "samples by class", list(zip(table.classes, sizes.tolist(), strict=True))
    else:
        title, bars = "classes by number of samples", _ranges(sizes)
    width = max(len(name) for name, _ in bars)
    largest = max(1, max(count for _, count in bars))
    lines = [f"{table.name}: {title}"]
    for name, count in bars:
        bar = "#" * max(round(_BAR * count / largest), int(count > 0))
        lines.append(f"  {name:<{width}}  {count:>{len(str(largest))}}  {bar}".rstrip())
    return lines


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
        ways = Ways(ask.n_way, ask.n_shot, ask.n_query)
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
            raise SampleError(
                sample, "Look at another episode; metaloom data verify --decode names all that is damaged."
            )
        found.append({name: payload.tobytes() for name, payload in sample.items()})
    return found


def _undecoded(members: Members) -> dict[str, NDArray[np.uint8]]:
    return {name: np.frombuffer(payload, np.uint8) for name, payload in members.items()}


def _as_they_are(index: Index, split: str) -> ImageInputs:
    """Images in the size and colours of the split's first one."""
    (members,) = read_members(index, split, [0])
    pixels = _decoded(members)
    return ImageInputs(size=max(pixels.shape[:2]), channels=1 if pixels.ndim == 2 else 3)


def _drawn_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    if index.layout == "groups":
        # An episode is one group.
        rows, names, n_way, what = table.attributes["group"], table.groups, 1, "groups"
    else:
        rows, names, n_way, what = table.attributes["class"], table.classes, ask.n_way, "classes"
    sizes = np.bincount(rows, minlength=len(names))
    needed = ask.n_shot + ask.n_query
    fit = np.flatnonzero(sizes >= needed)
    if len(fit) < n_way:
        raise StreamError(
            f"{len(fit)} {what} of split {table.name!r} have {needed} samples (--n-shot {ask.n_shot} "
            f"and --n-query {ask.n_query}), but an episode has {n_way}; lower --n-way, --n-shot or --n-query."
        )
    rng = generator("inspect", 0, table.name, ask.number)
    images: list[ClassImages] = []
    texts: list[ClassTexts] = []
    for row in rng.permutation(fit)[:n_way]:
        numbers = rng.permutation(np.flatnonzero(rows == row))[:needed]
        members = read_members(index, table.name, numbers.tolist())
        if all(_image_in(sample) for sample in members):
            pixels = [_decoded(sample) for sample in members]
            images.append(ClassImages(names[row], pixels[: ask.n_shot], pixels[ask.n_shot :]))
        else:
            words = [_words(sample, ask.tokenizer) for sample in members]
            texts.append(ClassTexts(names[row], words[: ask.n_shot], words[ask.n_shot :]))
    return ShownEpisode(title, images, texts)


def _document_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    if "txt" in table.members:
        source = DocumentEpisodes(
            index,
            table.name,
            num_support=ask.n_shot,
            num_query=ask.n_query,
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
    found = _array(members["tokens.npy"])
    stretches = [found[i : i + _STRETCH] for i in range(0, len(found), _STRETCH)]
    words = [_decode_tokens(tokens, ask.tokenizer) for tokens in stretches[: ask.n_shot + ask.n_query]]
    shown = ClassTexts(table.key(number), words[: ask.n_shot], words[ask.n_shot :])
    return ShownEpisode(title, texts=[shown])


def _ready_episode(index: Index, table: SplitTable, ask: Ask, title: str) -> ShownEpisode:
    number = ask.number % table.num_samples
    (members,) = read_members(index, table.name, [number])
    about = json.loads(members.get("json", b"{}"))
    names = about.get("classes")
    is_bytes = index.source.get("input_kind") == "text" and index.source.get("tokenizer") is None
    label = str(about.get("task", table.key(number)))
    pictures = [_pictures(members, part) for part in ("support", "query")]
    if all(pictures):
        return ShownEpisode(title, [ClassImages(label, pictures[0], pictures[1])], task=label)
    parts = []
    for part in ("support", "query"):
        inputs = _array(members[f"{part}.inputs.npy"])
        targets: Any = [None] * len(inputs)
        if f"{part}.targets.npy" in members:
            targets = _array(members[f"{part}.targets.npy"])
        parts.append(
            [
                f"{_target(target, names)}{_example(row, ask.tokenizer, is_bytes=is_bytes)}"
                for row, target in zip(inputs, targets, strict=True)
            ]
        )
    return ShownEpisode(title, texts=[ClassTexts(label, parts[0], parts[1])])


def _pictures(members: Mapping[str, bytes], part: str) -> list[NDArray[np.uint8]]:
    """The images of a part of a ready episode; none where its examples are others."""
    if f"{part}.inputs.npy" in members:
        inputs = _array(members[f"{part}.inputs.npy"])
        return list(inputs) if inputs.dtype == np.uint8 and inputs.ndim > 2 else []
    examples = (
        {extension: members[f"{part}.{row}.{extension}"]}
        for row in range(len(members))
        for extension in _IMAGES
        if f"{part}.{row}.{extension}" in members
    )
    return [_decoded(example) for example in examples]


def _target(target: Any, names: Any) -> str:
    if target is None:
        return ""
    if names is not None and np.ndim(target) == 0:
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
        return _decode_tokens(_array(members["tokens.npy"]), tokenizer)
    if "npy" in members:
        array = _array(members["npy"])
        shown = np.array2string(array, precision=4, threshold=10)
        if "target.npy" in members:
            shown += f" -> {np.array2string(_array(members['target.npy']), precision=4)}"
        return shown
    if "json" in members:
        return members["json"].decode(errors="replace")
    return ", ".join(f"{name} ({len(payload)} bytes)" for name, payload in members.items())


def _decode_tokens(tokens: NDArray[Any], tokenizer: str | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    from metaloom.datasets.pack.payloads import load_tokenizer

    return str(load_tokenizer(tokenizer).decode(tokens.tolist()))


def _image_in(members: Mapping[str, bytes]) -> bytes | None:
    return next((members[name] for name in _IMAGES if name in members), None)


def _decoded(members: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """uint8 [H, W] or [H, W, 3]."""
    payload = _image_in(members) or b""
    try:
        with Image.open(io.BytesIO(payload), formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise StreamError(f"an image of the episode cannot be decoded: {error}") from error


def _array(payload: bytes) -> NDArray[Any]:
    return read_npy(payload)


def _ranges(sizes: NDArray[np.int64]) -> list[tuple[str, int]]:
    """(range of sizes, number of classes), at most `_MAX_BARS` ranges of equal width."""
    low, high = int(sizes.min()), int(sizes.max())
    width = -(-(high - low + 1) // _MAX_BARS)
    starts = range(low, high + 1, width)
    found = np.bincount((sizes - low) // width, minlength=len(starts))
    return [
        (f"{start}" if width == 1 else f"{start} to {start + width - 1}", int(count))
        for start, count in zip(starts, found, strict=True)
    ]


def _one_line(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _MAX_LETTERS else shown[: _MAX_LETTERS - 1] + "…"
