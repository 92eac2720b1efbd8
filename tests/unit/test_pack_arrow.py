"""Folders of Hugging Face's datasets and parquet files as shards.

The fixtures hf-* in tests/data were written by the library itself (datasets 5.2.0); it is not needed here.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metaloom.datasets.pack import Columns, HuggingFace, PackedDataset, Parquet, pack_dataset
from metaloom.errors import StreamError
from tests.packed import array_of, image_bytes, samples_of

DATA = Path(__file__).parents[1] / "data"
IMAGES = DATA / "hf-images"
TEXTS = DATA / "hf-texts"


def pack(path: Path, out: Path, *, max_broken: int = 0, **columns: Any) -> PackedDataset:
    asked = Columns(**columns)
    source = Parquet((path,), asked) if path.suffix == ".parquet" else HuggingFace(path, asked)
    return pack_dataset(source, out, max_broken=max_broken)


def grey_of(payload: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(payload)))[0, 0, 0])


def test_a_saved_dataset_dict_is_packed_with_its_splits_and_class_names(tmp_path: Path) -> None:
    packed = pack(IMAGES, tmp_path / "out", inputs=("image",), targets=("label",), group="who")
    found = samples_of(tmp_path / "out", "train")
    # As written: greys 10, 20 ... with labels zebra, ant, cat, ant, zebra, in two files of 3 and 2 rows.
    assert {key: (grey_of(m["png"]), m["cls"]) for key, m in found.items()} == {
        "train/00000/00000001": (20, b"0"),
        "train/00001/00000000": (40, b"0"),
        "train/00000/00000002": (30, b"1"),
        "train/00000/00000000": (10, b"2"),
        "train/00001/00000001": (50, b"2"),
    }
    assert [*packed.index.splits] == ["train", "validation"]
    assert packed.index.split("train").attributes["group"].tolist() == [1, 1, 0, 0, 0]
    assert [grey_of(m["png"]) for m in samples_of(tmp_path / "out", "validation").values()] == [100, 110]
    assert packed.smallest_class == ("train", "cat", 1)


def test_a_saved_dataset_of_texts_and_its_parquet_give_the_same_samples(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inputs": ("text",), "targets": ("label",), "keep": ("ids",)}
    first = pack(TEXTS, tmp_path / "saved", **options)
    second = pack(DATA / "hf-texts.parquet", tmp_path / "parquet", **options)
    saved, parquet = (samples_of(tmp_path / name, "train") for name in ("saved", "parquet"))
    assert list(saved.values()) == list(parquet.values())
    assert [(m["txt"], m["cls"], json.loads(m["json"])) for m in saved.values()] == [
        (b"bad film", b"0", {"ids": [4]}),
        (b"good film", b"1", {"ids": [1, 2, 3]}),
        (b"fine", b"1", {"ids": [5, 6]}),
    ]
    assert first.smallest_class == second.smallest_class == ("train", "neg", 1)
    assert not list((tmp_path / "parquet").glob("spool*"))


def test_sequences_are_numbers_or_tokens_as_asked(tmp_path: Path) -> None:
    packed = pack(TEXTS, tmp_path / "tokens", task="language-modelling", inputs=("ids",))
    assert packed.index.split("train").attributes["size"].tolist() == [3, 1, 2]
    path = write_parquet(tmp_path / "r.parquet", {"x": [[1, 2], [3, 4]], "y": [5, 6]})
    pack(path, tmp_path / "numbers", task="regression", inputs=("x",), targets=("y",))
    found = samples_of(tmp_path / "numbers", "train").values()
    assert [array_of(members["npy"]).tolist() for members in found] == [[1, 2], [3, 4]]
    assert [array_of(members["target.npy"]).tolist() for members in found] == [[5], [6]]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_rows_of_many_row_groups_lie_by_class(tmp_path: Path) -> None:
    labels = [f"c{n * 7 % 5}" for n in range(2500)]
    texts = [f"text {n}" for n in range(2500)]
    path = write_parquet(tmp_path / "r.parquet", {"t": texts, "y": labels}, row_group_size=300)
    pack(path, tmp_path / "out", inputs=("t",), targets=("y",))
    found = [(m["cls"], m["txt"]) for m in samples_of(tmp_path / "out", "train").values()]
    order = sorted(range(2500), key=lambda n: (labels[n], n))
    assert found == [(labels[n][1:].encode(), texts[n].encode()) for n in order]


def test_binary_columns_and_lists_of_structs_are_packed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "r.parquet", {"x": [image_bytes(5), b"broken"], "y": [1, 1]})
    packed = pack(path, tmp_path / "out", inputs=("x",), targets=("y",), kind="image", max_broken=1)
    assert samples_of(tmp_path / "out", "train") == {"r/00000000": {"png": image_bytes(5), "cls": b"0"}}
    assert [str(entry) for entry in packed.broken] == ["r.parquet, row 2: is no PNG, JPEG or WebP image"]
    example = {"input": [1.0, 2.0], "target": 3.5}
    other = {"input": [2.0, 2.0], "target": 3.5}
    path = write_parquet(tmp_path / "e.parquet", {"support": [[example]], "query": [[other]], "site": ["s"]})
    pack(path, tmp_path / "e", task="episodes", inputs=("input",), targets=("target",))
    (members,) = samples_of(tmp_path / "e", "train").values()
    assert array_of(members["query.targets.npy"]).tolist() == [[3.5]]
    assert json.loads(members["json"]) == {"site": "s"}


def test_unknown_labels_are_named_by_row(tmp_path: Path) -> None:
    schema = pa.schema([("t", pa.string()), ("y", pa.int64())]).with_metadata(
        {
            "huggingface": json.dumps(
                {"info": {"features": {"y": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
            )
        }
    )
    table = pa.table({"t": ["p", "q", "r", "s"], "y": [1, -1, 2, None]}, schema=schema)
    pq.write_table(table, tmp_path / "r.parquet")
    packed = pack(tmp_path / "r.parquet", tmp_path / "out", inputs=("t",), targets=("y",), max_broken=3)
    assert [str(entry) for entry in packed.broken] == [
        "r.parquet, row 2: has the label -1 in column 'y', which has 2 classes",
        "r.parquet, row 3: has the label 2 in column 'y', which has 2 classes",
        "r.parquet, row 4: has nothing in column 'y', which needs a name",
    ]
    assert packed.smallest_class == ("train", "b", 1)


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inputs": ("text",), "targets": ("label",)}
    whole = (DATA / "hf-texts.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StreamError, match=r"cut\.parquet is no whole parquet file"):
        pack(tmp_path / "cut.parquet", tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())
    saved = Path(shutil.copytree(TEXTS, tmp_path / "saved"))
    data = saved / "data-00000-of-00001.arrow"
    data.write_bytes(data.read_bytes()[:700])
    with pytest.raises(StreamError, match=r"data-00000-of-00001\.arrow is no whole Arrow stream file"):
        pack(saved, tmp_path / "out", **options)


def test_offsets_that_point_elsewhere_are_found_not_followed(tmp_path: Path) -> None:
    good = pa.array(["aa", "bb", "cc"])
    offsets = np.array([0, 2, 1 << 30, 6], np.int32)
    bad = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets.tobytes()), good.buffers()[2]])
    saved = Path(shutil.copytree(TEXTS, tmp_path / "saved"))
    batch = pa.record_batch({"text": bad, "label": pa.array([0, 0, 1])})
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, batch.schema) as stream,
    ):
        stream.write_batch(batch)
    packed = pack(saved, tmp_path / "out", inputs=("text",), targets=("label",), max_broken=2)
    assert [entry.place for entry in packed.broken] == [
        "data-00000-of-00001.arrow, row 2",
        "data-00000-of-00001.arrow, row 3",
    ]
    assert [m["txt"] for m in samples_of(tmp_path / "out", "train").values()] == [b"aa"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", None, r"has neither dataset_dict\.json nor state\.json, so save_to_disk"),
        ("state.json", "{", r"state\.json cannot be read: "),
        ("state.json", "[]", r"state\.json is a JSON list, not an object"),
        ("state.json", '{"_data_files": []}', r"state\.json names no data files of this folder"),
        (
            "state.json",
            '{"_data_files": [{"filename": "../x.arrow"}]}',
            r"names no data files of this folder",
        ),
        (
            "state.json",
            '{"_data_files": [{"filename": "x.arrow"}]}',
            r"lacks x\.arrow, which its state\.json names",
        ),
        (
            "state.json",
            '{"_indices_data_files": [{"filename": "i"}]}',
            r"selects its rows by an index.*flatten_ind",
        ),
        ("dataset_dict.json", '{"splits": [".."]}', r"dataset_dict\.json has no list of splits"),
    ],
)
def test_folders_that_are_not_as_the_library_writes_them_are_refused(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    saved = Path(shutil.copytree(TEXTS, tmp_path / "saved"))
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(content)
    with pytest.raises(StreamError, match=message):
        pack(saved, tmp_path / "out", inputs=("text",), targets=("label",))


def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(
        StreamError, match=r"arrow has no column 'txt'; it has text, label, ids\. Did you mean 't"
    ):
        pack(TEXTS, tmp_path / "out", inputs=("txt",), targets=("label",))
    with pytest.raises(StreamError, match=r"hf-texts\.parquet has no column 'lable'; .*Did you mean 'label'"):
        pack(DATA / "hf-texts.parquet", tmp_path / "out", inputs=("text",), targets=("lable",))
