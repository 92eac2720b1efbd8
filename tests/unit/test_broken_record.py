"""The record of damaged samples: each once, the same on every rank, exact after a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from metaloom.broken_record import NUM_TOLD, BrokenRecord
from metaloom.datasets import BrokenSample
from metaloom.disk import Disk
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import StreamError
from metaloom.tracking.console import make_console
from tests.multirank.processes import run_ranks


def sample(number: int, reason: str = "is damaged") -> BrokenSample:
    return BrokenSample("s3://bucket/set", "train-00000.tar", f"a/{number}", reason)


def record(
    path: Path, sharding: Sharding, *, max_broken: int = 3, first_step: int | None = None
) -> tuple[BrokenRecord, io.StringIO]:
    """The record, and what the console says."""
    said = io.StringIO()
    console = make_console(rank=sharding.rank, error_stream=said)
    return (
        BrokenRecord(
            path,
            max_broken=max_broken,
            sharding=sharding,
            console=console,
            disk=Disk(),
            first_step=first_step,
        ),
        said,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_sample_is_told_and_written_once_with_its_step(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    broken, said = record(path, Replicated())
    broken.take([], step=1)
    assert not path.exists()
    broken.take([sample(1), sample(0), sample(1, "is lost")], step=2)
    broken.take([sample(0), sample(2)], step=3)
    assert broken.count == 3
    assert [(line["step"], line["key"], line["reason"]) for line in lines(path)] == [
        (2, "a/1", "is damaged"),
        (2, "a/0", "is damaged"),
        (3, "a/2", "is damaged"),
    ]
    assert said.getvalue().count("passed over: s3://bucket/set/train-00000.tar: sample 'a/1' is damaged") == 1
    assert said.getvalue().count("passed over") == 3


def test_a_resumed_run_meets_again_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    broken, _ = record(path, Replicated(), max_broken=4)
    for step, number in ((-5, 0), (4, 1), (5, 2)):
        broken.take([sample(number)], step=step)
    broken.take([sample(9)], step=None)
    whole = path.read_text()
    evaluated, _ = record(path, Replicated(), max_broken=4)
    assert evaluated.count == 4
    resumed, said = record(path, Replicated(), max_broken=4, first_step=5)
    assert resumed.count == 2
    assert [line["key"] for line in lines(path)] == ["a/0", "a/1"]  # those that were mended are not there
    resumed.take([sample(1), sample(2)], step=5)
    resumed.take([sample(9)], step=None)
    assert path.read_text() == whole
    assert "'a/1'" not in said.getvalue()


def test_more_than_the_limit_stop_the_run_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    broken, said = record(path, Replicated(), max_broken=15)
    broken.take([sample(number) for number in range(15)], step=1)
    assert said.getvalue().count("warning: passed over: ") == NUM_TOLD
    assert said.getvalue().count(f"more samples are passed over: see {path}") == 1
    match = (
        r"16 samples are damaged, and loading\.max_broken is 15\. The last ones:\n"
        r"  s3://bucket/set/train-00000\.tar: sample 'a/15' is damaged\n"
        rf"All are in {path}\. Mend the data \(metaloom data verify --decode names .*, or "
        r"raise loading\.max_broken, "
    )
    with pytest.raises(StreamError, match=match):
        broken.take([sample(15)], step=2)
    assert len(lines(path)) == 16


def met_on_each_rank(folder: Path, max_broken: int) -> tuple[int, str, bool]:
    """Ranks meet different samples, and some the same; returns the count, the error, if any, and whether this
    rank has said as much of them as it should: rank 0 tells, the others do not."""
    sharding = Replicated()
    broken, said = record(folder / "broken.jsonl", sharding, max_broken=max_broken)
    own = {0: [sample(5), sample(1)], 1: [], 2: [sample(1), sample(0)]}[sharding.rank]
    error_text = ""
    try:
        broken.take(own, step=1)
        broken.take(own, step=2)
    except StreamError as error:
        error_text = str(error)
    return broken.count, error_text, said.getvalue().count("passed over") == 3 * (sharding.rank == 0)


@pytest.mark.parametrize("max_broken", [3, 2])
def test_all_ranks_know_the_same_and_stop_together(tmp_path: Path, max_broken: int) -> None:
    found = run_ranks(3, met_on_each_rank, tmp_path, max_broken)
    assert len(set(found)) == 1
    count, error, is_told_once = found[0]
    assert count == 3
    assert is_told_once
    assert bool(error) == (max_broken == 2)
    assert [line["key"] for line in lines(tmp_path / "broken.jsonl")] == ["a/5", "a/1", "a/0"]


def test_what_a_rank_ends_for_is_written_down_and_forgotten_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    broken, _ = record(path, Replicated())
    broken.end_with([sample(1), sample(1)])
    assert [(line["key"], line["step"]) for line in lines(path)] == [("a/1", None)]
    resumed, _ = record(path, Replicated(), first_step=3)
    assert resumed.count == 0
