"""Checkpoints are complete and valid, or invisible."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.checkpoints.store import MANIFEST, read_manifest, require_same_tensors
from metaloom.errors import CheckpointError


def tensors(step: int) -> dict[str, Tensor]:
    return {
        "meta/a": torch.arange(12.0).view(3, 4) + step,
        "meta/rates.b": torch.tensor(-0.1 * step, dtype=torch.float64),
        "optimizer/a/step": torch.tensor(float(step)),
        "half": torch.linspace(0, 1, 5).to(torch.bfloat16),
        "counts": torch.tensor([2**40 + step]),
        "none of it": torch.zeros(0, 3),
    }


def checkpoint(step: int) -> Checkpoint:
    scalars = {"step": step, "progress": {"best": None, "loss": 0.1 + step}, "names": ["ä", "b"], "on": True}
    return Checkpoint(step, tensors(step), scalars)


def store_with(root: Path, *steps: int, keep_last: int = 9) -> CheckpointStore:
    store = CheckpointStore(root, keep_last=keep_last)
    for step in steps:
        store.save(checkpoint(step))
    return store


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = store_with(tmp_path / "new" / "folder", 7)
    loaded = store.load(7)
    assert loaded.step == 7
    assert loaded.scalars == checkpoint(7).scalars
    assert loaded.tensors.keys() == tensors(7).keys()
    for name, value in tensors(7).items():
        assert loaded.tensors[name].dtype == value.dtype
        assert torch.equal(loaded.tensors[name], value), name


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(1, {"a": torch.tensor([math.nan, math.inf])}, {"loss": math.inf}))
    loaded = store.load(1)
    assert loaded.scalars == {"loss": math.inf}
    assert loaded.tensors["a"].isnan().tolist() == [True, False]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    assert store.steps() == [1]
    newest = store.load_newest(pytest.fail)
    assert newest is not None
    assert newest.step == 1
    with pytest.raises(CheckpointError, match="step-00000002 holds no complete checkpoint"):
        store.load(2)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, 1)

    def dies(path: Path, value: object) -> None:
        # All that the manifest vouches for is there, and it is not.
        assert {entry.name for entry in path.parent.iterdir()} == {"__0_0.distcp", ".metadata"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("metaloom.checkpoints.store.replace_file", dies)
        with pytest.raises(KeyboardInterrupt):
            store.save(checkpoint(2))
    assert store.steps() == [1]
    store.save(checkpoint(2))  # over the remains
    assert torch.equal(store.load(2).tensors["meta/a"], tensors(2)["meta/a"])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    store.save(Checkpoint(1, {"other": torch.ones(2)}, {}))
    assert store.load(1).tensors.keys() == {"other"}


def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        assert CheckpointStore(root).steps() == []
        assert CheckpointStore(root).load_newest(pytest.fail) is None


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-old" / MANIFEST).write_text("{}")
    assert store.steps() == [1]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    path = tmp_path / "step-00000001" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} has {size - 1} bytes, the manifest says {size}\."):
        store.load(1)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_anywhere_in_the_tensors_is_found(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    path = tmp_path / "step-00000001" / name
    size = path.stat().st_size
    for position in (0, size // 3, size // 2, size - 1):
        flip_bit(path, position)
        with pytest.raises(CheckpointError, match=rf"{name}: the bytes are not those that were written"):
            store.load(1)
        flip_bit(path, position)
    assert store.load(1).step == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (tmp_path / "step-00000001" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing, though the manifest lists it"):
        store.load(1)


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_any_changed_byte_of_a_manifest_is_found(tmp_path: Path, mask: int) -> None:
    store = store_with(tmp_path, 1)
    path = tmp_path / "step-00000001" / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= mask
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_manifest(path.parent)
    path.write_bytes(content)
    assert store.load(1).step == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b'{"format": "metaloom-ch', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "format None version None is not known; this release reads version 1"),
        (b'{"format": "metaloom-checkpoint", "version": 99}', "version 99 is not known"),
        (b'{"format": "metaloom-checkpoint", "version": 1}', "contents are not those that were written"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong_with_it(tmp_path: Path, content: bytes, message: str) -> None:
    store = store_with(tmp_path, 1)
    (tmp_path / "step-00000001" / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        store.load(1)


def test_the_newest_valid_checkpoint_is_loaded_and_the_notes_say_why_others_were_not(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step-00000004" / MANIFEST).write_text("{")
    flip_bit(tmp_path / "step-00000003" / "__0_0.distcp", 100)
    notes: list[str] = []
    newest = store.load_newest(notes.append)
    assert newest is not None
    assert newest.step == 2
    assert len(notes) == 2
    assert notes[0].startswith("skipped a checkpoint: ")
    assert "step-00000004" in notes[0]
    assert "cannot be read" in notes[0]
    assert "step-00000003" in notes[1]
    assert "SHA-256 differs" in notes[1]


def test_no_valid_checkpoint_is_none_with_a_note_for_each(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / "__0_0.distcp").write_bytes(b"")
    notes: list[str] = []
    assert store.load_newest(notes.append) is None
    assert len(notes) == 2


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep_last: int) -> None:
    store = store_with(tmp_path, 3, 5, 8, 10, keep_last=keep_last)
    assert store.steps() == [3, 5, 8, 10][-keep_last:]
    assert len(list(tmp_path.iterdir())) == keep_last


def test_pruning_keeps_protected_steps_besides_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 6):
        store.save(checkpoint(step), protect=frozenset({2, 99}))
    assert store.steps() == [2, 4, 5]
    store.save(checkpoint(6), protect=frozenset({4}))
    assert store.steps() == [4, 5, 6]


def test_the_checkpoint_just_saved_is_never_pruned(tmp_path: Path) -> None:
    store = store_with(tmp_path, 10, 20, keep_last=2)
    store.save(checkpoint(5))  # a run that began anew from an older step
    assert 5 in store.steps()


def test_a_folder_that_cannot_be_made_is_an_error_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"step-00000001: the checkpoint cannot be written: .*[Nn]ot a dir"
    ):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(checkpoint(1))


def no_space(*args: object, **keywords: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "metaloom.checkpoints.store.replace_file"])
def test_a_full_disk_is_an_error_that_names_it_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = store_with(tmp_path, 1)
    monkeypatch.setattr(where, no_space)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        store.save(checkpoint(2))
    assert store.steps() == [1]


def test_a_checkpoint_is_on_disk_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, 1, 2, keep_last=2)
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    prune = CheckpointStore._prune

    def pruned(self: CheckpointStore, protect: frozenset[int]) -> None:
        assert synced[-3:] == [f"manifest.json.{os.getpid()}.partial", "step-00000003", tmp_path.name]
        prune(self, protect)

    monkeypatch.setattr(CheckpointStore, "_prune", pruned)
    store.save(checkpoint(3))
    assert store.steps() == [2, 3]


def test_the_same_tensors_are_accepted_whatever_their_values_and_order(tmp_path: Path) -> None:
    require_same_tensors(tensors(1), dict(reversed(tensors(2).items())), source=tmp_path)


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(tmp_path: Path) -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    found = {"a": torch.zeros(2), "b": torch.zeros(3, 2), "d": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(expected, found, source=tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} belongs to another model (3 differences):",
        "  c: in the model, not in the checkpoint",
        "  d: in the checkpoint, not in the model",
        "  b: shape [3, 2] in the checkpoint, [2, 3] in the model",
    ]


@pytest.mark.parametrize("action", [lambda store: store.load(3), lambda store: store.steps()])
def test_reading_changes_nothing_on_disk(tmp_path: Path, action: Callable[[CheckpointStore], object]) -> None:
    store = store_with(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    action(store)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
