"""A disk that is full for a while: what is written waits, none of it is lost, and patience ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

import metaloom.disk
from metaloom.disk import Disk
from metaloom.errors import CheckpointError
from metaloom.files import replace_file
from metaloom.run_folder import RunFolder
from metaloom.tracking import JsonlTracker, MlflowTracker, read_metrics
from metaloom.tracking.console import LineConsole
from metaloom.tracking.cosines import CosineRecord, add_cosines, read_cosines
from metaloom.whereabouts import Failure, Whereabouts

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Limited:
    """A file on a disk with room for so many more bytes: it takes what it has room for, as disks do."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self.room = file, room

    def write(self, content: bytes) -> int:
        if self.room == 0:
            raise FULL
        number = self._file.write(content[: self.room])
        self.room -= number
        return number

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def started(path: Path, said: list[str], *, patience_minutes: float = 60.0) -> tuple[JsonlTracker, Limited]:
    disk = Disk(patience_minutes=patience_minutes, warn=said.append, note=said.append)
    tracker = JsonlTracker(path, disk=disk)
    tracker.start(run_name="a run", params={}, tags={}, resume_id=None)
    assert tracker._lines is not None
    limited = Limited(tracker._lines._file, 0)
    tracker._lines._file = limited  # type: ignore[assignment]
    return tracker, limited


def refuse(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    """`os.fsync` fails while the disk is full, as on file systems that find out late."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if is_full():
            raise FULL
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_lines_wait_while_the_disk_is_full_and_no_reader_sees_half_of_one(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    tracker, limited = started(path, said)
    limited.room = 1000
    tracker.log({"a": 0.0}, 0)
    for step, room in ((1, 0), (2, 10), (3, 70), (4, 3)):
        limited.room = room
        tracker.log({"a": float(step)}, step)
        assert path.read_bytes().endswith(b"\n")
    assert [record.step for record in read_metrics(path)] == [0, 1]
    limited.room = 1000
    tracker.log({"a": 5.0}, 5)
    tracker.finish("finished")
    assert [(record.step, dict(record.metrics)) for record in read_metrics(path)] == [
        (step, {"a": float(step)}) for step in range(6)
    ]
    warning, all_well = said
    assert warning.startswith(f"{path} cannot be written: No space left on device. The job goes on")
    assert "again for up to 60 min (checkpoint.patience_minutes)" in warning
    assert "nothing is lost" in all_well


def test_lines_that_waited_to_the_end_are_written_there_or_counted_as_lost(tmp_path: Path) -> None:
    for name, room in (("written", 1000), ("lost", 60)):
        path, said = tmp_path / name, list[str]()
        tracker, limited = started(path, said)
        for step in range(3):
            tracker.log({"a": 0.0}, step)
        limited.room = room
        tracker.finish("failed")
        if name == "written":
            assert len(read_metrics(path)) == 3
        else:
            assert len(read_metrics(path)) == 1
            assert len(said) == 2
            assert f"Lost is: of {path} 2 lines. Make room on that disk" in said[1]


def test_a_disk_that_is_full_for_too_long_ends_the_job_with_the_cause(tmp_path: Path) -> None:
    tracker, _ = started(tmp_path / "metrics.jsonl", [], patience_minutes=0.0)
    tracker.log({"a": 0.0}, 0)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl cannot be written: No space left .* longer than checkpoint.p"
    ):
        tracker.log({"a": 0.0}, 1)
    tracker.finish("failed")


def test_files_that_are_replaced_wait_with_their_newest_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full, said = True, list[str]()
    refuse(monkeypatch, lambda: is_full)
    disk = Disk(warn=said.append, note=said.append)
    folder = RunFolder(tmp_path)
    folder.record(disk, status="killed", run="one")
    folder.record(disk, checkpoint=3)
    for step in (2, 4):
        add_cosines(folder.cosines, CosineRecord(step, "groups", ("a",), ((1.0,),)), disk)
    assert folder.facts() == {}
    assert list(tmp_path.iterdir()) == []  # half files, too, take room
    is_full = False
    folder.record(disk, status="finished")
    assert folder.facts() == {"status": "finished", "run": "one", "checkpoint": 3}
    assert [record.step for record in read_cosines(folder.cosines)] == [2, 4]
    assert len(said) == 2


def test_the_end_waits_for_room_and_not_where_the_job_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tries = 0

    def is_full() -> bool:
        nonlocal num_tries
        num_tries += 1
        return num_tries < 5

    refuse(monkeypatch, is_full)
    monkeypatch.setattr(metaloom.disk, "RETRY_S", 0.0)
    disk = Disk(warn=lambda text: None)
    disk.replace(tmp_path / "one", "content")
    disk.wait(lambda: True)
    assert not (tmp_path / "one").exists()
    disk.wait(lambda: False)
    assert (tmp_path / "one").read_text() == "content"


def test_what_does_not_pass_is_raised_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Disk().replace(tmp_path / "missing" / "one", "content")


def test_an_end_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, lambda: True)
    said: list[str] = []
    disk = Disk(patience_minutes=0.0, warn=said.append)
    disk.replace(tmp_path / "one", "content")
    disk.raise_nothing()
    disk.replace(tmp_path / "one", "more")
    disk.end()
    disk.end()
    assert len(said) == 2
    assert f"of {tmp_path / 'one'} what it should hold" in said[1]


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_text("before")
    refuse(monkeypatch, lambda: True)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "one", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_failure_is_no_reason_for_another_where_its_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whereabouts = Whereabouts(tmp_path)

    def full(*arguments: object, **more: object) -> int:
        raise FULL

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(Path, "write_text", full)
    whereabouts.enter("outer step 3")
    whereabouts.record(Failure("defect", "what was first"))
    assert whereabouts.text == "outer step 3"


def test_a_console_on_a_full_disk_says_it_later() -> None:
    with Path("/dev/full").open("w") as full:
        console = LineConsole(full, full)
        console.note("one")
        console.warn("two")
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_mlflow_is_not_waited_for_over_lines_that_its_journal_lacks(tmp_path: Path) -> None:
    said: list[str] = []
    disk = Disk(warn=said.append)
    path = tmp_path / "metrics.jsonl"
    tracker = MlflowTracker(None, "one", journal_path=path, disk=disk, warn=said.append)
    tracker.start(run_name="a run", params={}, tags={}, resume_id=None)
    lines = tracker._journal._lines
    assert lines is not None
    lines._file = Limited(lines._file, 60)  # type: ignore[assignment]
    for step in range(3):
        tracker.log({"a": float(step)}, step)
    assert tracker._state.num_written == 1
    assert not tracker.flush(60.0)
    tracker.finish("finished")
    assert [text for text in said if "did not reach" in text] == []
