"""Making a data set: once, into a directory of its own."""

import hashlib
from pathlib import Path

import pytest

from metaloom.datasets import make_dataset
from metaloom.errors import StreamError


def test_the_second_making_finds_the_first(tmp_path: Path) -> None:
    first = make_dataset("glyphs", tmp_path / "set", max_per_split=3)
    again = make_dataset("glyphs", tmp_path / "set", max_per_split=3)
    assert (first.created, again.created) == (True, False)
    assert first.index.digest == again.index.digest
    assert first.num_classes == again.num_classes == {"train": 3, "validation": 3, "test": 3}
    assert first.num_samples == {"train": 36, "validation": 36, "test": 36}
    assert first.num_bytes == sum(file.stat().st_size for file in (tmp_path / "set").glob("*.tar"))


def test_a_broken_or_unfinished_set_is_made_again(tmp_path: Path) -> None:
    first = make_dataset("stdlib", tmp_path, max_per_split=3)
    (tmp_path / "train-00000.tar").write_bytes(b"")
    (tmp_path / "train-00007.tar").write_bytes(b"left over")
    (tmp_path / "test-00000.tar.4711.partial").write_bytes(b"left over")
    again = make_dataset("stdlib", tmp_path, max_per_split=3)
    assert again.created
    (tmp_path / "index.json").unlink()
    assert make_dataset("stdlib", tmp_path, max_per_split=3).created
    assert again.index.digest == first.index.digest
    files = [*again.index.shards, *again.index.columns.values()]
    for file in files:
        assert hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest() == file.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["index.json", *(file.name for file in files)]
    )


def test_progress_counts_all_samples(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make_dataset(
        "stdlib", tmp_path, max_per_split=2, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 8) for done in range(1, 9)]


def test_a_directory_with_another_data_set_is_refused(tmp_path: Path) -> None:
    make_dataset("stdlib", tmp_path, max_per_split=2)
    with pytest.raises(StreamError, match=r"holds the data set 'stdlib', not 'glyphs'\. Choose another"):
        make_dataset("glyphs", tmp_path, max_per_split=2)
    with pytest.raises(
        StreamError, match=r"holds stdlib made otherwise: .*max_modules_per_split is 2 there and 3 now"
    ):
        make_dataset("stdlib", tmp_path, max_per_split=3)


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StreamError, match=r"holds other files \(thesis\.tex\); glyphs needs a directory"):
        make_dataset("glyphs", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written_is_named_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamError, match=r"file cannot be used as the directory of a data set: .*Not a dir"):
        make_dataset("stdlib", tmp_path / "file")
    with pytest.raises(StreamError, match=r"set: .*Not a directory"):
        make_dataset("stdlib", tmp_path / "file" / "set")


def test_a_full_disk_is_named_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(StreamError, match=r"cannot be written: .*No space left on device.*has room"):
        make_dataset("stdlib", tmp_path / "set", max_per_split=1)
    assert not (tmp_path / "set" / "index.json").exists()


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"no built-in data set 'glyph'; .*Did you mean glyphs\?"):
        make_dataset("glyph", tmp_path)
    with pytest.raises(StreamError, match=r"max_per_split is 0; it must be at least 1"):
        make_dataset("glyphs", tmp_path, max_per_split=0)
    with pytest.raises(StreamError, match=r"s3://bucket/glyphs: data sets are made in a local directory"):
        make_dataset("glyphs", "s3://bucket/glyphs")
