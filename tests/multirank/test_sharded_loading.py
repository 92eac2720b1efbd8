"""Weights larger than a rank's share are never in its memory: each reads its own rows."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from metaloom.build import model_structure
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.sharded import Sharded
from metaloom.engine.unroll import Unroll
from metaloom.models.gpt import Gpt
from metaloom.weights import hold, of_file
from tests.multirank.processes import run_ranks

MIB = 2**20
CPU = torch.device("cpu")
# 24 blocks of 12 MiB: a rank's share and the blocks that it runs are far from the whole.
MODEL = functools.partial(Gpt, num_layers=24, width=512, num_heads=4, context_length=4, tied_embeddings=True)
SMALL = functools.partial(Gpt, num_layers=1, width=512, num_heads=4, context_length=4, tied_embeddings=True)


# What is freed goes back at once: counted is what is held, not what the allocator keeps.
NOTHING_KEPT_FOR_LATER = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def peak_of_loading_and_a_hypergradient(path: Path) -> tuple[float, float]:
    """MiB above what was there before, on this rank; and the meta-loss."""
    _hypergradient(SMALL, None)  # torch's own code and workspaces are there from now on
    before = _restarted_peak()
    loss = _hypergradient(MODEL, path)
    return (_peak() - before) / MIB, loss


def _hypergradient(make: Callable[[], Gpt], path: Path | None) -> float:
    """Loads a model in shards, differentiates once, and returns the meta-loss."""
    model = hold(make, None if path is None else of_file(path), Sharded(CPU), CPU, torch.float32)
    adapter = LoraAdapter(
        model.module,
        targets=["qkv"],
        rank=2,
        alpha=2.0,
        generator=torch.Generator().manual_seed(0),
        structure=model_structure(model.module),
        shards=model.shards,
    )
    unroll = Unroll(
        Learner(adapter, Precision("float32"), recompute_blocks=True, head="language_modelling"),
        Sgd(),
        Rates(0.1, "none", 1),
        (0.0, 1.0),
    )
    tokens = torch.arange(4)[None, None]
    part = {"inputs": tokens, "targets": tokens}
    meta = adapter.meta_parameters(init=True, backbone=False)
    return float(Rematerialized().meta_gradient(unroll, meta, TaskBatch((0,), part, part)).losses)


def test_no_rank_ever_holds_the_whole_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODEL()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    whole = sum(value.numel() * value.element_size() for value in weights.values()) / MIB
    tokens = torch.arange(4)
    expected = torch.nn.functional.cross_entropy(model(tokens[None])[0], tokens).item()
    del model, weights
    gc.collect()
    ranks = run_ranks(
        4, peak_of_loading_and_a_hypergradient, path, timeout_s=600.0, environment=NOTHING_KEPT_FOR_LATER
    )
    for peak, loss in ranks:
        # A quarter of the weights, and the blocks that run.
        assert peak < 0.5 * whole
        # The LoRA matrices have moved it a little.
        assert abs(loss - expected) < 0.3


def _restarted_peak() -> int:
    """What is resident now, from where the peak is counted on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
