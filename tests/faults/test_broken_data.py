"""Trainings on damaged and on distant data: what is broken is passed over, what fails passes or stops."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaloom.datasets import Index
from tests import commands
from tests.commands import RECIPES, Finished, curve, read_records, run, wait_for_step
from tests.flaky_server import FlakyServer, running_flaky_server
from tests.object_store import ObjectStore
from tests.tiny_sets import class_set, damage

STEPS = 10
DAMAGED = (3, 40, 77, 123, 160)
WORDS = (
    f"outer.num_steps={STEPS}",
    "outer.schedule.warmup_steps=1",
    "checkpoint.every_steps=4",
    "validation.every_steps=5",
    "validation.num_episodes=4",
    "model.width=4",
    "tracking=none",
    "launcher.max_restarts=0",
    "loading.read_ahead=1",
)
FLAKY = ("loading.cache_gib=0", "loading.num_attempts=5", "loading.timeout_s=5")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes of twenty small images in three splits; five images of the training are damaged."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    splits = ("train", "validation", "test")
    index = class_set(folder, [20] * 12, splits=splits, shard_limit_bytes=100_000)
    damage(folder, index, DAMAGED)
    return folder


def train(url: str | Path, folder: Path, *more: str, timeout_s: float = 120) -> Finished:
    words = (f"data.url={url}", *WORDS, *more)
    recipe = RECIPES / "smoke.yaml"
    return run("train", recipe, *words, "--run", folder, cwd=folder.parent, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def whole(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """An uninterrupted training on the damaged data, in the ranks' own threads."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(damaged, folder), folder


def broken_lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "broken.jsonl").read_text().splitlines()]


def test_a_training_passes_over_damaged_samples_and_tells_of_each_once(
    whole: tuple[Finished, Path], damaged: Path
) -> None:
    finished, folder = whole
    assert finished.code == 0, finished
    lines = broken_lines(folder)
    met = [line["key"] for line in lines]
    keys = [f"train/{number:05}" for number in DAMAGED]
    assert len(met) >= 3
    assert len(set(met)) == len(met)
    assert set(met) <= set(keys)
    for line in lines:
        assert (
            finished.output.count(f"passed over: {line['url']}/{line['shard']}: sample '{line['key']}'") == 1
        )
        assert line["url"] == str(damaged)
    counts = {int(r["step"]): r.get("broken_samples", 0) for r in read_records(folder / "metrics.jsonl")}
    expected = {step: sum(int(str(line["step"])) <= step for line in lines) for step in counts}
    assert counts == expected
    assert counts[STEPS] == len(met)


def test_killed_and_resumed_with_workers_equals_uninterrupted_damage_included(
    whole: tuple[Finished, Path], damaged: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ("train", RECIPES / "smoke.yaml", f"data.url={damaged}", *WORDS, "loading.num_workers=1")
    with commands.begun(*words, "--run", folder, cwd=tmp_path) as process:
        wait_for_step(folder / "metrics.jsonl", 6, process)
    assert len(curve(folder)) < STEPS
    output = commands.run_well("train", "--resume", folder, cwd=tmp_path)
    assert "resumed after outer step" in output
    assert curve(folder) == curve(whole[1])
    assert broken_lines(folder) == broken_lines(whole[1])


def test_more_damage_than_allowed_ends_all_ranks_with_what_is_broken(damaged: Path, tmp_path: Path) -> None:
    finished = train(damaged, tmp_path / "run", "loading.max_broken=1", timeout_s=60)
    assert finished.code == 3, finished
    assert "samples are damaged, and loading.max_broken is 1. The last ones:" in finished.errors
    assert f"All are in {tmp_path / 'run'}/broken.jsonl" in finished.errors
    assert finished.errors.count("error:") == 1
    assert "Traceback" not in finished.errors
    assert "restart" not in finished.output + finished.errors
    assert len(broken_lines(tmp_path / "run")) >= 2


def test_a_shard_that_is_missing_is_named_before_anything_starts(damaged: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(damaged, tmp_path / "copy"))
    (copy / "train-00001.tar").unlink()
    finished = train(copy, tmp_path / "run", timeout_s=60)
    assert finished.code == 3
    assert "train-00001.tar: missing" in finished.errors
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- object stores


@pytest.mark.slow
def test_a_data_set_in_an_object_store_trains_like_the_local_one(
    whole: tuple[Finished, Path], damaged: Path, tmp_path: Path, s3: ObjectStore
) -> None:
    bucket = s3.new_bucket()
    s3.upload(damaged, f"{bucket}/tiny")
    cache = tmp_path / "cache"
    finished = train(f"{bucket}/tiny", tmp_path / "run", f"loading.cache_folder={cache}")
    assert finished.code == 0, finished
    assert curve(tmp_path / "run") == curve(whole[1])
    remote, local = broken_lines(tmp_path / "run"), broken_lines(whole[1])
    assert [line | {"url": ""} for line in remote] == [line | {"url": ""} for line in local]
    assert list(cache.rglob("*"))
    assert "planted" not in finished.output + finished.errors


@pytest.fixture
def server(damaged: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that the URL s3://set leads to."""
    with running_flaky_server() as running:
        for path in damaged.iterdir():
            running.files[f"/set/{path.name}"] = path.read_bytes()
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def goes_down(server: FlakyServer, metrics: Path, *, comes_up: bool) -> threading.Thread:
    """A thread that takes the server down after the first step, and up again after 12 refusals."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and read_records(metrics)):
            time.sleep(0.002)
        server.faults.extend(["503"] * (12 if comes_up else 10_000))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("comes_up", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_store_that_goes_down_in_mid_run_is_waited_for_or_ends_the_run(
    comes_up: bool, whole: tuple[Finished, Path], server: FlakyServer, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    thread = goes_down(server, folder / "metrics.jsonl", comes_up=comes_up)
    finished = train("s3://set", folder, *FLAKY)
    thread.join()
    if comes_up:
        assert finished.code == 0, finished
        assert not server.faults  # all of them were met
        assert curve(folder) == curve(whole[1])
        return
    assert finished.code == 3, finished
    assert "could not be read in 5 attempts" in finished.errors
    assert "The storage, or the way there, is at fault, not the data" in finished.errors
    assert finished.errors.count("error:") == 1
    assert "Traceback" not in finished.errors
    assert 0 < len(read_records(folder / "metrics.jsonl")) < STEPS
    # None of the faults has become a skip.
    known = {line["key"] for line in broken_lines(folder)} if (folder / "broken.jsonl").exists() else set()
    assert known <= {f"train/{number:05}" for number in DAMAGED}


def test_what_trains_is_what_was_damaged(damaged: Path) -> None:
    """The fixture is not vacuous: those samples, and no others, differ from their checksums."""
    index = Index.load(damaged)
    table = index.split("train")
    wrong = []
    for number in range(table.num_samples):
        content = (damaged / index.shards[int(table.shard[number])].name).read_bytes()
        payload = content[int(table.offset[number]) :][: int(table.length[number])]
        if zlib.crc32(payload) != int(table.crc32[number]):
            wrong.append(number)
    assert tuple(wrong) == DAMAGED
