"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from metaloom.files import replace_file


def failing(number: int, *, for_folders: bool) -> Callable[[int], None]:
    """An `os.fsync` that fails for folders alone, or for files alone."""

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == for_folders:
            raise OSError(number, os.strerror(number))

    return fsync


def test_a_file_holds_the_new_content_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    for content in ("first", "größer", b"bytes\n", ""):
        replace_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


def test_content_that_cannot_be_written_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    replace_file(path, "old")
    monkeypatch.setattr("os.fsync", failing(errno.ENOSPC, for_folders=False))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_it_has_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    replace_file(path, "old")
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "os.fsync",
        lambda file: seen.append((Path(f"/proc/self/fd/{file}").readlink().name, path.read_text())),
    )
    replace_file(path, "new")
    (partial, before), after = seen
    assert re.fullmatch(r"facts\.json\.\d+\.partial", partial)
    assert (before, after) == ("old", (tmp_path.name, "new"))


def test_writers_that_come_at_once_each_write_all_of_their_own(tmp_path: Path) -> None:
    path, together, failed = tmp_path / "facts.json", threading.Barrier(4), []

    def write(letter: str) -> None:
        together.wait()
        try:
            for _ in range(25):
                replace_file(path, 1000 * letter)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in {1000 * letter for letter in "abcd"}
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_synced_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("os.fsync", failing(number, for_folders=True))
    replace_file(tmp_path / "facts.json", "new")
    assert (tmp_path / "facts.json").read_text() == "new"


def test_a_folder_that_fails_to_sync_is_an_error_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("os.fsync", failing(errno.EIO, for_folders=True))
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "facts.json", "new")
    assert len(os.listdir("/proc/self/fd")) == opened
