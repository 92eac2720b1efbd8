"""Ranks that do not see the same of a checkpoint go on from the same one all the same, or none does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from metaloom.checkpoints.folder import Folder
from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.datasets.connection import Persistence
from metaloom.errors import CheckpointError
from tests.multirank.processes import run_ranks

QUICK = Persistence(num_attempts=2, backoff_s=0.01, max_backoff_s=0.02, timeout_s=5.0)
SOUND, DAMAGED, PASSING = "sound", "damaged", "passing"
NEWEST = 2


def loaded(root: Path, views: tuple[str, str]) -> tuple[str, list[str]]:
    """What a rank makes of the checkpoints: the step and a number of it, or the error; and what it is told.

    Args:
        views: what each rank meets when it reads the tensors of the newest one.
    """
    view, read_file, open_file = views[dist.get_rank()], Folder.read, Path.open

    def is_newest(path: str) -> bool:
        return f"step-{NEWEST:08d}" in path and path.endswith(".safetensors")

    def read(self: Folder, name: str, start: int = 0, stop: int | None = None) -> bytes:
        content = bytearray(read_file(self, name, start, stop))
        if is_newest(name):
            content[-1] ^= 1
        return bytes(content)

    def fail_to_open(path: Path, *args: object, **options: object) -> object:
        if is_newest(str(path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(path, *args, **options)  # type: ignore[call-overload]

    if view == DAMAGED:
        Folder.read = read  # type: ignore[method-assign]
    elif view == PASSING:
        Path.open = fail_to_open  # type: ignore[assignment, method-assign]
    notes: list[str] = []
    try:
        newest = CheckpointStore(Folder(root, QUICK)).load_newest(notes.append)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}", notes
    assert newest is not None
    return f"step {newest.step}, {newest.tensors['a'].sum():g}", notes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The checkpoints of two steps."""
    store = CheckpointStore(tmp_path / "meta")
    for step in (1, NEWEST):
        store.save(Checkpoint(step, {"a": torch.full((100,), float(step)), "b": torch.zeros(3)}, {}))
    return tmp_path / "meta"


def test_damage_that_one_rank_alone_finds_is_passed_over_by_all_and_told_by_rank_0(root: Path) -> None:
    (ours, told), (theirs, untold) = run_ranks(2, loaded, root, (SOUND, DAMAGED))
    assert ours == theirs == "step 1, 100"
    (note,) = told
    assert note.startswith(f"skipped a checkpoint: {root}/step-00000002/")
    assert "SHA-256 differs" in note
    assert untold == []


@pytest.mark.parametrize("views", [(SOUND, PASSING), (DAMAGED, PASSING)])
def test_what_may_pass_on_one_rank_ends_all_and_nothing_is_passed_over_for_it(
    root: Path, views: tuple[str, str]
) -> None:
    (ours, told), (theirs, untold) = run_ranks(2, loaded, root, views)
    assert ours == theirs
    assert ours.startswith(f"CheckpointError: {root}/step-00000002/")
    assert "could not be read in 2 attempts" in ours
    assert "Input/output error" in ours
    assert told == untold == []
