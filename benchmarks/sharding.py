"""What a rank holds, and how long it waits, as its weights are divided among more of them: prints a table.

    python -m benchmarks.sharding [--ranks 1 2 4] [--layers 24] [--width 512] [--estimator mixed_mode]

A transformer over bytes, its backbone and the start of rank-8 LoRA meta-learned with Adam, under
`sharding.kind: sharded`; every rank has one task. Each number of ranks runs in fresh processes with one
thread each, all on this machine: more ranks than cores wait for each other's computing too. It runs twice:
once to measure memory, with an allocator that gives back at once what is freed, and once to measure time.
See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from benchmarks.measuring import status_mib
from metaloom.build import model_structure
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.choice import EXACT_AND_FLAT
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.sharded import Sharded
from metaloom.engine.step import StepTasks, outer_step
from metaloom.engine.unroll import Unroll
from metaloom.models.gpt import Gpt
from metaloom.weights import HeldModel, parameters_on_meta

CPU = torch.device("cpu")
MIB = 2**20
# Freed memory goes back to the system at once: the peak is what was held, not what the allocator kept.
NOTHING_KEPT_FOR_LATER = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run."""

    num_layers: int
    width: int
    num_tokens: int
    num_inner: int
    estimator: str
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one rank.

    Attributes:
        weights_mib: its shards of the backbone.
        states_mib: of the outer optimizer.
        peak_mib: the most that was resident above what was before, model and optimizer included.
        step_s: of an outer step, the mean of all but the first.
        waited_s: of it, for collectives.
    """

    weights_mib: float
    states_mib: float
    peak_mib: float
    step_s: float
    waited_s: float


def measure(rank: int, num_ranks: int, case: Case, folder: str) -> None:
    """Runs one rank, and leaves what it has measured in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(minutes=30),
    )
    _run(
        dataclasses.replace(case, num_layers=1), num_steps=1
    )  # torch's own code and workspaces are there now
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_mib("VmRSS")
    measured = dataclasses.replace(
        _run(case, num_steps=case.num_steps), peak_mib=status_mib("VmHWM") - before
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _run(case: Case, *, num_steps: int) -> Measured:
    make = functools.partial(
        Gpt,
        num_layers=case.num_layers,
        width=case.width,
        num_heads=case.width // 64,
        context_length=case.num_tokens,
        tied_embeddings=True,
    )
    sharding = Sharded(CPU)
    with parameters_on_meta():
        module = make().requires_grad_(False)
    shapes = {name: value.shape for name, value in module.named_parameters()}

    def drawn(name: str, rows: range) -> Tensor:
        whole = torch.empty(len(rows), *shapes[name][1:])
        return whole.fill_(1.0) if whole.ndim == 1 else whole.normal_(0.0, 0.02)

    model = HeldModel(module, sharding.divide(module, drawn))
    adapter = LoraAdapter(
        model.module,
        targets="all-linear",
        rank=8,
        alpha=16.0,
        generator=torch.Generator().manual_seed(0),
        structure=model_structure(model.module),
        shards=model.shards,
    )
    learner = Learner(adapter, Precision("float32"), recompute_blocks=True, head="language_modelling")
    last = (*(0.0,) * case.num_inner, 1.0)
    unroll = Unroll(learner, Sgd(), Rates(0.1, "none", case.num_inner), last)
    algorithm = Maml(unroll, EXACT_AND_FLAT[case.estimator]())
    outer = OuterOptimizer(adapter.meta_parameters(init=True, backbone=True), _settings(case), sharding)
    model.hold_once(outer.meta)
    combiner = Mean(outer.meta, sharding, metric_names=algorithm.metric_names)
    tokens = torch.randint(
        256, (1, 1, case.num_tokens + 1), generator=torch.Generator().manual_seed(sharding.rank)
    )
    part = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    tasks = StepTasks(TaskBatch((sharding.rank,), part, part), sharding.world_size, 1)
    scaler = LossScaler(Precision("float32"))
    seconds, waited = [], []
    for _ in range(num_steps):
        sharding.group.waited_s = 0.0
        start = time.perf_counter()
        outer_step(tasks, algorithm, combiner, outer, scaler)
        seconds.append(time.perf_counter() - start)
        waited.append(sharding.group.waited_s)
    return Measured(
        weights_mib=_size_mib(value for name, value in outer.meta.items() if name.startswith("backbone.")),
        states_mib=_size_mib(v for name, v in outer.tensors().items() if name.startswith("optimizer/")),
        peak_mib=0.0,
        step_s=sum(seconds[1:]) / max(1, len(seconds) - 1),
        waited_s=sum(waited[1:]) / max(1, len(seconds) - 1),
    )


def _settings(case: Case) -> OuterSettings:
    return OuterSettings(
        optimizer="adam",
        lr=1e-3,
        lr_rates=1e-3,
        lr_loss=1e-3,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        num_steps=case.num_steps,
        warmup_steps=0,
        decay="constant",
        final_ratio=1.0,
        clip_norm=1.0,
        ema=None,
    )


def _size_mib(tensors: Iterable[Tensor]) -> float:
    local = (value.to_local() if isinstance(value, DTensor) else value for value in tensors)
    return sum(value.numel() * value.element_size() for value in local) / MIB


def run(num_ranks: int, case: Case) -> list[Measured]:
    """What each of `num_ranks` ranks has measured."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (num_ranks, case, folder), nprocs=num_ranks)  # type: ignore[no-untyped-call]
        files = [Path(folder, f"{rank}.json") for rank in range(num_ranks)]
        return [Measured(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--inner", type=int, default=2, metavar="K", help="inner steps")
    parser.add_argument("--steps", type=int, default=3, help="outer steps, the first of which is not timed")
    parser.add_argument("--estimator", choices=sorted(EXACT_AND_FLAT), default="mixed_mode")
    options = parser.parse_args(arguments)
    case = Case(
        options.layers, options.width, options.tokens, options.inner, options.estimator, options.steps
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}; {case}")
    print(
        f"{'ranks':>5}{'weights':>9}{'gradient':>10}{'states':>8}{'sum MiB':>9}{'/ one':>7}"
        f"{'peak MiB':>10}{'/ one':>7}{'step s':>8}{'waiting':>9}"
    )
    alone: Measured | None = None
    for num_ranks in options.ranks:
        os.environ.update(NOTHING_KEPT_FOR_LATER)
        largest = max(run(num_ranks, case), key=lambda measured: measured.peak_mib)
        for name in NOTHING_KEPT_FOR_LATER:
            del os.environ[name]
        ranks = run(num_ranks, case)
        alone = alone or largest
        # A gradient is as large as the weights.
        total, total_alone = (2 * of.weights_mib + of.states_mib for of in (largest, alone))
        times = [(of.step_s, of.waited_s) for of in ranks]
        step_s, waited_s = (sum(values) / num_ranks for values in zip(*times, strict=True))
        print(
            f"{num_ranks:5}{largest.weights_mib:9.0f}{largest.weights_mib:10.0f}{largest.states_mib:8.0f}"
            f"{total:9.0f}{total / total_alone:7.2f}{largest.peak_mib:10.0f}"
            f"{largest.peak_mib / alone.peak_mib:7.2f}{step_s:8.1f}{waited_s / step_s:9.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
