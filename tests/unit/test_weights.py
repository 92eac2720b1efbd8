"""A model's weights: from a seed or from files, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metaloom.engine.adapters.model import Structure, nothing_attached, run_model
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Sharded, rows_of
from metaloom.errors import CapabilityError, CheckpointError
from metaloom.models.gpt import Gpt
from metaloom.weights import hold, of_file, parameters_on_meta

CPU = torch.device("cpu")


def tiny() -> Gpt:
    return Gpt(num_layers=1, width=4, num_heads=1, context_length=3, tied_embeddings=True, vocabulary=5)


def drawn() -> dict[str, torch.Tensor]:
    """Weights that no `tiny()` has by itself."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(value.shape, generator=generator) for name, value in tiny().named_parameters()}


def test_rows_are_those_of_torchs_shards() -> None:
    for num_rows in (0, 1, 2, 5, 6, 37):
        for num_ranks in (1, 2, 3, 4, 8):
            mine = [len(rows_of(num_rows, rank, num_ranks)) for rank in range(num_ranks)]
            theirs = [len(part) for part in torch.arange(num_rows).chunk(num_ranks)] if num_rows else []
            assert mine == theirs + [0] * (num_ranks - len(theirs))
            assert [row for rank in range(num_ranks) for row in rows_of(num_rows, rank, num_ranks)] == list(
                range(num_rows)
            )


@pytest.mark.parametrize("sharding", [Replicated(), Sharded(CPU)], ids=["whole", "shards"])
def test_weights_are_read_from_a_file_and_tied_ones_stay_tied(tmp_path: Path, sharding: Replicated) -> None:
    weights = drawn()
    save_file(weights, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        held = hold(tiny, of_file(source), sharding, CPU, torch.float64)
        assert held.values().keys() == weights.keys()
        for name, value in held.values().items():
            assert torch.equal(value, weights[name].double()), name
        assert isinstance(held.module, Gpt)
        assert held.module.head.weight is held.module.token_embedding.weight


def test_weights_are_read_from_several_files_by_their_index(tmp_path: Path) -> None:
    weights = drawn()
    names = list(weights)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    held = hold(tiny, of_file(tmp_path), Replicated(), CPU, torch.float32)
    assert all(torch.equal(value, weights[name]) for name, value in held.values().items())


def test_weights_of_another_model_are_refused_with_all_differences(tmp_path: Path) -> None:
    weights = drawn()
    del weights["norm.bias"]
    weights["norm.weight"] = torch.zeros(7)
    weights["stray"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.weights: .* another model \(3 differences\)"
    ) as raised:
        hold(tiny, of_file(tmp_path), Replicated(), CPU, torch.float32)
    for line in (
        "norm.bias: in the model, not in the files",
        "norm.weight: shape [7] in the files, [4] in the model",
        "stray: in the files, not in the model",
    ):
        assert line in str(raised.value)


def test_a_folder_without_weights_and_a_file_that_is_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a safetensors file nor a folder with model"):
        hold(tiny, of_file(tmp_path), Replicated(), CPU, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match=r"model\.weights: .*model\.safetensors cannot be read"):
        hold(tiny, of_file(tmp_path), Replicated(), CPU, torch.float32)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        hold(tiny, of_file(tmp_path), Replicated(), CPU, torch.float32)


def test_parameters_on_meta_leave_buffers_real_and_modules_made_later_as_they_are() -> None:
    with parameters_on_meta():
        norm = nn.BatchNorm1d(3)
    assert norm.weight.device.type == "meta"
    assert norm.running_mean is not None
    assert norm.running_mean.device.type == "cpu"
    assert nn.Linear(2, 2).weight.device.type == "cpu"


class HeadOutside(nn.Module):
    """Uses its embedding's weight as a head's, in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.embedding(tokens), self.embedding.weight)


def test_a_weight_that_is_used_outside_of_its_module_is_refused_in_shards() -> None:
    held = hold(HeadOutside, None, Sharded(CPU), CPU, torch.float64)
    with pytest.raises(CapabilityError, match=r"uses one outside of its module's own forward .* replicated"):
        run_model(
            held.module,
            Structure(),
            held.values(),
            torch.tensor([[1, 2]]),
            ForwardPass(Precision("float64"), CPU),
            attachments={},
            attach=nothing_attached,
            shards=held.shards,
        )
