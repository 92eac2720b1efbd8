"""Checkpoints at a URL: on an object store that answers, that fails, and that is gone for a while."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import pytest
import torch

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.checkpoints.folder import Folder, MissingFileError
from metaloom.checkpoints.retention import Retention
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.datasets.connection import Persistence
from metaloom.errors import CheckpointError, LaunchError
from tests.commands import RECIPES, begun, curve, digests, run, run_well, wait_for_step
from tests.faults.soak import disturbed, plan_of, state_of, train
from tests.hosts import held
from tests.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore, running_object_store

SMOKE = RECIPES / "smoke.yaml"
QUICK = Persistence(num_attempts=3, backoff_s=0.02, max_backoff_s=0.05, timeout_s=5.0)
RUN = (
    "outer.num_steps=12",
    "outer.ema=0.9",
    "checkpoint.every_steps=4",
    "validation.every_steps=12",
    "tracking=none",
)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.arange(1000.0) + step, "b": torch.zeros(0)}, {"step": step})


def test_an_object_store_holds_checkpoints_as_a_folder_does(s3: ObjectStore) -> None:
    url = f"{s3.new_bucket()}/runs/one"
    store = CheckpointStore(url, retention=Retention(last=2))
    assert store.load_newest(pytest.fail) is None
    for step in (1, 2, 3):
        store.save(checkpoint(step))
    assert store.steps() == [2, 3]
    assert {listing.step for listing in Catalogue(url).listings()} == {2, 3}  # nothing is left of the first
    newest = CheckpointStore(url).load_newest(pytest.fail)
    assert newest is not None
    assert torch.equal(newest.tensors["a"], checkpoint(3).tensors["a"])
    assert store.catalogue.verify(3).step == 3


def test_damage_on_an_object_store_is_found_and_passed_over(s3: ObjectStore) -> None:
    url = f"{s3.new_bucket()}/run"
    store = CheckpointStore(url)
    for step in (1, 2):
        store.save(checkpoint(step))
    (name,) = store.catalogue.manifest(2).files
    content = bytearray(store.catalogue.folder.read(f"step-00000002/{name}"))
    content[-1] ^= 1
    s3.put(f"{url}/step-00000002/{name}", bytes(content))
    notes: list[str] = []
    newest = store.load_newest(notes.append)
    assert newest is not None
    assert newest.step == 1
    assert "SHA-256 differs" in notes[0]


def test_a_storage_that_cannot_be_reached_is_never_taken_for_one_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_object_store(tmp_path / "s3.log") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        url = f"{server.new_bucket()}/run"
        store = CheckpointStore(Folder(url, QUICK))
        store.save(checkpoint(1))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    store = CheckpointStore(Folder(url, QUICK))
    with pytest.raises(
        CheckpointError, match=r"could not be listed in 3 attempts .* See whether the storage is up"
    ):
        store.load_newest(pytest.fail)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*in 3 attempts"):
        store.save(checkpoint(2))


@pytest.mark.parametrize(
    "message",
    [
        f"403, message='Forbidden', url='http://user:{SECRET_KEY}@127.0.0.1/bucket/run/lease.json'",
        f"Forbidden: https://storage/run?X-Amz-Credential={ACCESS_KEY}&X-Amz-Signature={SECRET_KEY}",
    ],
)
def test_wrong_credentials_are_told_at_once_and_not_shown(
    message: str, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.new_bucket()}/run"

    class Forbidding:
        """A driver that refuses."""

        def pipe_file(self, path: str, content: bytes) -> None:
            raise PermissionError(message)

    folder = Folder(url, QUICK)
    monkeypatch.setattr(folder, "_filesystem", Forbidding())
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .*Credentials for s3:// come from"
    ) as caught:
        folder.write("lease.json", b"")
    shown = "".join(traceback.format_exception(caught.value))  # of what it follows from, too
    assert "PermissionError: " in shown
    assert SECRET_KEY not in shown
    assert ACCESS_KEY not in shown


def test_a_passing_fault_is_tried_again_and_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path, QUICK)
    faults = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    calls = []

    def flaky(path: Path, content: bytes) -> None:
        calls.append(path.name)
        if faults:
            raise faults.pop()
        path.write_bytes(content)

    monkeypatch.setattr("metaloom.checkpoints.folder.replace_file", flaky)
    folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert len(calls) == 3
    faults.append(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match="b cannot be written: No space left on device"):
        folder.write("b", b"")
    assert len(calls) == 4
    with pytest.raises(MissingFileError):
        folder.read("b")


def test_a_run_with_checkpoints_on_an_object_store_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, glyphs: Path, s3: ObjectStore
) -> None:
    bucket = s3.new_bucket()
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN)
    run_well(*words, f"checkpoint.url={bucket}/whole", "--run", tmp_path / "whole", cwd=tmp_path)
    folder, url = tmp_path / "killed", f"{bucket}/killed"
    with held(tmp_path) as hold:
        hold.at(6)
        with begun(*words, f"checkpoint.url={url}", "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", 6, process)
            deadline = time.monotonic() + 60
            while Catalogue(f"{url}/meta").steps() != [4]:  # written in the background
                assert time.monotonic() < deadline
                time.sleep(0.1)
    assert not (folder / "checkpoints").exists()
    output = run_well("train", "--resume", folder, cwd=tmp_path)
    assert "resumed after outer step 4" in output
    assert curve(folder) == curve(tmp_path / "whole")
    assert digests(f"{bucket}/killed/meta") == digests(f"{bucket}/whole/meta")
    listed = run_well("checkpoints", "list", folder, cwd=tmp_path)
    assert f"{url}\n" in listed
    assert "as written" in run_well("checkpoints", "verify", folder, cwd=tmp_path)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_to_an_object_store_ends_as_one_that_is_not(
    tmp_path: Path, glyphs: Path, s3: ObjectStore
) -> None:
    bucket = s3.new_bucket()
    whole = f"checkpoint.url={bucket}/whole"
    train(tmp_path, glyphs, tmp_path / "whole", whole)
    expected = state_of(tmp_path / "whole", f"{bucket}/whole")
    plans = {seed: plan_of(seed) for seed in (3, 5)}
    assert [plan.place for plan in plans.values()] == ["upload", "before the manifest"]
    for seed, plan in plans.items():
        run_path, url = tmp_path / f"seed-{seed}", f"{bucket}/seed-{seed}"
        assert disturbed(tmp_path, glyphs, run_path, plan, f"checkpoint.url={url}").has_struck
        assert state_of(run_path, url) == expected


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path: Path, glyphs: Path) -> None:
    folder, url = tmp_path / "run", tmp_path / "elsewhere"
    run_well(
        "train", SMOKE, f"data.url={glyphs}", *RUN, f"checkpoint.url={url}", "--run", folder, cwd=tmp_path
    )
    url.rename(tmp_path / "lost")
    finished = run("train", "--resume", folder, cwd=tmp_path)
    assert finished.code == CheckpointError.exit_code
    assert f"{url}/meta has held a checkpoint of step 12 of this run, and there is none" in finished.errors


def test_a_run_whose_folder_is_lost_goes_on_from_its_url_in_another(tmp_path: Path, glyphs: Path) -> None:
    url = tmp_path / "store"
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, "checkpoint.keep_last=3")
    run_well(*words, f"checkpoint.url=file://{url}", "--run", tmp_path / "lost", cwd=tmp_path)
    Catalogue(url / "meta").remove(12)
    again = run_well("train", "--resume", f"file://{url}", "--run", tmp_path / "found", cwd=tmp_path)
    assert "resumed after outer step 8 of 12" in again
    assert curve(tmp_path / "found") == curve(tmp_path / "lost")[8:]


@pytest.mark.slow
def test_a_new_run_does_not_go_on_from_the_checkpoints_of_another(tmp_path: Path, glyphs: Path) -> None:
    url = tmp_path / "store"
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, f"checkpoint.url={url}")
    run_well(*words, "--run", tmp_path / "first", cwd=tmp_path)
    finished = run(*words, "--run", tmp_path / "second", cwd=tmp_path)
    assert finished.code == CheckpointError.exit_code
    assert (
        f"{url}/meta holds checkpoints of another run than the one in {tmp_path / 'second'}"
        in finished.errors
    )


def test_two_runs_cannot_write_to_one_url_at_once(tmp_path: Path, glyphs: Path) -> None:
    url = tmp_path / "store"
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, f"checkpoint.url={url}")
    with held(tmp_path) as hold:
        hold.at(2)
        with begun(*words, "--run", tmp_path / "first", cwd=tmp_path) as process:
            wait_for_step(tmp_path / "first" / "metrics.jsonl", 2, process)
            second = run(*words, "--run", tmp_path / "second", cwd=tmp_path)
            in_the_same_folder = run("train", "--resume", tmp_path / "first", cwd=tmp_path)
    assert second.code == CheckpointError.exit_code
    assert f"{url}: another run works here (the run in {tmp_path / 'first'}, process " in second.errors
    assert in_the_same_folder.code == LaunchError.exit_code
    assert "another `metaloom train` works on this run (process " in in_the_same_folder.errors
    # Killed, it keeps nobody out.
    run_well("train", "--resume", tmp_path / "first", cwd=tmp_path)
