"""Decoders agree with Pillow and numpy; what is hostile is refused, never run, and takes no memory."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from metaloom.datasets.decoders import (
    DECODING_ERRORS,
    PAD,
    ArrayInputs,
    ClassTargets,
    ImageInputs,
    NumberTargets,
    TextInputs,
    read_class,
    read_class_name,
    read_npy,
)
from metaloom.datasets.ready_episodes import ReadyParts

IMAGES: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {"quality": 95},
    "jpeg": {"quality": 95},
    "webp": {"lossless": True},
}


def picture(size: int, *, mode: str = "RGB") -> Image.Image:
    """Smooth colours, which every format keeps nearly as they are."""
    x, y = np.meshgrid(np.linspace(0, 255, size), np.linspace(0, 255, size))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, extension: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(extension, extension), **IMAGES[extension])
    return buffer.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def npy_with_header(header: bytes, payload: bytes = b"", *, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + payload


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", IMAGES)
def test_an_image_of_the_right_size_is_what_pillow_reads(extension: str, channels: int) -> None:
    payload = encoded(picture(16), extension)
    with Image.open(io.BytesIO(payload)) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    expected = pixels.reshape(16, 16, channels)
    decoder = ImageInputs(16, channels)
    found = decoder.decode({extension: memoryview(payload), "cls": b"1"})
    # A JPEG's grey is its own, not computed from colours: two roundings apart at most.
    tolerance = 2 if extension in ("jpg", "jpeg") and channels == 1 else 0
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance
    batch = decoder.batch([found, found])
    assert (batch.dtype.name, batch.shape) == ("uint8", (2, 16, 16, channels))
    assert np.array_equal(batch[1], found)


@pytest.mark.parametrize("extension", IMAGES)
def test_an_image_of_another_size_is_resampled_bilinearly(extension: str) -> None:
    found = ImageInputs(24, 3).decode({extension: encoded(picture(96), extension)})
    expected = np.asarray(picture(96).resize((24, 24), Image.Resampling.BILINEAR))
    # Lossy compression, and a JPEG is halved by its own transform before.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_png_of_every_mode_becomes_grey_or_colour(mode: str) -> None:
    image = picture(8, mode=mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        found = ImageInputs(8, channels).decode({"png": encoded(image, "png")})
        expected = np.asarray(image.convert(target)).reshape(8, 8, channels)
        assert np.array_equal(found, expected)


def test_png_of_16_bits_keeps_its_greys() -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for channels in (1, 3):
        found = ImageInputs(8, channels).decode({"png": encoded(Image.fromarray(deep), "png")})
        assert np.array_equal(found, np.broadcast_to((deep // 256)[:, :, None], (8, 8, channels)))


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    image = picture(8, mode="P")
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=bytes([0, 10, 20]))
    found = ImageInputs(8, 3).decode({"png": buffer.getvalue()})
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("extension", IMAGES)
def test_a_truncated_image_is_refused(extension: str) -> None:
    payload = encoded(picture(64), extension)
    for stop in (0, 5, 40, len(payload) // 2):
        with pytest.raises(DECODING_ERRORS):
            ImageInputs(64, 3).decode({extension: payload[:stop]})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(IMAGES)), st.integers(0, 2**32))
def test_a_corrupt_image_is_an_image_or_one_of_the_known_errors(extension: str, seed: int) -> None:
    rng = random.Random(seed)
    payload = bytearray(encoded(picture(16), extension))
    for _ in range(rng.randint(1, 8)):
        payload[rng.randrange(len(payload))] = rng.randrange(256)
    try:
        found = ImageInputs(16, 3).decode({extension: bytes(payload)})
    except DECODING_ERRORS:
        return
    assert (found.dtype.name, found.shape) == ("uint8", (16, 16, 3))


def test_an_image_is_read_as_what_its_extension_says_and_as_nothing_else() -> None:
    with pytest.raises(ValueError, match="it is no png image"):
        ImageInputs(16).decode({"png": encoded(picture(16), "jpg")})
    with pytest.raises(ValueError, match="it is no jpg image"):
        ImageInputs(16).decode({"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"})


def declared(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (8200, 8200), (1 << 30, 1)])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(
    width: int, height: int, tmp_path: Path
) -> None:
    (tmp_path / "bomb.png").write_bytes(declared(width, height))
    # In a process of its own, whose memory has a limit: 30000 x 30000 pixels are 2.7 GB.
    code = (
        "import resource, sys\n"
        "from metaloom.datasets.decoders import DECODING_ERRORS, ImageInputs\n"
        "payload = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    ImageInputs(28, 3).decode({'png': payload})\n"
        "except DECODING_ERRORS as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.png")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    message, taken_kib = done.stdout.splitlines()
    assert "exceeds limit" in message or f"the image has {width} x {height} pixels, more than" in message
    assert int(taken_kib) < 30 * 1024


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "|u1", "<i8", ">i2", "|b1"])
@pytest.mark.parametrize("shape", [(3, 4), (12,), (0, 5), ()])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_what_numpy_wrote(dtype: str, shape: tuple[int, ...], order: Any) -> None:
    values = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype), order=order)
    found = read_npy(memoryview(npy(values)))
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)
    narrow = ArrayInputs(shape).decode({"npy": npy(values)})
    assert narrow.dtype == np.float32
    assert np.array_equal(narrow, values.astype(np.float32))


def test_an_array_with_a_long_header_is_read() -> None:
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }\n"
    assert read_npy(npy_with_header(header, b"\1\0\0\0\2\0\0\0", version=2)).tolist() == [1, 2]


class MakesFile:
    """Something whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    evil = MakesFile(tmp_path / "made")
    stored = npy(np.array([evil], dtype=object), allow_pickle=True)
    pickled = pickle.dumps(evil)
    npz = io.BytesIO()
    np.savez(npz, a=np.array([evil], dtype=object))
    for payload in (stored, pickled, npz.getvalue()):
        with pytest.raises(ValueError, match=r"it holds object, and numbers are expected|magic string"):
            read_npy(payload)
        names = {"npy": payload, "tokens.npy": payload, "target.npy": payload, "png": payload, "cls": payload}
        for decode in (
            ArrayInputs((1,)).decode,
            TextInputs(4).decode,
            ImageInputs().decode,
            NumberTargets(1).decode,
            ClassTargets(3).decode,
        ):
            with pytest.raises(DECODING_ERRORS):
                decode(names)
    # The bait bites where somebody does unpickle it.
    pickle.loads(pickled)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pt", "pth", "pyd", "dill", "joblib"])
def test_members_with_pickles_are_not_looked_at(extension: str) -> None:
    looked_at = []

    class Watched(dict[str, bytes]):
        def __getitem__(self, extension: str) -> bytes:
            looked_at.append(extension)
            return super().__getitem__(extension)

    members = Watched({extension: b"cos\n", "npy": npy(np.ones(2))})
    assert ArrayInputs((2,)).decode(members).tolist() == [1, 1]
    assert looked_at == ["npy"]
    del members["npy"]
    for decoder in (ArrayInputs((2,)), ImageInputs(), TextInputs(4)):
        with pytest.raises(ValueError, match=rf"it has {extension}, and none of "):
            decoder.decode(members)
    assert looked_at == ["npy"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy(np.zeros((3, 4), "<f4"))[:-1], r"its header says \[3, 4\] of float32, 48 bytes, and 47 follow"),
        (npy(np.zeros(3)) + b"x", r"24 bytes, and 25 follow"),
        (
            npy_with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
            r"\[1000000000000\] of float64, 8000000000000 bytes, and 0 follow",
        ),
        (
            npy_with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }\n", bytes(8)),
            r"its header says \[-1, -1\]",
        ),
        (
            npy_with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }\n", bytes(4)),
            r"its header says \[True\]",
        ),
        (npy(np.array(["a"])), r"it holds <U1, and numbers are expected"),
        (npy(np.zeros(1, "<c8")), r"it holds complex64, and numbers are expected"),
        (npy(np.zeros(1, "<M8[s]")), r"it holds datetime64"),
        (npy(np.zeros(1, [("a", "<f4")])), r"and numbers are expected"),
        (b"", "magic string"),
        (b"\x93NUMPY\x03\0\0\0\0\0", r"its format version is \(3, 0\), and 1\.0 or 2\.0 is expected"),
        (npy_with_header(b"{'descr': '<f8'"), "its header cannot be read$"),
        (npy_with_header(b"{[]: 1}\n"), "its header cannot be read"),
        (npy_with_header(b"(" * 5000), "its header cannot be read$"),
        (npy_with_header(b"-" * 9000 + b"1"), "its header cannot be read$"),
        (npy_with_header(b"__import__('os').mkdir('made')"), "its header cannot be read$"),
        (npy_with_header(b"{" + b" " * 60000 + b"}"), "its header cannot be read$"),
    ],
)
def test_files_that_are_no_plain_arrays_are_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_npy(payload)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 127), st.sampled_from([1, 2]))
def test_a_corrupt_header_of_an_array_is_an_array_or_a_value_error(
    noise: bytes, place: int, version: int
) -> None:
    header = bytearray(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".ljust(127) + b"\n")
    header[place : place + len(noise)] = noise
    with suppress(ValueError):
        read_npy(npy_with_header(bytes(header), bytes(24), version=version))


def test_a_header_that_claims_much_allocates_nothing() -> None:
    import tracemalloc

    payload = npy_with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,), }\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="and 0 follow"):
            read_npy(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_float32_does_not_hold_are_refused(bad: float) -> None:
    payload = npy(np.array([1.0, bad]))
    with pytest.raises(ValueError, match="not finite in float32"):
        ArrayInputs((2,)).decode({"npy": payload})
    with pytest.raises(ValueError, match="not finite in float32"):
        NumberTargets(2).decode({"target.npy": payload})


def test_an_array_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its shape is \[3, 2\], and \[2, 3\] is expected"):
        ArrayInputs((2, 3)).decode({"npy": npy(np.zeros((3, 2)))})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_tokens_are_cut_and_filled_up(dtype: Any) -> None:
    decoder = TextInputs(4, vocabulary=100)
    long = decoder.decode({"tokens.npy": npy(np.arange(7, dtype=dtype)), "txt": b"not looked at"})
    short = decoder.decode({"txt": b"AB"})
    assert long.dtype == np.int32
    rows = decoder.batch([long, short])
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 1, 2, 3], [65, 66, PAD, PAD]]


def test_texts_are_their_bytes() -> None:
    assert TextInputs(9).decode({"txt": "é!".encode()}).tolist() == [0xC3, 0xA9, 0x21]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tokens.npy": npy(np.array([0, 50]))}, "tokens go from 0 to 50, and the vocabulary has 50, from 0"),
        ({"tokens.npy": npy(np.array([-1, 3]))}, "tokens go from -1 to 3"),
        ({"tokens.npy": npy(np.array([2**64 - 1], "<u8"))}, "tokens go from 18446744073709551615"),
        ({"tokens.npy": npy(np.zeros((2, 2), int))}, r"integers in one row, not int64 \[2, 2\]"),
        ({"tokens.npy": npy(np.zeros(2))}, r"integers in one row, not float64 \[2\]"),
        ({"txt": b"abc"}, "tokens go from 97 to 99, and the vocabulary has 50"),
        ({"txt": b""}, "it is empty"),
        ({"png": b"", "cls": b"1"}, r"it has png, cls, and none of tokens\.npy, txt, json"),
    ],
)
def test_tokens_that_are_none_are_refused(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextInputs(4, vocabulary=50).decode(members)


def test_class_numbers_and_names_are_texts() -> None:
    assert read_class(memoryview(b" 17\n")) == 17
    assert read_class_name(memoryview(" löwe \n".encode())) == "löwe"
    assert ClassTargets(18).decode({"cls": b"17"}) == 17


@pytest.mark.parametrize("payload", [b"", b"-1", b"1.0", b"cat", b"\xff", b"1e3", b"1 2", "²".encode()])
def test_what_is_no_class_number_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="is no class number"):
        read_class(payload)


@pytest.mark.parametrize("payload", [b"", b" \n", b"a\0b", b"a\nb", b"\x1b[2J", b"x" * 1001])
def test_what_is_no_class_name_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="is no class name"):
        read_class_name(payload)
    with pytest.raises(ValueError, match="decode"):
        read_class_name(b"\xff")


def test_targets_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="class numbers go from 3 to 3, and there are 3 classes"):
        ClassTargets(3).decode({"cls": b"3"})
    with pytest.raises(ValueError, match="it has txt, and no cls"):
        ClassTargets(3).decode({"txt": b"3"})
    with pytest.raises(ValueError, match="class numbers are integers, not float64"):
        ClassTargets(3).check(np.zeros(2))
    with pytest.raises(ValueError, match=r"it has txt, and no target\.npy"):
        NumberTargets(1).decode({"txt": b"3"})
    with pytest.raises(ValueError, match=r"targets have the shape \[1, 3\], and \[N, 2\] is expected"):
        NumberTargets(2).decode({"target.npy": npy(np.zeros(3))})


def test_numbers_to_come_close_to_are_float32() -> None:
    found: NDArray[np.float32] = NumberTargets(2).decode({"target.npy": npy(np.array([1.5, 2]))})
    assert (found.dtype.name, found.tolist()) == ("float32", [1.5, 2])


def test_json_that_is_nested_too_deep_is_one_of_the_known_errors() -> None:
    numbers = npy(np.zeros((1, 2)))
    parts = {"support.inputs.npy": numbers, "query.inputs.npy": npy(np.ones((1, 2)))}
    parts |= {"support.targets.npy": npy(np.zeros(1, int)), "query.targets.npy": npy(np.zeros(1, int))}
    decode = ReadyParts(ArrayInputs((2,)), ClassTargets(2), 1, 1)
    assert json.loads(decode(parts | {"json": b'{"task": "a"}'})["facts"].tobytes()) == {"task": "a"}
    with pytest.raises(DECODING_ERRORS):
        decode(parts | {"json": b"[" * 200_000})
