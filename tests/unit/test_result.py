"""Which checkpoint is a run's result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from metaloom.checkpoints.catalogue import step_folder
from metaloom.checkpoints.retention import Retention
from metaloom.checkpoints.store import Checkpoint, CheckpointStore, rooms_by, whole_tensor
from metaloom.errors import CheckpointError
from metaloom.result import best_result


def test_a_damaged_best_checkpoint_is_named_with_the_way_to_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, retention=Retention(last=9))
    for step in (1, 2):
        store.save(Checkpoint(step, {"a": torch.ones(3)}, {"progress": {"best_step": 1}}))
    newest, rooms = store.load(2), rooms_by(whole_tensor)
    best = tmp_path / step_folder(1)
    for shard in best.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, the manifest says .* or remove its folder: .* step 2"):
        best_result(store, newest, pytest.fail, rooms)
    shutil.rmtree(best)
    told: list[str] = []
    assert best_result(store, newest, told.append, rooms) is newest
    assert told == [
        f"the checkpoint of outer step 1, the best one, is not in {tmp_path}: that of step 2 is taken"
    ]
