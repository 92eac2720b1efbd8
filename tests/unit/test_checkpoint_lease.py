"""One run writes checkpoints to a place at a time; what a killed one leaves keeps nobody out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metaloom.checkpoints.folder import Folder
from metaloom.checkpoints.lease import Lease
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.errors import CheckpointError, LaunchError
from metaloom.run_folder import RunFolder
from tests.object_store import ObjectStore

PERIOD_S = 0.05


def lease_on(folder: Path | str, owner: str, *, term: int = 0) -> Lease:
    return Lease(Folder(folder), owner=owner, term=term, about=f"the run of {owner}", period_s=PERIOD_S)


def pretend_elsewhere(folder: Path) -> None:
    """The lease becomes one of a process on another machine."""
    path = folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel": "another", "host": "elsewhere"}))


def test_a_second_run_is_refused_by_name_while_the_first_lives(tmp_path: Path) -> None:
    first = lease_on(tmp_path, "first")
    first.acquire()
    with pytest.raises(CheckpointError, match=r"another run works here \(the run of first, process \d+ on "):
        lease_on(tmp_path, "second").acquire()
    first.require()
    first.release()
    second = lease_on(tmp_path, "second")
    second.acquire()
    second.release()
    assert not (tmp_path / "lease.json").exists()


def test_of_two_runs_that_come_at_once_exactly_one_holds_the_lease(tmp_path: Path) -> None:
    leases = {name: lease_on(tmp_path, name) for name in ("first", "second")}
    together = threading.Barrier(2)
    refused: list[CheckpointError] = []

    def acquire(lease: Lease) -> None:
        together.wait()
        try:
            lease.acquire()
        except CheckpointError as error:
            refused.append(error)

    threads = [threading.Thread(target=acquire, args=(lease,)) for lease in leases.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = refused
    (holder,) = (name for name in leases if f"another run works here (the run of {name}, " in str(error))
    leases[holder].require()
    for lease in leases.values():
        lease.release()


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from metaloom.checkpoints.folder import Folder\n"
        "from metaloom.checkpoints.lease import Lease\n"
        f"Lease(Folder({str(tmp_path)!r}), owner='killed', about='a run').acquire()\n"
        "print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.communicate()
    begin = time.monotonic()
    lease = Lease(Folder(tmp_path), owner="next", about="the next run")  # with the period that runs have
    lease.acquire()
    assert time.monotonic() - begin < 5.0  # four periods would be twenty seconds
    lease.release()


def test_a_lease_on_another_machine_is_taken_when_nobody_renews_it(tmp_path: Path) -> None:
    lease_on(tmp_path, "gone")._write()
    pretend_elsewhere(tmp_path)
    lease = lease_on(tmp_path, "next")
    lease.acquire()
    lease.require()
    lease.release()


def test_a_lease_on_another_machine_that_is_renewed_is_respected(tmp_path: Path) -> None:
    gone = lease_on(tmp_path, "alive")
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(PERIOD_S / 2):
            gone._write()

    gone._write()
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="the run of alive"):
            lease_on(tmp_path, "next").acquire()
    finally:
        is_over.set()
        thread.join()


def test_a_job_keeps_its_lease_when_it_starts_its_ranks_again(tmp_path: Path) -> None:
    before = Lease(Folder(tmp_path), owner="job", about="the run of job", period_s=600.0)
    before.acquire()
    after = lease_on(tmp_path, "job", term=1)
    after.acquire()
    after.require()
    with pytest.raises(CheckpointError, match="another run works here"):
        before.require()  # a rank that was cut off, and still runs
    with pytest.raises(CheckpointError, match="another run works here"):
        lease_on(tmp_path, "job", term=0).acquire()
    before.release()
    after.require()
    after.release()


def test_a_run_that_has_lost_its_lease_commits_nothing(tmp_path: Path) -> None:
    lease = Lease(Folder(tmp_path), owner="slow", about="the run of slow", period_s=600.0)
    lease.acquire()
    store = CheckpointStore(tmp_path / "meta", lease=lease)
    store.save(Checkpoint(1, {}, {}))
    other = lease_on(tmp_path, "other")
    other._write()  # after a silence of the first
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .*another run works here \(the run of other"
    ):
        store.save(Checkpoint(2, {}, {}))
    assert store.steps() == [1]
    lease.release()


def test_a_lease_on_an_object_store(s3: ObjectStore) -> None:
    url = f"{s3.new_bucket()}/run"
    first = lease_on(url, "first")
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"{url}: another run works here"):
        lease_on(url, "second").acquire()
    first.release()
    second = lease_on(url, "second")
    second.acquire()
    second.release()


def test_a_run_folder_is_locked_for_one_command_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked("train"):
        with (
            pytest.raises(LaunchError, match=r"another `metaloom train` works on this run \(process \d+ on "),
            folder.locked("train"),
        ):
            pass
        with folder.locked("evaluate"):  # which reads what training writes
            pass
    with folder.locked("train"):
        pass
