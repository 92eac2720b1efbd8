"""From a sample's bytes to arrays. No decoder executes anything, and none allocates more than it was allowed.

Shape letters: N examples, C channels, H and W pixels, L tokens, P numbers of a target.
"""

from __future__ import annotations

import abc
import functools
import io
import math
import struct
import tokenize
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from metaloom.datasets.members import Members

PAD = -1  # in place of a token behind the end of a text
MAX_PIXELS = 50_000_000  # of an image, before it is resized
MAX_NAME_BYTES = 1000  # of a class
ANY_VOCABULARY = 1 << 31  # one that is not known: all that int32 can hold
# Not `Image.open`, which looks for a class that fits: of a small image that takes a twentieth of the time.
_IMAGE_CLASSES: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "png": PngImageFile,
    "jpg": JpegImageFile,
    "jpeg": JpegImageFile,
    "webp": WebPImageFile,
}
IMAGES = tuple(_IMAGE_CLASSES)

# What decoders raise on bytes that are not what they should be.
DECODING_ERRORS = (
    ValueError,
    OSError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class Inputs(abc.ABC):
    """What a model is shown of one sample, and how samples lie side by side."""

    @property
    @abc.abstractmethod
    def extensions(self) -> tuple[str, ...]:
        """The members that it may come from."""

    @abc.abstractmethod
    def decode(self, members: Members) -> NDArray[Any]:
        """The sample's array, in few bytes.

        Raises:
            one of DECODING_ERRORS: the member is missing or is not what its extension says.
        """

    @abc.abstractmethod
    def batch(self, samples: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """`[N, ...]`: pixels in uint8, numbers in float32, tokens in int64."""

    def _member(self, members: Members) -> tuple[str, bytes | memoryview]:
        for extension in self.extensions:
            if extension in members:
                return extension, members[extension]
        raise ValueError(f"it has {', '.join(members)}, and none of {', '.join(self.extensions)}")


@dataclass(frozen=True)
class ImageInputs(Inputs):
    """Images, resized to a square: pixels, uint8 `[N, H, W, C]` (see `pixels.py` for what models are shown).

    Args:
        size: H and W, in pixels. An image of that size is taken as it is; others are resampled bilinearly,
            both sides to `size`.
        channels: 1 for grey, 3 for colour.
    """

    size: int = 28
    channels: int = 1

    @property
    def extensions(self) -> tuple[str, ...]:
        return IMAGES

    def decode(self, members: Members) -> NDArray[np.uint8]:
        extension, payload = self._member(members)
        image = open_image(extension, payload)
        mode, size = "L" if self.channels == 1 else "RGB", (self.size, self.size)
        if mode == "L" or image.size != size:
            # A JPEG is decoded at a fraction of its size where that is large enough, and to grey at once.
            image.draft(mode, size)
        picture: Image.Image = image if image.mode == mode else _of_8_bits(image).convert(mode)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
        pixels = np.frombuffer(picture.tobytes(), np.uint8)
        return pixels.reshape(self.size, self.size, self.channels)

    def batch(self, samples: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
        batch = np.empty((len(samples), self.size, self.size, self.channels), np.uint8)
        for image, pixels in zip(batch, samples, strict=True):
            image[...] = pixels
        return batch


def open_image(extension: str, payload: bytes | memoryview) -> ImageFile.ImageFile:
    """An image of at most MAX_PIXELS, whose pixels are not decoded yet.

    Raises:
        ValueError: it has more, or is not what its extension, one of IMAGES, says.
    """
    try:
        image = _IMAGE_CLASSES[extension](io.BytesIO(payload))
    except DECODING_ERRORS as error:
        raise ValueError(f"it is no {extension} image ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"the image has {image.width} x {image.height} pixels, more than {MAX_PIXELS} in all"
        )
    return image


def _of_8_bits(image: Image.Image) -> Image.Image:
    """An image that Pillow converts as one sees it."""
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would make white of all but the darkest
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


@dataclass(frozen=True)
class ArrayInputs(Inputs):
    """Arrays of numbers: float32 `[N, *shape]`."""

    shape: tuple[int, ...]

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("npy",)

    def decode(self, members: Members) -> NDArray[np.float32]:
        _, payload = self._member(members)
        values = read_npy(payload)
        if values.shape != self.shape:
            raise ValueError(f"its shape is {list(values.shape)}, and {list(self.shape)} is expected")
        return finite(values)

    def batch(self, samples: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        stacked: NDArray[np.float32] = np.stack(samples)
        return stacked


@dataclass(frozen=True)
class TextInputs(Inputs):
    """Texts as tokens: int64 `[N, L]`, cut to L tokens, filled up with PAD.

    Args:
        length: L.
        vocabulary: tokens are below it; texts, and JSON records, that are no token sequences are their bytes
            in UTF-8.
    """

    length: int
    vocabulary: int = 256

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("tokens.npy", "txt", "json")

    def decode(self, members: Members) -> NDArray[np.int32]:
        tokens = read_tokens(*self._member(members), vocabulary=self.vocabulary)[: self.length]
        if not len(tokens):
            raise ValueError("it is empty")
        return tokens

    def batch(self, samples: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
        rows = np.full((len(samples), self.length), PAD, np.int64)
        for row, tokens in zip(rows, samples, strict=True):
            row[: len(tokens)] = tokens
        return rows


def read_tokens(extension: str, payload: bytes | memoryview, *, vocabulary: int) -> NDArray[np.int32]:
    """The tokens of a text: its bytes, or the numbers that it was made into; int32 `[L]`.

    Raises:
        ValueError: they are none, or are outside of the vocabulary.
    """
    if extension != "tokens.npy":
        tokens: NDArray[Any] = np.frombuffer(payload, np.uint8)
    else:
        tokens = read_npy(payload)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are integers in one row, not {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"tokens go from {tokens.min()} to {tokens.max()}, and the vocabulary has {vocabulary}, from 0"
        )
    return tokens.astype(np.int32)


def read_npy(payload: bytes | memoryview) -> NDArray[Any]:
    """The numbers of a .npy file, a view of its bytes: never a pickle, never more than the bytes that are
    there.

    Raises:
        ValueError: it is none, is cut short, or holds anything but booleans, integers and floats.
    """
    shape, is_fortran, dtype, start = _npy_header(bytes(payload[: _npy_start(payload)]))
    if min(shape, default=0) < 0 or any(type(size) is not int for size in shape):
        raise ValueError(f"its header says {list(shape)}")
    if dtype.kind not in "biuf" or dtype.hasobject:
        raise ValueError(f"it holds {dtype}, and numbers are expected")
    count = math.prod(shape)
    if start + count * dtype.itemsize != len(payload):
        raise ValueError(
            f"its header says {list(shape)} of {dtype}, {count * dtype.itemsize} bytes, and "
            f"{len(payload) - start} follow"
        )
    flat = np.frombuffer(payload, dtype, count, start)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _npy_start(payload: bytes | memoryview) -> int:
    """Where the numbers begin, as the header states its length."""
    version = np.lib.format.read_magic(io.BytesIO(payload[: np.lib.format.MAGIC_LEN]))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version is {version}, and 1.0 or 2.0 is expected")
    begin = np.lib.format.MAGIC_LEN + (2 if version == (1, 0) else 4)
    return begin + int.from_bytes(payload[np.lib.format.MAGIC_LEN : begin], "little")


# Samples of one data set have one header, or few; to read one takes longer than to copy its numbers.
@functools.lru_cache(256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether it is in Fortran's order, type, length of the header) of a .npy file's beginning."""
    stream = io.BytesIO(header)
    read = (
        np.lib.format.read_array_header_1_0
        if np.lib.format.read_magic(stream) == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    try:
        shape, is_fortran, dtype = read(stream)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        # The header is a Python literal, and what reads it raises whatever parsing raises.
        raise ValueError("its header cannot be read") from error
    return shape, is_fortran, dtype, stream.tell()


def finite(values: NDArray[Any]) -> NDArray[np.float32]:
    """The values as float32.

    Raises:
        ValueError: some are not finite, or are too large for float32.
    """
    with np.errstate(over="ignore"):
        narrow = np.asarray(values, np.float32, order="C")
    if not np.isfinite(narrow).all():
        raise ValueError("it holds numbers that are not finite in float32")
    return narrow


def read_class(payload: bytes | memoryview) -> int:
    """The class number of a `cls` member.

    Raises:
        ValueError: it is none.
    """
    text = bytes(payload[:32]).decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no class number")
    return int(text)


def read_class_name(payload: bytes | memoryview) -> str:
    """The class name of a `cls` member.

    Raises:
        ValueError: it is none.
    """
    name = bytes(payload[: MAX_NAME_BYTES + 1]).decode().strip()
    if not name or not name.isprintable() or len(payload) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:50]!r} is no class name")
    return name


class Targets(abc.ABC):
    """What a model shall say of one sample, where the data state it."""

    @property
    @abc.abstractmethod
    def extension(self) -> str:
        """The member that it comes from."""

    @abc.abstractmethod
    def decode(self, members: Members) -> NDArray[Any]:
        """The sample's target.

        Raises:
            one of DECODING_ERRORS: the member is missing or is not what its extension says.
        """

    @abc.abstractmethod
    def check(self, values: NDArray[Any]) -> NDArray[Any]:
        """The targets of several samples, `[N]` or `[N, P]`, as a model is judged by them.

        Raises:
            ValueError: they are none.
        """


@dataclass(frozen=True)
class ClassTargets(Targets):
    """Class numbers, the same in all tasks: int64 `[N]`, below `num_classes`. From the index where it has
    classes, else from `cls`."""

    num_classes: int

    @property
    def extension(self) -> str:
        return "cls"

    def decode(self, members: Members) -> NDArray[np.int64]:
        if "cls" not in members:
            raise ValueError(f"it has {', '.join(members)}, and no cls")
        return self.check(np.array(read_class(members["cls"])))

    def check(self, values: NDArray[Any]) -> NDArray[np.int64]:
        if values.dtype.kind not in "iu":
            raise ValueError(f"class numbers are integers, not {values.dtype}")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
            raise ValueError(
                f"class numbers go from {values.min()} to {values.max()}, and there are {self.num_classes} "
                "classes"
            )
        return values.astype(np.int64)


@dataclass(frozen=True)
class NumberTargets(Targets):
    """Numbers to come close to: float32 `[N, P]`. From `target.npy`."""

    num_targets: int

    @property
    def extension(self) -> str:
        return "target.npy"

    def decode(self, members: Members) -> NDArray[np.float32]:
        if "target.npy" not in members:
            raise ValueError(f"it has {', '.join(members)}, and no target.npy")
        (target,) = self.check(read_npy(members["target.npy"]).reshape(1, -1))
        return np.asarray(target)

    def check(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if values.ndim == 1 and self.num_targets == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] != self.num_targets:
            raise ValueError(
                f"targets have the shape {list(values.shape)}, and [N, {self.num_targets}] is expected"
            )
        return finite(values)
