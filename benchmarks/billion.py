"""Memory and speed of one hypergradient of a billion-parameter GPT, by estimator: prints a table.

    python benchmarks/billion.py [--json OUT]                               one GPU, at most 9 minutes
    python benchmarks/billion.py --device cpu --layers 2 --width 64 --heads 4 \\
        --vocabulary 256 --length 32 --batch 2 --rank 4 --steps 1 2         the same, tiny

Needs torch alone; where metaloom is not installed, run it from the repository's root with `PYTHONPATH=.`.

What is measured. Rank-16 LoRA on every linear layer but the head, inside 19 blocks of width 2048 with tied
embeddings over 32768 tokens (1.03e9 parameters); one task of 4 support and 4 query sequences of 1024
random tokens; K steps of gradient descent, then the query loss; its exact gradient with respect to where LoRA
starts. Forward passes run under bfloat16 autocast, with the head in chunks of tokens. The frozen
matrices are *stored* in bfloat16 (autocast would round them to it for every product anyway); LoRA, its
gradients, norms, biases and positions, and with these the residual stream, are float32.

Rows. Every row is a fresh process: a hypergradient at K = 1 to warm up, then the timed one, again if it
was short (the faster counts). The most important rows come first. A row that does not fit into what is left
of `--budget-s` is skipped and says so; a configuration that ran out of memory is not tried at a larger K.

Columns.

    estimator, blocks, snapshots   `blocks`: each block keeps its inputs alone and is computed again;
                                   snapshots `binomial` keeps 9 inner steps and computes the others again
    weights                        `shards`: under the `sharded` backend, on one rank: a block's weights are
                                   gathered by NCCL (on a CPU by gloo) for each pass over it
    above                          peak memory above model, LoRA and data, MiB (on a CPU: of the resident set)
    peak                           peak memory, MiB
    seconds, tokens/s              of the hypergradient; (K * support + query tokens) / seconds
    TFLOP/s, share                 the formula's arithmetic / seconds; its share of the rate that a large
                                   matrix product reaches in the same process and format
    counted                        torch's own count at K = 1 over the formula's: what recomputation of blocks
                                   and head adds, and attention beyond the formula's share
    difference                     |g - r| / |r|, r the gradient of the first exact row with the same K

The formula. F, one forward pass of n tokens in sequences of length L, is
`n * (2 * (matrices + LoRA) + 2 * L * D * layers)`, a causal attention counted as half of a full one. The
backbone is frozen, so a gradient is F forward and F backward, and differentiating it once more 2 F. Query
pass: 2 F. One inner step: `unrolled` 4 F; `rematerialized` and `mixed_mode` 6 F, as they compute the gradient
twice; `first_order` 4 F. What blocks, head and `binomial` compute again is not counted, so it lowers the
share.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import HALF, Precision
from metaloom.engine.sharding.sharded import Sharded, rows_in
from metaloom.engine.snapshots import Binomial, HostMemory, KeepAll, SnapshotPlan
from metaloom.engine.unroll import Unroll
from metaloom.models.gpt import Gpt

NUM_SLOTS = 9  # reverse 65 steps with none computed more than twice beyond the sweep's own
SHORT_S = 5.0  # a hypergradient that took less is timed once more
PASSES_PER_STEP = {"unrolled": 4, "rematerialized": 6, "mixed_mode": 6, "first_order": 4}
EXACT = ("unrolled", "rematerialized", "mixed_mode")
FLAT: dict[str, type[Rematerialized] | type[MixedMode] | type[FirstOrder]] = {
    "rematerialized": Rematerialized,
    "mixed_mode": MixedMode,
    "first_order": FirstOrder,
}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row measures.

    Attributes:
        estimator: of the hypergradient.
        num_steps: K.
        recompute_blocks: whether blocks keep their inputs alone.
        snapshots: which inner steps are kept, and where; "none" where the graph of all is.
        weights: "whole", or in "shards".
    """

    estimator: str
    num_steps: int
    recompute_blocks: bool = False
    snapshots: str = "all"
    weights: str = "whole"

    @property
    def configuration(self) -> tuple[str, bool, str, str]:
        """All but K."""
        return self.estimator, self.recompute_blocks, self.snapshots, self.weights

    def build(self) -> Hypergradient:
        """The estimator."""
        if self.estimator == "unrolled":
            return Unrolled()
        return FLAT[self.estimator](self._plan())

    def _plan(self) -> SnapshotPlan:
        if self.snapshots == "host":
            return HostMemory(torch.device("cuda"))
        return Binomial(NUM_SLOTS) if self.snapshots == "binomial" else KeepAll()


def planned(steps: list[int], *, has_host_memory: bool) -> list[Row]:
    """The rows, the most important ones first.

    Args:
        steps: the K to measure.
        has_host_memory: whether the device's memory is not the host's own.
    """
    ordered = sorted(set(steps))
    smallest, largest, between = ordered[0], ordered[-1], ordered[1:-1]
    flat = ("rematerialized", "mixed_mode")
    plans = ["binomial", "host"] if has_host_memory else ["binomial"]
    rows = [Row(kind, smallest) for kind in flat] + [Row("unrolled", smallest, snapshots="none")]
    rows += [Row(kind, largest, blocks) for blocks in (False, True) for kind in flat]
    rows += [Row("unrolled", count, snapshots="none") for count in (*between, largest)]
    rows += [Row(flat[0], largest, True, plan) for plan in plans]
    rows += [Row("first_order", smallest)]
    rows += [Row(kind, smallest, True, weights="shards") for kind in flat]
    rows += [Row(kind, count) for count in between for kind in flat]
    rows += [Row("unrolled", count, True, "none") for count in ordered]
    rows += [Row(kind, count, True) for count in (smallest, *between) for kind in flat]
    rows += [Row(flat[1], largest, True, weights="shards")]
    rows += [Row(flat[1], largest, True, plan) for plan in plans]
    rows += [Row(kind, largest, False, plan) for kind in flat for plan in plans]
    rest = [
        Row(kind, count, blocks, plan)
        for count in (*between, smallest)
        for blocks in (True, False)
        for kind in flat
        for plan in plans
    ]
    return list(dict.fromkeys(rows + rest))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inner problem of a row, and what its arithmetic is counted from.

    Attributes:
        num_parameters: of the backbone.
        flops_per_token: of one forward pass.
    """

    unroll: Unroll
    meta: dict[str, Tensor]
    batch: TaskBatch
    num_parameters: int
    flops_per_token: int

    def with_steps(self, num_steps: int) -> Unroll:
        """The same with another K."""
        return dataclasses.replace(self.unroll, step_weights=step_weights("last", num_steps))

    def num_tokens(self, num_steps: int) -> int:
        """Support tokens of all inner steps and query tokens."""
        return num_steps * self.batch.support["inputs"].numel() + self.batch.query["inputs"].numel()

    def flops(self, estimator: str, num_steps: int) -> int:
        """Of a hypergradient, by the formula on top of the module."""
        support, query = (part["inputs"].numel() for part in (self.batch.support, self.batch.query))
        return self.flops_per_token * (PASSES_PER_STEP[estimator] * num_steps * support + 2 * query)


def build_problem(settings: argparse.Namespace, row: Row, device: torch.device) -> Problem:
    """The same weights and data for every row."""
    torch.manual_seed(0)
    precision = Precision(settings.compute)
    with device:  # a billion weights are drawn where they stay
        model = _gpt(settings)
    model.to(precision.storage_dtype).requires_grad_(False)
    matrices = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    shards = None
    if row.weights == "shards":
        shards = Sharded(device).divide(model, rows_in(model))
        with torch.device("meta"):
            model = _gpt(settings).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    adapter = LoraAdapter(
        model,
        targets="all-linear",
        rank=settings.rank,
        alpha=float(settings.rank),
        generator=generator,
        structure=Structure(tuple(f"blocks.{index}" for index in range(settings.layers)), "head"),
        shards=shards,
    )
    if settings.compute in HALF and shards is None:
        for name, parameter in model.named_parameters():
            parameter.data = _stored(name, parameter.data, HALF[settings.compute])
    elif settings.compute in HALF and shards is not None:
        for name, value in shards.values.items():
            shards.values[name] = _stored(name, value, HALF[settings.compute])
    meta = adapter.meta_parameters(init=True, backbone=False)
    for name, value in meta.items():
        if name.endswith("lora_b"):
            # Not at zero, where LoRA's first gradients are: nothing measured is trivial.
            value.copy_(0.02 * torch.randn(value.shape, dtype=value.dtype, generator=generator))
    learner = Learner(
        adapter, precision, recompute_blocks=row.recompute_blocks, head_chunk=settings.head_chunk
    )
    unroll = Unroll(
        learner, Sgd(), Rates(settings.rate, "none", row.num_steps), step_weights("last", row.num_steps)
    )
    tokens = torch.randint(
        settings.vocabulary, (2, 1, settings.batch, settings.length + 1), generator=generator
    ).to(device)
    support, query = ({"inputs": part[..., :-1], "targets": part[..., 1:]} for part in tokens)
    products = matrices + sum(value.numel() for value in meta.values())
    return Problem(
        unroll,
        meta,
        TaskBatch((0,), support, query),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_token=2 * products + 2 * settings.length * settings.width * settings.layers,
    )


def _gpt(settings: argparse.Namespace) -> Gpt:
    return Gpt(
        num_layers=settings.layers,
        width=settings.width,
        num_heads=settings.heads,
        context_length=settings.length,
        tied_embeddings=True,
        vocabulary=settings.vocabulary,
    )


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices that enter products, embeddings of tokens among them, in `dtype`; the rest as it is."""
    is_in_products = value.ndim == 2 and not name.startswith("position_embedding")
    return value.to(dtype) if is_in_products else value


def measure(settings: argparse.Namespace, row: Row) -> dict[str, Any]:
    """One row's figures, in this process."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with one_rank(device) if row.weights == "shards" else contextlib.nullcontext():
        try:
            return _measured(settings, row, device)
        except torch.OutOfMemoryError:
            return {"outcome": "out of memory"}


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A world of this process alone."""
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=HashStore(),
        rank=0,
        world_size=1,
        device_id=device if is_cuda else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measured(settings: argparse.Namespace, row: Row, device: torch.device) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    dtype = HALF.get(settings.compute) or Precision(settings.compute).storage_dtype
    rate = matmul_flops_per_s(device, dtype, settings.matmul or (8192 if is_cuda else 512))
    problem = build_problem(settings, row, device)
    estimator = row.build()
    before = _memory(device, peak=False)
    counter = FlopCounter()
    with counter:  # the warm-up
        estimator.meta_gradient(problem.with_steps(1), problem.meta, problem.batch)
    gc.collect()
    _wait(device)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def timed() -> tuple[dict[str, Tensor], float]:
        started = time.perf_counter()
        result = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
        _wait(device)
        return result.gradient, time.perf_counter() - started

    gradient, seconds = timed()
    peak = _memory(device, peak=True)
    if seconds < SHORT_S:
        del gradient
        gradient, again = timed()
        seconds = min(seconds, again)
    flops = problem.flops(row.estimator, row.num_steps)
    return {
        "outcome": "measured",
        "num_parameters": problem.num_parameters,
        "num_lora": sum(value.numel() for value in problem.meta.values()),
        "above_mib": (peak - before) / MIB,
        "peak_mib": peak / MIB,
        "seconds": seconds,
        "tokens_per_s": problem.num_tokens(row.num_steps) / seconds,
        "tflop_per_s": flops / seconds / 1e12,
        "matmul_tflop_per_s": rate / 1e12,
        "share": flops / seconds / rate,
        "counted": counter.total / problem.flops(row.estimator, 1),
        **compared(gradient, Path(settings.reference), is_exact=row.estimator in EXACT),
    }


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the arithmetic of every matrix product and attention kernel that runs inside.

    `torch.utils.flop_counter.FlopCounterMode` uses the same counts, but hooks the backward passes of modules,
    which fails inside `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=output)
        return output


def compared(gradient: dict[str, Tensor], reference: Path, *, is_exact: bool) -> dict[str, Any]:
    """Whether the gradient is finite, and its relative distance from the reference; an exact one becomes it
    where there is none yet."""
    flat = torch.cat([gradient[name].flatten().cpu().double() for name in sorted(gradient)])
    is_finite = bool(flat.isfinite().all())
    if reference.exists():
        expected = torch.load(reference, weights_only=True)
        difference: float | None = float((flat - expected).norm() / expected.norm())
        return {"is_finite": is_finite, "difference": difference if is_finite else None}
    if is_exact and is_finite:
        torch.save(flat, reference)
        return {"is_finite": True, "difference": 0.0}
    return {"is_finite": is_finite, "difference": None}


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """What the product of two square matrices reaches."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    output = torch.empty_like(left)
    num_repeats = 20
    for _ in range(3):
        torch.mm(left, right, out=output)
    _wait(device)
    started = time.perf_counter()
    for _ in range(num_repeats):
        torch.mm(left, right, out=output)
    _wait(device)
    return 2 * size**3 * num_repeats / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device, *, peak: bool) -> int:
    """Bytes: of tensors on a GPU, now or at their peak; on a CPU of the resident set, at its peak so far."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HEADER = (
    f"{'K':>4} {'estimator':14} {'blocks':6} {'snapshots':9} {'weights':7} {'above':>8} {'peak':>8} "
    f"{'seconds':>8} {'tokens/s':>9} {'TFLOP/s':>8} {'share':>6} {'counted':>7} {'difference':>10} "
    f"{'elapsed':>7}"
)


def formatted(row: Row, figures: dict[str, Any], elapsed_s: float) -> str:
    """A line of the table."""
    what = (
        f"{row.num_steps:4} {row.estimator:14} {'yes' if row.recompute_blocks else 'no':6} {row.snapshots:9} "
        f"{row.weights:7} "
    )
    if figures["outcome"] != "measured":
        return f"{what}{figures['outcome']} ({elapsed_s:.0f} s elapsed)"
    difference = "-" if figures["difference"] is None else f"{figures['difference']:.1e}"
    return what + (
        f"{figures['above_mib']:8.0f} {figures['peak_mib']:8.0f} {figures['seconds']:8.3f} "
        f"{figures['tokens_per_s']:9.0f} {figures['tflop_per_s']:8.4g} {figures['share']:6.1%} "
        f"{figures['counted']:7.2f} {difference if figures['is_finite'] else 'not finite':>10} "
        f"{elapsed_s:5.0f} s"
    )


class Budget:
    """The time that is left, and how long a row is likely to take, judged by those that were measured."""

    def __init__(self, budget_s: float) -> None:
        self._started, self._budget_s = time.monotonic(), budget_s
        self._around_s = 0.0
        self._step_s: dict[tuple[str, bool], float] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float:
        return self._budget_s - self.elapsed_s

    def learn(self, row: Row, wall_s: float, seconds: float) -> None:
        """Takes in a measured row: what an inner step takes, and what is beside the hypergradient."""
        self._around_s = wall_s - seconds * (2 if seconds < SHORT_S else 1)
        self._step_s[row.estimator, row.recompute_blocks] = seconds / (row.num_steps + 1)

    def expected_s(self, row: Row) -> float:
        """About how long the row takes: by the same estimator, or else by the slowest; 0 before the first."""
        slowest = max(self._step_s.values(), default=0.0)
        seconds = self._step_s.get((row.estimator, row.recompute_blocks), slowest) * (row.num_steps + 1)
        return self._around_s + seconds * (2 if seconds < SHORT_S else 1)


def in_fresh_process(row: Row, arguments: list[str], reference: Path, limit_s: float) -> dict[str, Any]:
    """A row's figures, measured by a process of its own, which is killed at the limit."""
    words = [row.estimator, str(row.num_steps), str(int(row.recompute_blocks)), row.snapshots, row.weights]
    command = [sys.executable, __file__, *arguments, "--row", *words, "--reference", str(reference)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"outcome": f"not done within {limit_s:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"outcome": f"failed: {last}", "stderr": done.stderr}
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def run_table(settings: argparse.Namespace, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Measures row by row, prints each, and returns all."""
    budget = Budget(settings.budget_s)
    results: list[dict[str, Any]] = []
    too_large: dict[tuple[str, bool, str, str], int] = {}
    print(HEADER, flush=True)
    is_cuda = torch.device(settings.device).type == "cuda"
    for row in planned(settings.steps, has_host_memory=is_cuda)[: settings.rows]:
        started_s = budget.elapsed_s
        if too_large.get(row.configuration, row.num_steps) < row.num_steps:
            figures: dict[str, Any] = {"outcome": "not tried: out of memory at a smaller K"}
        elif budget.left_s <= budget.expected_s(row):
            needed = budget.expected_s(row)
            why = f"may take {needed:.0f} s, {max(0.0, budget.left_s):.0f} s are left of the budget"
            figures = {"outcome": f"skipped: {why}"}
        else:
            limit_s = min(settings.row_limit_s, budget.left_s)
            figures = in_fresh_process(row, arguments, folder / f"{row.num_steps}.pt", limit_s)
        if figures["outcome"] == "measured":
            if not any(result["outcome"] == "measured" for result in results):
                sizes = f"{figures['num_parameters']:,} parameters, {figures['num_lora']:,} of LoRA"
                print(f"# {sizes}", flush=True)
            budget.learn(row, budget.elapsed_s - started_s, figures["seconds"])
        if figures["outcome"] == "out of memory":
            too_large[row.configuration] = min(row.num_steps, too_large.get(row.configuration, row.num_steps))
        print(formatted(row, figures, budget.elapsed_s), flush=True)
        results.append({**dataclasses.asdict(row), **figures, "elapsed_s": budget.elapsed_s})
        if settings.json is not None:
            record = {"torch": torch.__version__, "settings": _plain(settings), "rows": results}
            settings.json.write_text(json.dumps(record, indent=1) + "\n")
    return results


def _plain(settings: argparse.Namespace) -> dict[str, Any]:
    hidden = ("json", "row", "reference")
    return {name: value for name, value in vars(settings).items() if name not in hidden}


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line's values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    counts = {"layers": 19, "width": 2048, "heads": 16, "vocabulary": 32768, "length": 1024}
    counts |= {"batch": 4, "rank": 16, "head-chunk": 1024}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16, 64], metavar="K")
    parser.add_argument("--rate", type=float, default=0.1, help="of the inner steps; default 0.1")
    parser.add_argument("--rows", type=int, metavar="N", help="the first N rows alone")
    parser.add_argument("--device", default="cuda", help="default cuda")
    formats = ("bfloat16", "float32", "float64")
    parser.add_argument("--compute", choices=formats, default="bfloat16", help="default bfloat16")
    parser.add_argument("--matmul", type=int, metavar="N", help="size of the matrices whose product is timed")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of the whole table; default 540")
    parser.add_argument("--row-limit-s", type=float, default=120.0, help="of one row; default 120")
    parser.add_argument("--json", type=Path, metavar="OUT", help="a file to write all figures to")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Prints the table, or one row's figures where a row is asked for; 1 where a row failed."""
    arguments = sys.argv[1:]
    settings = parsed(arguments)
    if settings.row is not None:
        estimator, num_steps, recompute_blocks, snapshots, weights = settings.row
        row = Row(estimator, int(num_steps), bool(int(recompute_blocks)), snapshots, weights)
        print(json.dumps(measure(settings, row)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = run_table(settings, arguments, Path(folder))
    return 1 if any(result["outcome"].startswith("failed") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
