"""What members of samples hold: checked, and in the one form in which they are packed."""

from __future__ import annotations

import ast
import functools
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from metaloom.datasets.decoders import MAX_PIXELS
from metaloom.datasets.pack.plan import BadSample
from metaloom.datasets.reader import SAMPLE_LIMIT_BYTES
from metaloom.errors import StreamError

IMAGE_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # by Pillow's name of the format
MAX_SAMPLE_BYTES = 64 << 20
# What Pillow reports broken images by; zlib.error and struct.error are no OSErrors.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, MemoryError)
_MAX_HEADER_BYTES = 10_000


@dataclass(frozen=True)
class Limits:
    """The largest sample that is packed: a larger one is a mistake, or means harm.

    Limits are never above those of the readers, which would pass over what was packed.

    Args:
        max_pixels: of an image, width times height.
        max_sample_bytes: of a file, or a record.
    """

    max_pixels: int = MAX_PIXELS
    max_sample_bytes: int = MAX_SAMPLE_BYTES

    def __post_init__(self) -> None:
        for option, value, most in (
            ("pixels", self.max_pixels, MAX_PIXELS),
            ("sample-bytes", self.max_sample_bytes, SAMPLE_LIMIT_BYTES),
        ):
            if value < 1:
                raise StreamError(f"--max-{option} is {value}; it must be at least 1.")
            if value > most:
                raise StreamError(
                    f"--max-{option} is {value}; it must be at most {most}: readers pass over what is larger."
                )


def read_file(path: str | Path, limits: Limits) -> bytes:
    """All of a file.

    Raises:
        BadSample: it is missing, is no plain file, or is too large.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not os.path.isfile(file.fileno()):
                raise BadSample("is no plain file")
            if status.st_size > limits.max_sample_bytes:
                raise BadSample(too_large(status.st_size, limits.max_sample_bytes))
            return file.read(limits.max_sample_bytes)
    except FileNotFoundError as error:
        raise BadSample(f"there is no file {os.fspath(path)!r}") from error
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise BadSample(f"cannot be read: {error}") from error


def too_large(num_bytes: int, max_bytes: int) -> str:
    """The words for a sample over the limit."""
    return f"has {num_bytes} bytes; the limit is {max_bytes} (--max-sample-bytes)"


def image_member(payload: bytes, *, size: int | None, limits: Limits) -> tuple[str, bytes]:
    """(extension, bytes) of an image that can be decoded.

    Args:
        size: None keeps the bytes as they are. Otherwise the largest square around the centre is brought to
            this many pixels a side and written as PNG, grey or RGB; what is transparent becomes white, and
            the camera's rotation is carried out.

    Raises:
        BadSample: it is no PNG, JPEG or WebP, is broken, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            # Without draft modes or lazy frames: all pixels of the first frame are decoded.
            with Image.open(io.BytesIO(payload), formats=list(IMAGE_EXTENSIONS)) as image:
                pixels = image.width * image.height
                if pixels > limits.max_pixels:
                    raise BadSample(
                        f"has {image.width} x {image.height} pixels; the limit is {limits.max_pixels} "
                        f"(--max-pixels)"
                    )
                image.load()
                if size is None:
                    return IMAGE_EXTENSIONS[str(image.format)], payload
                return "png", _png(_square(image, size))
    except Image.DecompressionBombError as error:
        raise BadSample(f"has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("is no PNG, JPEG or WebP image") from error
    except _IMAGE_ERRORS as error:
        raise BadSample(f"is a broken image: {error or type(error).__name__}") from error


def array_member(payload: bytes) -> bytes:
    """The array of an .npy file, in C order and little endian; nothing is unpickled.

    Raises:
        BadSample: it is no .npy file of numbers, or its header does not fit its size.
    """
    file = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(file)
        header_bytes = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise BadSample(f"is no .npy array: its header has {header_bytes} bytes")
        header = ast.literal_eval(file.read(header_bytes).decode("latin1"))
        dtype = np.dtype(header["descr"])
        shape, fortran = tuple(header["shape"]), bool(header["fortran_order"])
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise BadSample(f"is no .npy array: {error}") from error
    if dtype.kind not in "biuf":
        raise BadSample(f"holds {dtype}, not numbers; arrays of objects, texts and records are not packed")
    if not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise BadSample(f"is no .npy array: its shape is {shape}")
    data = payload[file.tell() :]
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise BadSample(
            f"has {len(data)} bytes of numbers, but its header tells of {math.prod(shape)} {dtype}: it is "
            f"cut short or damaged"
        )
    return npy_bytes(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C"))


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as an .npy file, in C order and little endian."""
    file = io.BytesIO()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # Not ascontiguousarray, which gives a number the shape [1].
    np.save(file, np.asarray(little, order="C"), allow_pickle=False)
    return file.getvalue()


def numbers(value: Any) -> NDArray[np.float32]:
    """A number, or nested lists of numbers of one length each, as float32; a text counts as its number.

    Raises:
        BadSample: it is something else, or is not finite.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise BadSample(f"{_short(value)} is no number") from error
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise BadSample(f"its lists of numbers differ in length: {_short(value)}") from error
    if array.dtype.kind not in "iuf" or (array.size == 0):
        raise BadSample(f"{_short(value)} is no number and no list of numbers")
    with np.errstate(over="ignore"):
        array = array.astype("<f4")
    if not np.isfinite(array).all():
        raise BadSample(f"{_short(value)} is not finite in 32 bits")
    return array


def tokens(value: Any) -> NDArray[np.int32]:
    """A list of token numbers as int32 [its length].

    Raises:
        BadSample: it is something else.
    """
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise BadSample(f"{_short(value)} is no list of tokens, integers from 0 to 2**31 - 1")
    return np.array(value, "<i4")


def text(value: Any) -> str:
    """A text that is not empty.

    Raises:
        BadSample: it is something else, or not Unicode.
    """
    if not isinstance(value, str):
        raise BadSample(f"{_short(value)} is no text")
    if not value:
        raise BadSample("its text is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSample("its text is not UTF-8") from error
    return value


def encode_text(value: str, tokenizer: str | None) -> NDArray[np.int32]:
    """The tokens of a text: of a tokenizer's file, or its bytes in UTF-8.

    Raises:
        BadSample: there are none.
    """
    if tokenizer is None:
        return np.frombuffer(value.encode(), np.uint8).astype("<i4")
    found = np.array(load_tokenizer(tokenizer).encode(value).ids, "<i4")
    if not len(found):
        raise BadSample("its text has no tokens")
    return found


@functools.lru_cache(maxsize=2)
def load_tokenizer(path: str) -> Any:
    """The tokenizer of a JSON file of the library `tokenizers`.

    Raises:
        StreamError: the library is not installed, or the file is none of its own.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise StreamError(
            f"--tokenizer {path} needs the package tokenizers: pip install tokenizers, or leave the option "
            f"out to pack texts as bytes."
        ) from error
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise StreamError(
            f"--tokenizer {path} is no tokenizer of the library tokenizers ({error}); give its "
            f"tokenizer.json."
        ) from error
    # What a file says of cutting and padding is for batches of another program.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def padded_rows(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """int32 [N, longest]: rows of tokens, filled up with -1."""
    table = np.full((len(rows), max(map(len, rows))), -1, "<i4")
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe is opened at once, and found to be no plain file, rather than waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _square(image: Image.Image, size: int) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        is_grey = image.mode == "LA"
        upright = Image.alpha_composite(white, upright).convert("L" if is_grey else "RGB")
    elif upright.mode in ("1", "L"):
        upright = upright.convert("L")
    else:
        upright = upright.convert("RGB")
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    # Cut out first: a box given to resize would let in what lies around it.
    square = upright.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
