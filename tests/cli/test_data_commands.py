"""`metaloom data pack | inspect | verify` as a newcomer meets them: what they print, and one mistake each."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaloom.cli import main
from metaloom.datasets import Index
from metaloom.datasets.pack.payloads import npy_bytes
from tests.packed import image_bytes, samples_of, write_tree
from tests.tars import END, sample, tar_of

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of five images below the working folder."""
    monkeypatch.chdir(tmp_path)
    names = ("wren", "jay", "auk")
    files = {
        f"{name}/{n}.png": image_bytes((50 * row, 40 * n, 9), size=(20, 14))
        for row, name in enumerate(names)
        for n in range(5)
    }
    return write_tree(tmp_path / "birds", files)


def call(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command."""
    code = main(shlex.split(words))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_pack_images_ends_with_a_summary_and_the_next_command(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (birds / "jay" / "4.png").unlink()
    (birds / "auk" / "9.png").write_bytes(image_bytes((0, 0, 9), size=(20, 14)))
    (birds / "auk" / "bad.png").write_bytes(b"")
    code, out, errors = call("data pack images birds out --processes 1 --max-broken 1", capsys)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["listing", "samples", "of", "birds"] in lines
    assert ["split", "samples", "classes", "groups", "shards", "bytes"] in lines
    size = str(sum(file.stat().st_size for file in Path("out").glob("*.tar")))
    assert ["train", "15", "3", "1", size] in lines
    assert ["smallest", "class:", "jay", "(train),", "4", "samples"] in lines
    assert ["largest", "class:", "auk", "(train),", "6", "samples"] in lines
    assert lines[-1] == ["next:", "metaloom", "data", "inspect", "out", "--episode", "0"]
    assert "warning: 1 sample has content that is also in another class (wren/0.png is auk/9.png)" in errors
    assert "warning: 1 broken sample was left out:\n  auk/bad.png: is no PNG, JPEG or WebP image" in errors
    assert "--split train=0.7" in errors  # all in one split
    code, out, _ = call(shlex.join(lines[-1][2:]), capsys)  # the next step, as it is printed
    assert code == 0
    assert out.count("1 support, 3 query images") == 3


def test_pack_takes_all_options_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"q": f"text {n}", "label": f"c{n % 3}", "who": f"u{n}", "id": f"key{n}", "extra": n}
        for n in range(60)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = call(
        f"data pack records {tmp_path}/r.jsonl {tmp_path}/out --input q --target label --group who --key id "
        "--keep extra --split train=0.5,test=0.5 --split-by group --name mine --shard-mib 1 --processes 1 "
        "--task classification --input-kind text --max-sample-bytes 500",
        capsys,
    )
    assert code == 0
    assert "mine in " in out
    found = samples_of(tmp_path / "out", "train") | samples_of(tmp_path / "out", "test")
    assert found.keys() == {f"key{n}" for n in range(60)}
    assert found["key7"]["txt"] == b"text 7"
    assert json.loads(found["key7"]["json"]) == {"extra": 7}
    source = json.loads((tmp_path / "out" / "index.json").read_text())["source"]
    assert source["kind"] == "records"
    assert source["divided_by"] == "group"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data pack images nothing out", "nothing cannot be read as a folder of images"),
        ("data pack images birds out --split train=2", "the share of 'train' is 2; it must be above 0"),
        (
            "data pack images birds birds",
            "birds holds other files (auk, jay, wren); birds needs a directory of its",
        ),
        ("data pack images birds out --processes 0", "--processes is 0; it must be at least 1."),
        ("data pack images birds out --shard-mib 0", "--shard-mib gives shards of 0 bytes"),
        ("data pack images birds s3://bucket/out", "data sets are packed in a local directory"),
        ("data pack records r.csv out --input a --target b", "there is no file r.csv."),
        (
            "data pack parquet r.csv out --input a --target b",
            "r.csv is none of .parquet; its name has to say",
        ),
        (
            "data pack huggingface birds out --input a --target b",
            "birds has neither dataset_dict.json nor state",
        ),
        ("data pack records r.csv out --target b", "--input names no column"),
        ("data inspect out", "out holds no index.json"),
        ("data verify out", "out holds no index.json"),
    ],
)
def test_mistakes_end_with_code_3_and_one_message(
    birds: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = call(words, capsys)
    assert code == 3
    assert errors.startswith("error: ")
    assert message in errors
    assert not Path("out", "index.json").exists()


def test_inspect_shows_counts_and_a_histogram(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (birds / "jay" / "4.png").unlink()
    call("data pack images birds out --processes 1", capsys)
    code, out, _ = call("data inspect out", capsys)
    assert code == 0
    assert ["train", "14", "3", "cls,", "png"] in [line.split() for line in out.splitlines()]
    assert f"  auk   5  {40 * '#'}\n  jay   4  {32 * '#'}\n  wren  5  {40 * '#'}\n" in out


def test_inspect_draws_support_over_query_of_each_class(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("data pack images birds out --processes 1", capsys)
    words = "data inspect out --split train --episode 1 --n-way 3 --n-shot 2 --n-query 3 --out sheet.png"
    assert call(words, capsys)[0] == 0
    with Image.open("sheet.png") as drawn:
        sheet = np.asarray(drawn)
    # Every sample's colour is one of its own: (50 * class, 40 * n, 9).
    rule = next(
        y for y in range(60, len(sheet)) if (sheet[y, 20:-20] == sheet[y, 20]).all() and sheet[y, 20, 0] < 255
    )
    above = {tuple(c) for c in sheet[:rule].reshape(-1, 3).tolist() if c[2] == 9 and c[0] % 50 == 0}
    below = {tuple(c) for c in sheet[rule:].reshape(-1, 3).tolist() if c[2] == 9 and c[0] % 50 == 0}
    assert len(above) == 6
    assert len(below) == 9
    assert not above & below
    for row in range(3):
        assert sum(red == 50 * row for red, _, _ in above) == 2
        assert sum(red == 50 * row for red, _, _ in below) == 3
    before = Path("sheet.png").read_bytes()
    call(words, capsys)
    assert Path("sheet.png").read_bytes() == before


def test_inspect_shows_texts_tokens_and_ready_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = DATA / "hf-texts", tmp_path / "out"
    call(f"data pack huggingface {saved} {out} --input text --target label --processes 1", capsys)
    _, shown, _ = call(f"data inspect {out} --episode 0 --n-way 1 --n-query 1", capsys)
    assert shown.splitlines()[-3] == "pos"
    assert sorted(line.split(maxsplit=1) for line in shown.splitlines()[-2:]) in (
        [["query", "fine"], ["support", "good film"]],
        [["query", "good film"], ["support", "fine"]],
    )
    call(
        f"data pack huggingface {saved} {tmp_path}/t --input ids --task language-modelling --processes 1",
        capsys,
    )
    _, shown, _ = call(f"data inspect {tmp_path}/t --episode 0", capsys)
    assert "support  1 2 3" in shown
    example = '{"support": [{"input": "a\\u001bb", "target": "x"}], "query": [{"input": "c", "target": "x"}]}'
    (tmp_path / "e.jsonl").write_text(example)
    call(f"data pack records {tmp_path}/e.jsonl {tmp_path}/e --task episodes --processes 1", capsys)
    _, shown, _ = call(f"data inspect {tmp_path}/e --episode 5", capsys)
    assert "  support  x: ab\n  query    x: c\n" in shown  # without the control character


def test_inspect_shows_the_built_in_sets(
    glyphs: Path, stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    code, _, _ = call(f"data inspect {glyphs} --split test --n-way 4 --n-shot 2 --out {sheet}", capsys)
    assert code == 0
    with Image.open(sheet) as drawn:
        assert drawn.width > 200
    code, shown, _ = call(f"data inspect {stdlib} --split test --episode 1 --n-shot 2 --n-query 1", capsys)
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()[-3:]] == ["support", "support", "query"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--split tset", "has no split 'tset'; it has train."),
        ("--episode -1", "--episode is -1; it must be at least 0."),
        ("--episode 0 --n-shot 0", "--n-shot is 0; it must be at least 1."),
        ("--episode 0 --n-way 4", "have 2 samples (--n-shot 1 and --n-query 1), but an episode has 4; lower"),
        ("--out sheet.jpg", "--out sheet.jpg: the sheet is a PNG; give a name that ends in .png."),
        ("--n-way 2 --out none/sheet.png", "--out none/sheet.png cannot be written: No such file"),
    ],
)
def test_mistakes_of_inspect(
    birds: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call("data pack images birds out --processes 1", capsys)
    code, _, errors = call(f"data inspect out {options}", capsys)
    assert code == 3
    assert message in errors


def test_inspect_asks_for_no_more_than_there_is(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (3, 4):
        (birds / "jay" / f"{n}.png").unlink()
    call("data pack images birds out --processes 1", capsys)
    code, out, _ = call("data inspect out --episode 0", capsys)
    assert code == 0
    assert out.count("1 support, 2 query images") == 3  # jay has three


ROWS = npy_bytes(np.zeros((1, 2), np.float32))
READY = {
    "support.inputs.npy": ROWS,
    "support.targets.npy": npy_bytes(np.array([0])),
    "query.inputs.npy": ROWS,
    "query.targets.npy": npy_bytes(np.array([1])),
}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"json": b"[]"}, "its json is a list, and an object is expected"),
        ({"json": b"{"}, "Expecting property name"),
        ({"json": b'{"classes": ["a"]}'}, "a target is 1, and its json has no such entry of classes"),
        ({"json": b'{"classes": 3}'}, "a target is 0, and its json has no such entry of classes"),
        ({"query.inputs.npy": None}, "and no query.inputs.npy"),
        ({"query.inputs.npy": npy_bytes(np.array(3.0))}, "query.inputs.npy is a single number"),
        ({"query.inputs.npy": npy_bytes(np.zeros(1))}, "query.inputs.npy has the shape [1], which is of no"),
        ({"query.targets.npy": npy_bytes(np.zeros(3))}, "its query has 1 inputs and 3 targets"),
        (
            {
                "query.inputs.npy": None,
                "query.0.png": b"zork",
                "support.inputs.npy": None,
                "support.0.png": image_bytes(1),
            },
            "it is no png image",
        ),
    ],
)
def test_inspect_names_the_ready_episode_that_is_none(
    changed: dict[str, bytes | None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    members = {name: payload for name, payload in (READY | changed).items() if payload is not None}
    Path("out/train-0.tar").write_bytes(tar_of(sample("e1", members)) + END)
    assert call("data index out --layout episodes", capsys)[0] == 0
    if changed.get("json") in (b"[]", b"{"):
        code, _, errors = call("data verify out --decode", capsys)
        assert code == 3
        assert "train-0.tar, sample 'e1': cannot be decoded (json): " in errors
    code, _, errors = call("data inspect out --episode 0", capsys)
    assert code == 3
    assert re.search(rf"train-0\.tar: sample 'e1' cannot be shown: .*{re.escape(reason)}", errors)
    assert "metaloom data verify --decode names what is damaged" in errors


def test_inspect_names_the_image_that_cannot_be_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    entries = [e for n in range(2) for e in sample(f"k{n}", {"cls": b"0", "png": image_bytes(n)[: 70 * n]})]
    Path("out/train-0.tar").write_bytes(tar_of(entries) + END)
    assert call("data index out --class-from cls", capsys)[0] == 0
    code, _, errors = call("data inspect out --episode 0", capsys)
    assert code == 3
    assert re.search(r"train-0\.tar: sample 'k0' cannot be shown: it is no png image", errors)


def test_a_sheet_of_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(
        f"data pack huggingface {DATA}/hf-texts {tmp_path}/out --input text --target label --processes 1",
        capsys,
    )
    code, _, errors = call(
        f"data inspect {tmp_path}/out --n-way 1 --n-query 1 --out {tmp_path}/s.png", capsys
    )
    assert code == 3
    assert "there are no images to draw; leave --out out to see it as text" in errors


def test_verify_decodes_what_was_broken_before_it_was_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    png, jpg = image_bytes(9, size=(40, 40)), image_bytes((9, 9, 9), size=(40, 40), form="JPEG")
    members: dict[str, dict[str, bytes]] = {
        "whole": {"png": png, "json": b"{}", "tokens.npy": npy_bytes(np.arange(3)), "zork": b"?"},
        "cut": {"png": png[:-30]},
        "other": {"support.0.jpg": png},
        "text": {"jpg": jpg, "json": b"{"},
        "nan": {"target.npy": npy_bytes(np.array([np.nan], np.float32))},
        "row": {"0.tokens.npy": npy_bytes(np.zeros((2, 2), np.int32))},
        "huge": {"png": image_bytes(0, size=(8000, 7000))},
        "pickle": {"npy": npy_bytes(np.zeros(2, np.float32))[:-1]},
    }
    entries = [e for key, own in members.items() for e in sample(key, {"cls": b"7", **own})]
    Path("out").mkdir()
    Path("out/train-0.tar").write_bytes(tar_of(entries) + END)
    assert call("data index out --class-from cls", capsys)[0] == 0
    code, out, _ = call("data verify out", capsys)
    assert code == 0
    assert out.endswith(" bytes\n")
    code, _, errors = call("data verify out --decode", capsys)
    assert code == 3
    assert "is broken in 7 places" in errors
    for key, reason in {
        "cut": r"\(png\): .*truncated",
        "other": r"\(support\.0\.jpg\): it is no jpg image",
        "text": r"\(json\): Expecting property name",
        "nan": r"\(target\.npy\): it holds numbers that are not finite",
        "row": r"\(0\.tokens\.npy\): tokens are integers in one row",
        "huge": r"\(png\): the image has 8000 x 7000 pixels, more than 50000000 in all",
        "pickle": r"\(npy\): its header says \[2\] of float32, 8 bytes, and 7 follow",
    }.items():
        assert re.search(rf"  train-0\.tar, sample '{key}': cannot be decoded {reason}", errors), key


def test_verify_decodes_the_classes_that_the_index_records(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("data pack images birds out --processes 1", capsys)
    code, out, _ = call("data verify out --decode", capsys)
    assert code == 0
    assert out.endswith(" bytes, all decoded\n")
    index = Index.load("out")
    columns = Path("out/train.columns")
    table = index.split("train")
    content = columns.read_bytes()
    old = table.attributes["class"].tobytes()
    assert content.count(old) == 1
    other = table.attributes["class"][::-1].tobytes()
    columns.write_bytes(content.replace(old, other))
    text = Path("out/index.json").read_text()
    text = text.replace(hashlib.sha256(content).hexdigest(), hashlib.sha256(columns.read_bytes()).hexdigest())
    raw = json.loads(text)
    files = [(s["name"], s["sha256"]) for s in raw["shards"]] + [
        (s["columns"]["name"], s["columns"]["sha256"]) for s in raw["splits"].values()
    ]
    lines = "".join(f"{name} {digest}\n" for name, digest in files)
    raw["digest"] = hashlib.sha256(lines.encode()).hexdigest()
    Path("out/index.json").write_text(json.dumps(raw))
    assert call("data verify out", capsys)[0] == 0
    code, _, errors = call("data verify out --decode", capsys)
    assert code == 3
    assert "sample 'auk/0': cannot be decoded: its cls says class 0, the index 2" in errors


def test_verify_names_every_broken_shard_and_sample(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "dev"):
        (birds / name / "x").mkdir(parents=True)
        for n in range(3):
            (birds / name / "x" / f"{n}.png").write_bytes(image_bytes(20 * n + len(name)))
    for name in ("wren", "jay", "auk"):
        (birds / name).rename(birds / "train" / name)
    call("data pack images birds out --processes 1", capsys)
    code, out, _ = call("data verify out", capsys)
    assert code == 0
    assert "is whole: 3 shards" in out
    train = Path("out/train-00000.tar")
    content = bytearray(train.read_bytes())
    content[content.index((birds / "train/jay/3.png").read_bytes()) + 20] ^= 1
    train.write_bytes(content)
    test = Path("out/test-00000.tar")
    test.write_bytes(test.read_bytes()[:3000])
    Path("out/validation-00000.tar").unlink()
    code, _, errors = call("data verify out", capsys)
    assert code == 3
    assert "out is broken in " in errors
    assert "  train-00000.tar, sample 'jay/3': has other bytes\n" in errors
    assert errors.count("train-00000.tar") == 1
    assert "  test-00000.tar: is cut short: 3000 bytes, expected " in errors
    assert "  test-00000.tar, sample 'x/2': is cut off" in errors
    assert "'x/0'" not in errors
    assert "  validation-00000.tar: is missing" in errors
