"""A new task, read from files as the run's own data are, or refused before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaloom.errors import StreamError
from metaloom.new_task.holding_out import held_out
from metaloom.new_task.request import Request, TaskFiles
from metaloom.new_task.task import read_task
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES
from tests.packed import image_bytes, write_tree

GPT = "model={kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 16}"
TEXT = "{kind: text, length: 12}"
REVIEWS = (
    GPT,
    f"data={{kind: classes, url: x, inputs: {TEXT}, n_way: 2, n_shot: 1, n_query: 1}}",
    "adaptation.fast=lora",
)
USERS = (
    GPT,
    f"data={{kind: groups, url: x, inputs: {TEXT}, targets: {{kind: class, num_classes: 3}}, "
    "num_support: 2, num_query: 2}",
    "adaptation.fast=lora",
)
PLANTS = (
    "model={kind: mlp, width: 4, num_layers: 1}",
    "data={kind: groups, url: x, inputs: {kind: array, shape: [2]}, targets: number, num_support: 2, "
    "num_query: 2}",
)
BOOKS = (
    GPT,
    "data={kind: documents, url: x, num_support: 2, num_query: 2, sequence_length: 8}",
    "adaptation.fast=lora",
)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "smoke.yaml", overrides)


def written(folder: Path, name: str, *records: Any) -> Path:
    """A file of JSON records."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def files(path: Path, query: Path | None = None, **others: Any) -> TaskFiles:
    return TaskFiles(str(path), None if query is None else str(query), **others)


def test_images_are_read_as_packed_ones_are_and_a_quarter_of_each_class_is_held_out(tmp_path: Path) -> None:
    colors = {"red": 40, "green": 120, "blue": 200}
    tree = {
        f"{name}/{number}.png": image_bytes(value + number, size=(60, 40))
        for name, value in colors.items()
        for number in range(4)
    }
    task = read_task(recipe("data.n_way=3"), files(write_tree(tmp_path / "colors", tree)))
    assert task.classes == ("blue", "green", "red")
    assert task.episode.support["inputs"].shape == (9, 28, 28, 1)
    assert task.episode.support["targets"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert task.episode.query["targets"].tolist() == [0, 1, 2]
    shown = {int(image[0, 0, 0]) // 40 for image in task.episode.query["inputs"]}
    assert shown == {1, 3, 5}
    assert task.notes == ("held out to be judged on: 3 of 12 examples",)


def test_copies_of_an_example_are_held_out_together() -> None:
    contents = [b"a", b"b", b"a", b"c", b"a", b"d"]
    for seed in range(9):
        support, query = held_out([""] * 6, contents, seed=seed)
        assert sorted(support + query) == list(range(6))
        assert not {contents[place] for place in support} & {contents[place] for place in query}
    assert {held_out([""] * 6, contents, seed=seed)[1][0] for seed in range(9)} > {0}


def test_a_query_part_is_taken_where_there_is_one(tmp_path: Path) -> None:
    colors = {"red": 40, "green": 120, "blue": 200}
    tree = {
        f"{part}/{name}/{number}.png": image_bytes(value + 10 * row + number)
        for row, part in enumerate(("support", "query"))
        for name, value in colors.items()
        for number in range(row + 1)
    }
    root = write_tree(tmp_path / "task", tree)
    for given in (files(root), files(root / "support", root / "query")):
        episode = read_task(recipe("data.n_way=3"), given).episode
        assert (len(episode.support["targets"]), len(episode.query["targets"])) == (3, 6)
    with pytest.raises(StreamError, match="has a query part already, query: leave --query out"):
        read_task(recipe(), files(root, root / "query"))


def test_records_of_texts_have_classes_by_name_and_are_cut_as_those_of_training(tmp_path: Path) -> None:
    records = [
        {"text": f"{word} {number} {'x' * 3 * number}", "label": label}
        for word, label in (("good", "yes"), ("bad", "no"))
        for number in range(4)
    ]
    path = written(tmp_path, "reviews.jsonl", *records)
    task = read_task(recipe(*REVIEWS), files(path, inputs=("text",), targets=("label",)))
    assert task.classes == ("no", "yes")
    assert task.episode.support["inputs"].shape == (6, 12)
    assert bytes(task.episode.query["inputs"][1].astype(np.uint8)[:4]) == b"good"
    assert any("texts are longer than the 12 tokens that the run's model is shown" in n for n in task.notes)


def test_classes_that_mean_the_same_in_all_tasks_are_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", *({"input": f"text {n}", "target": n % 3} for n in range(8)))
    task = read_task(recipe(*USERS), files(path))
    assert task.classes == ()
    assert {*task.episode.support["targets"].tolist()} == {0, 1, 2}
    for label in (7, "good"):
        other = written(tmp_path, "b.jsonl", *({"input": f"text {n}", "target": label} for n in range(4)))
        with pytest.raises(StreamError, match=f"numbers from 0 to 2; the new task has {label}"):
            read_task(recipe(*USERS), files(other))
        with pytest.raises(StreamError, match=rf"lacks: {label}; those of the support are the numbers"):
            read_task(recipe(*USERS), files(path, other))


def test_records_of_numbers_are_a_regression(tmp_path: Path) -> None:
    path = written(tmp_path, "plant.jsonl", *({"t": n, "p": 2.0, "yield": n / 2} for n in range(8)))
    episode = read_task(recipe(*PLANTS), files(path, inputs=("t", "p"), targets=("yield",))).episode
    assert (episode.support["inputs"].shape, episode.query["targets"].shape) == ((6, 2), (2, 1))
    np.testing.assert_array_equal(episode.query["inputs"][:, :1] / 2, episode.query["targets"])
    with pytest.raises(StreamError, match="--target names 2 columns, and the run predicts 1 numbers"):
        read_task(recipe(*PLANTS), files(path, inputs=("t",), targets=("yield", "p")))


def test_texts_are_cut_to_stretches_of_which_the_last_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    for name in "ab":
        (tmp_path / "book" / f"{name}.txt").write_text((name * 8 + ".") * 4 + "rest")
    task = read_task(recipe(*BOOKS), files(tmp_path / "book"))
    support, query = task.episode.support, task.episode.query
    assert (support["inputs"].shape, query["inputs"].shape) == ((6, 8), (2, 8))
    assert bytes(query["inputs"].astype(np.uint8).tobytes()) == b"b" * 16
    assert bytes(query["targets"][0].astype(np.uint8).tobytes()) == b"bbbbbbb."
    path = written(tmp_path, "books.jsonl", {"input": "c" * 40}, {"input": "d" * 40})
    assert read_task(recipe(*BOOKS), files(path)).episode.support["inputs"].shape == (6, 8)


def test_one_record_with_support_and_query_is_a_task(tmp_path: Path) -> None:
    examples = [{"input": f"text {n}", "target": "ab"[n % 2]} for n in range(6)]
    record = {"support": examples[:2], "query": examples[2:]}
    task = read_task(recipe(*REVIEWS), files(written(tmp_path, "one.jsonl", record)))
    assert task.classes == ("a", "b")
    assert task.episode.query["targets"].tolist() == [0, 1, 0, 1]
    several = written(tmp_path, "two.jsonl", record, record)
    with pytest.raises(StreamError, match="has 2 tasks, and one is adapted to"):
        read_task(recipe(*REVIEWS), files(several))
    with pytest.raises(StreamError, match="has a query part already: leave --query out"):
        read_task(recipe(*REVIEWS), files(tmp_path / "one.jsonl", several))
    wrong = written(tmp_path, "wrong.jsonl", {"support": examples[:1], "query": examples[2:3]})
    with pytest.raises(StreamError, match=r"the task has 1 classes \(a\), and the run's model tells 2 apart"):
        read_task(recipe(*REVIEWS), files(wrong))


@pytest.mark.parametrize(
    ("overrides", "tree", "message"),
    [
        (REVIEWS, {"t/a.csv": b"a,b\n1,2\n"}, r"no column 'input'; it has a, b. \(--input and --target name"),
        ((), {"t/a/1.png": b"no image"}, r"1 broken example:\n  a/1.png: is no PNG, JPEG or WebP image"),
        ((), {"t/notes.txt": b"hello"}, r"holds no images .* in folders class; .* of the classes\.$"),
        (
            (),
            {"t": b"hello"},
            r"is no task of this run: its examples are a folder with a sub-folder of images",
        ),
        (REVIEWS, {"t": b"hello"}, r"its examples are records in files .csv, .tsv, .jsonl, .ndjson"),
        (BOOKS, {"t": b"\xff\xfe"}, r"is no text in UTF-8"),
        (BOOKS, {"t": b""}, r"t holds no text: name a text"),
        (BOOKS, {"t": b"\xff"}, r"t has 1 broken text:"),
        (BOOKS, {"t": b"short"}, r"the longest text has 5 tokens, and the run's sequences have 8"),
        (BOOKS, {"t": b"long enough"}, r"one sequence of 8 tokens .* give 18 tokens or more"),
        ((*BOOKS, "model.vocabulary=999"), {"t": b"x"}, r"tokens of a vocabulary of 999: give the tokenizer"),
        (
            (),
            {"t/query/a/1.png": b"", "t/test/a/1.png": b"", "t/support/a/1.png": b""},
            r"both query and test",
        ),
        ((), {}, r"there is no .*t\."),
    ],
)
def test_what_is_no_task_of_the_run_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], tree: dict[str, bytes], message: str
) -> None:
    write_tree(tmp_path, tree)
    with pytest.raises(StreamError, match=message):
        read_task(recipe(*overrides), files(tmp_path / "t"))


def test_another_number_of_classes_too_few_examples_and_leaks_are_refused(tmp_path: Path) -> None:
    two = write_tree(
        tmp_path / "two", {f"{c}/{n}.png": image_bytes(ord(c) + n) for c in "ad" for n in (0, 1)}
    )
    with pytest.raises(StreamError, match=r"2 classes \(a, d\), and the run's model tells 3 apart"):
        read_task(recipe("data.n_way=3"), files(two))
    one = write_tree(tmp_path / "one", {f"{c}/1.png": image_bytes(ord(c)) for c in "ad"})
    with pytest.raises(
        StreamError,
        match=r"there is one example of class 'a' \(copies count once\), and none can be held out",
    ):
        read_task(recipe("data.n_way=2"), files(one))
    with pytest.raises(StreamError, match="nothing may be judged on what it was adapted to"):
        read_task(recipe("data.n_way=2"), files(two, one))
    more = write_tree(tmp_path / "more", {"b/1.png": image_bytes(9)})
    with pytest.raises(StreamError, match="the query has classes that the support lacks: b"):
        read_task(recipe("data.n_way=2"), files(two, more))


def test_a_request_reads_back_from_json() -> None:
    task = TaskFiles("a/b.jsonl", inputs=("x", "y"), tokenizer="t.json")
    request = Request(task, 3, True, "run", None, "peft", "out", False, True)
    assert Request.from_json(request.to_json()) == request
    assert task.name == "b"
