"""Checkpoints are complete and valid, or invisible."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.checkpoints.folder import Folder, Sink
from metaloom.checkpoints.manifest import MANIFEST, DamagedError, Manifest, StoredTensor, parse_manifest
from metaloom.checkpoints.retention import Retention, retention_of
from metaloom.checkpoints.store import (
    Checkpoint,
    CheckpointStore,
    require_same_tensors,
    rooms_by,
    whole_tensor,
)
from metaloom.errors import CheckpointError
from metaloom.recipe import load_recipe
from tests.commands import RECIPES


def tensors(step: int) -> dict[str, Tensor]:
    return {
        "meta/a": torch.arange(12.0).view(3, 4) + step,
        "meta/rates.b": torch.tensor(-0.1 * step, dtype=torch.float64),
        "optimizer/a/step": torch.tensor(float(step)),
        "half": torch.linspace(0, 1, 5).to(torch.bfloat16),
        "counts": torch.tensor([2**40 + step]),
        "flags": torch.tensor([True, False, True]),
        "none of it": torch.zeros(0, 3),
    }


def checkpoint(step: int, **metrics: float) -> Checkpoint:
    scalars = {"step": step, "progress": {"best": None, "loss": 0.1 + step}, "names": ["ä", "b"], "on": True}
    return Checkpoint(step, tensors(step), scalars, metrics)


def store_with(root: Path, *steps: int, keep_last: int = 9) -> CheckpointStore:
    store = CheckpointStore(root, retention=Retention(keep_last))
    for step in steps:
        store.save(checkpoint(step))
    return store


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def shard_of(root: Path, step: int) -> Path:
    (shard,) = folder_of(root, step).glob("*.safetensors")
    return shard


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "folder")
    store.save(checkpoint(7, validation_loss=0.25))
    loaded = store.load(7)
    assert loaded.step == 7
    assert loaded.scalars == checkpoint(7).scalars
    assert loaded.metrics == {"validation_loss": 0.25}
    assert loaded.tensors.keys() == tensors(7).keys()
    for name, value in tensors(7).items():
        assert loaded.tensors[name].dtype == value.dtype
        assert torch.equal(loaded.tensors[name], value), name


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(1, {"a": torch.tensor([math.nan, math.inf])}, {"loss": math.inf}))
    loaded = store.load(1)
    assert loaded.tensors["a"].isnan()[0]
    assert loaded.tensors["a"][1] == math.inf
    assert loaded.scalars == {"loss": math.inf}


def test_any_reader_of_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    store_with(tmp_path, 3)
    with safe_open(shard_of(tmp_path, 3), framework="pt") as file:
        assert set(file.keys()) == set(tensors(3))
        for name, value in tensors(3).items():
            assert torch.equal(file.get_tensor(name), value)


def test_nothing_that_is_read_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, 3)

    def refuse(*args: object, **keywords: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert store.load(3).step == 3
    Catalogue(tmp_path).verify(3)


def test_training_may_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write_stream = Folder.write_stream

    def slow(self: Folder, name: str, fill: Callable[[Sink], object]) -> object:
        assert may_write.wait(30)
        return write_stream(self, name, fill)

    monkeypatch.setattr(Folder, "write_stream", slow)
    store = CheckpointStore(tmp_path)
    trained = checkpoint(5)
    store.start_saving(trained)
    for value in trained.tensors.values():
        value.zero_()  # the next step
    assert store.outcome() is None
    assert store.step_being_saved == 5
    assert store.steps() == []  # invisible until it is complete
    assert store.outcome_within(0.01) is None
    may_write.set()
    outcome = store.wait()
    assert outcome is not None
    assert (outcome.step, outcome.error) == (5, None)
    assert store.wait() is None
    for name, value in store.load(5).tensors.items():
        assert torch.equal(value, tensors(5)[name])


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (folder_of(tmp_path, 2) / MANIFEST).unlink()
    assert store.steps() == [1]
    newest = store.load_newest(pytest.fail)
    assert newest is not None
    assert newest.step == 1
    with pytest.raises(CheckpointError, match="step-00000002 holds no complete checkpoint"):
        store.load(2)


def test_shards_without_a_manifest_are_cleared_away(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    (folder_of(tmp_path, 2) / MANIFEST).unlink()  # as if it had been killed before the manifest
    again = CheckpointStore(tmp_path)
    again.remove_remains()
    assert not folder_of(tmp_path, 2).exists()
    again.save(checkpoint(2))
    assert again.steps() == [1, 2]


def test_a_checkpoint_that_is_committed_stays_whole_though_a_partner_is_lost_before_it_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_lose(*args: Any, **keywords: Any) -> None:
        save(*args, **keywords)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("metaloom.checkpoints.store.save", save_and_lose)
    with pytest.raises(CheckpointError, match="Connection closed by peer"):
        CheckpointStore(tmp_path).save(checkpoint(1))
    assert CheckpointStore(tmp_path).catalogue.verify(1).step == 1


def test_saving_a_step_again_leaves_the_new_checkpoint_alone(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    store.save(Checkpoint(1, {"other": torch.ones(2)}, {}))
    assert store.load(1).tensors.keys() == {"other"}
    assert len(list(folder_of(tmp_path, 1).iterdir())) == 2


def test_a_step_that_cannot_be_saved_again_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, 1)
    monkeypatch.setattr("metaloom.checkpoints.folder.replace_file", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        store.save(Checkpoint(1, {"other": torch.ones(2)}, {}))
    assert store.load(1).tensors.keys() == tensors(1).keys()


def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        assert CheckpointStore(root).steps() == []
        assert CheckpointStore(root).load_newest(pytest.fail) is None


@pytest.mark.parametrize("name", ["shard", "manifest"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    path = shard_of(tmp_path, 1) if name == "shard" else folder_of(tmp_path, 1) / MANIFEST
    size = path.stat().st_size
    os.truncate(path, size - 1)
    expected = rf"{path.name} has {size - 1} bytes, the manifest says {size}\."
    with pytest.raises(DamagedError, match=expected if name == "shard" else "cannot be read"):
        store.load(1)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    shard = shard_of(tmp_path, 1)
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(0, len(content), 5):
        flip_bit(shard, position)
        with pytest.raises(DamagedError, match=rf"{shard.name}: the bytes are not those that were written"):
            store.catalogue.verify(1)
        if position >= header:
            with pytest.raises(DamagedError, match="SHA-256 differs"):
                store.load(1)
        shard.write_bytes(content)
    assert store.catalogue.verify(1).num_bytes == len(content)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    shard_of(tmp_path, 1).unlink()
    with pytest.raises(DamagedError, match=r"\.safetensors is missing, though the manifest lists it"):
        store.load(1)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    path = folder_of(tmp_path, 1) / MANIFEST
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        with pytest.raises(DamagedError):
            parse_manifest(bytes(damaged), source="here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "it is no JSON object"),
        (b"{}", "format None version None is not known"),
        (b'{"format": "metaloom-checkpoint", "version": 99}', "version 99 is not known"),
        (b'{"format": "metaloom-checkpoint", "version": 2}', "contents are not those that were written"),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        parse_manifest(content, source="here")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    manifest = store.catalogue.manifest(1)
    (name,) = manifest.files
    text = manifest.to_bytes().decode().replace(name, "../../secret")
    values = json.loads(text)
    del values["sha256"]
    # Signed anew, as whoever writes such a manifest would.
    from metaloom.checkpoints.manifest import _digest

    with pytest.raises(DamagedError, match=r"'\.\./\.\./secret' is not one of the files"):
        parse_manifest(json.dumps(values | {"sha256": _digest(values)}).encode(), source="here")


def test_the_newest_valid_checkpoint_is_loaded_and_the_notes_say_why_others_were_not(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 4)
    (folder_of(tmp_path, 4) / MANIFEST).write_text("{")
    flip_bit(shard_of(tmp_path, 3), -1)
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


def test_a_run_none_of_whose_checkpoints_is_valid_does_not_begin_anew(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    for step in (1, 2):
        shard_of(tmp_path, step).write_bytes(b"")
    notes: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints is valid.*metaloom checkpoints verify"
    ):
        store.load_newest(notes.append)
    assert len(notes) == 2


def test_the_rooms_of_a_checkpoint_are_asked_for_before_its_tensors_are_read(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    flip_bit(shard_of(tmp_path, 1), -1)

    def rooms(manifest: Manifest) -> dict[str, Tensor]:
        raise CheckpointError(f"{len(manifest.tensors)} tensors of another model")

    with pytest.raises(CheckpointError, match="7 tensors of another model"):
        store.load_newest(pytest.fail, rooms)


def test_tensors_that_have_no_room_are_not_read(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)

    def rooms(manifest: Manifest) -> dict[str, Tensor]:
        return {"counts": rooms_by(whole_tensor)(manifest)["counts"]}

    assert store.load(1, rooms).tensors == {"counts": tensors(1)["counts"]}


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep_last: int) -> None:
    store = store_with(tmp_path, 3, 5, 8, 10, keep_last=keep_last)
    assert store.steps() == [3, 5, 8, 10][-keep_last:]
    assert len(list(tmp_path.iterdir())) == keep_last


def test_pruning_keeps_what_any_rule_keeps(tmp_path: Path) -> None:
    rules = Retention(last=1, every=4, best=2, metric="validation_loss")
    store = CheckpointStore(tmp_path, retention=rules)
    for step, loss in enumerate([0.5, 0.2, 0.9, 0.7, math.nan, 0.3, 0.6, 0.8, 0.4], start=1):
        store.save(checkpoint(step, validation_loss=loss))
    assert store.steps() == [2, 4, 6, 8, 9]  # 2 and 6 the best, 4 and 8 multiples, 9 the newest


def test_the_best_may_be_the_highest() -> None:
    rules = Retention(last=1, best=1, metric="accuracy", is_higher_better=True)
    assert rules.kept({1: {"accuracy": 0.5}, 2: {"accuracy": 0.9}, 3: {"accuracy": 0.9}, 4: {}}) == {2, 4}


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        (
            "smoke",
            (),
            Retention(last=2, every=None, best=1, metric="validation_loss", is_higher_better=False),
        ),
        (
            "smoke",
            ("checkpoint={keep_last: 3, keep_every: 5, keep_best: 4}", "validation.best_by=accuracy"),
            Retention(last=3, every=5, best=4, metric="validation_accuracy", is_higher_better=True),
        ),
        (
            "faces-arm",
            ("validation.best_by=worst_group_loss",),
            Retention(last=2, best=1, metric="validation_worst_group_loss", is_higher_better=False),
        ),
        (
            "faces-arm",
            ("validation.best_by=worst_group_accuracy",),
            Retention(last=2, best=1, metric="validation_worst_group_accuracy", is_higher_better=True),
        ),
    ],
)
def test_the_rules_of_a_recipe_are_those_that_it_names(
    name: str, words: tuple[str, ...], expected: Retention
) -> None:
    assert retention_of(load_recipe(RECIPES / f"{name}.yaml", words)) == expected


def test_the_checkpoint_just_saved_is_never_pruned(tmp_path: Path) -> None:
    store = store_with(tmp_path, 10, 20, keep_last=2)
    store.save(checkpoint(5))  # a run that began anew from an older step
    assert 5 in store.steps()


def test_pruning_never_deletes_the_only_valid_checkpoint(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        flip_bit(shard_of(tmp_path, step), -1)
    catalogue = Catalogue(tmp_path)

    def is_valid(step: int) -> bool:
        try:
            catalogue.verify(step)
        except DamagedError:
            return False
        return True

    assert catalogue.prune(Retention(last=2), is_valid=is_valid) == [1]
    assert catalogue.steps() == [2, 3, 4]


def test_pruning_keeps_the_newest_valid_checkpoint_though_a_rule_keeps_an_older_one(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2, 3, 4)
    catalogue = Catalogue(tmp_path)
    assert catalogue.prune(Retention(last=1, every=2), is_valid=lambda step: step != 4) == [1]
    assert catalogue.steps() == [2, 3, 4]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"step-00000001: the checkpoint cannot be written: .*[Nn]ot a dir"
    ):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(checkpoint(1))


def no_space(*args: object, **keywords: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "metaloom.checkpoints.folder.replace_file"])
def test_a_full_disk_is_an_error_that_names_it_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = store_with(tmp_path, 1)
    monkeypatch.setattr(where, no_space)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        store.save(checkpoint(2))
    assert store.steps() == [1]
    # What was written has given its room back.
    assert not list(folder_of(tmp_path, 2).iterdir())


def test_what_cannot_be_deleted_does_not_spoil_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, 1, 2, keep_last=2)
    monkeypatch.setattr("shutil.rmtree", no_space)
    store.start_saving(checkpoint(3))
    outcome = store.wait()
    assert outcome is not None
    assert outcome.error is None
    assert outcome.note is not None
    assert "old checkpoints could not be deleted" in outcome.note
    assert 3 in store.steps()


def test_a_checkpoint_is_on_disk_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, 1, 2, keep_last=2)
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    prune = Catalogue.prune

    def pruned(self: Catalogue, retention: Retention, *, keep: frozenset[int] = frozenset()) -> list[int]:
        shard, *others = synced
        assert shard == shard_of(tmp_path, 3).name
        assert re.fullmatch(r"manifest\.json\.\d+\.partial", others.pop(0))
        assert others == ["step-00000003", tmp_path.name]
        return prune(self, retention, keep=keep)

    monkeypatch.setattr(Catalogue, "prune", pruned)
    store.save(checkpoint(3))
    assert store.steps() == [2, 3]


def stored(**shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {name: StoredTensor("float32", shape, ()) for name, shape in shapes.items()}


def test_the_same_tensors_are_accepted_whatever_their_order() -> None:
    require_same_tensors(
        {"a": torch.zeros(2), "b": torch.zeros(())},
        dict(reversed(stored(a=(2,), b=()).items())),
        source="here",
    )


def test_a_checkpoint_of_another_model_is_refused_with_all_differences() -> None:
    expected = {
        "a": torch.zeros(2),
        "b": torch.zeros(2, 3),
        "c": torch.zeros(1),
        "e": torch.zeros(1, dtype=torch.float64),
    }
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(expected, stored(a=(2,), b=(3, 2), d=(1,), e=(1,)), source="here")
    assert str(caught.value).splitlines() == [
        "here belongs to another model (4 differences):",
        "  c: in the model, not in the checkpoint",
        "  d: in the checkpoint, not in the model",
        "  b: shape [3, 2] in the checkpoint, [2, 3] in the model",
        "  e: float32 in the checkpoint, float64 in the model",
    ]


@pytest.mark.parametrize("action", [lambda store: store.load(3), lambda store: store.steps()])
def test_reading_changes_nothing_on_disk(tmp_path: Path, action: Callable[[CheckpointStore], object]) -> None:
    store = store_with(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    action(store)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
