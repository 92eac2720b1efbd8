"""What lies in packed shards, as plain webdataset sees it, and things to pack."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def samples_of(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """The members of a split's samples by key, in their order, read by webdataset without decoding."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with shard.open("rb") as stream:  # which WebDataset itself would leave open
            for sample in group_by_keys(tar_file_expander([{"stream": stream, "url": shard.name}])):
                assert sample["__key__"] not in found
                found[sample["__key__"]] = {name: value for name, value in sample.items() if name[:2] != "__"}
    return found


def pictures(glyphs: Path, folder: Path, num_classes: int) -> Path:
    """A task of test images of some classes: a folder for each class."""
    for key, members in samples_of(glyphs, "test").items():
        label = int(members["cls"])
        if label < num_classes:
            place = folder / f"class {label}" / f"{key.replace('/', '-')}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(members["png"])
    return folder


def array_of(payload: bytes) -> NDArray[Any]:
    """The array of an .npy member."""
    array: NDArray[Any] = np.load(io.BytesIO(payload), allow_pickle=False)
    return array


def image_bytes(color: int | tuple[int, ...], *, size: tuple[int, int] = (8, 6), form: str = "PNG") -> bytes:
    """A plain image: grey of a number, RGB of three."""
    file = io.BytesIO()
    mode = "L" if isinstance(color, int) else "RGB" if len(color) == 3 else "RGBA"
    Image.new(mode, size, color).save(file, form)
    return file.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """The root of a tree of files, which now exists."""
    for name, payload in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(payload)
    return root
