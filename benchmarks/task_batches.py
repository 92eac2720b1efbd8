"""LoRA of T tasks in one pass, beside one pass per task and beside PEFT's layers: prints a table.

    python -m benchmarks.task_batches [--tasks 1 4 8 16] [--repeats 3] [--json OUT]
    python -m benchmarks.task_batches --device cuda --model large --compute bfloat16

What is measured: the losses of T tasks and their gradients with respect to each task's own LoRA matrices, in
a Llama of transformers with LoRA on all of its linear layers but the head. Small tasks are one sequence of 32
tokens, large ones 8 of 128.

Rows. Each is a process of its own on one core (or the GPU), which makes the gradients once to warm up;
repeats alternate between the rows of a block, so that a noisy machine hits all alike.

    one pass          metaloom's adapter: all tasks in one pass
    task after task   the same, T times with one task
    PEFT, in turn     PEFT's model, T times with one task's matrices
    PEFT, vmap        PEFT's model under torch.func.vmap over the tasks' matrices

Columns. `best s` of the repeats; tokens per second of all tasks; `/ in turn`: how many times as fast as
PEFT's layers, task after task; `peak MiB` above model and data; `difference` of the gradients to those of the
first row, relative to their norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import keep_to_one_core, peak_above
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.models.hugging_face import OfTransformers, make_model

REPOSITORY = Path(__file__).parent.parent
Way = Literal["one pass", "task after task", "PEFT, in turn", "PEFT, vmap"]
WAYS: tuple[Way, ...] = ("one pass", "task after task", "PEFT, in turn", "PEFT, vmap")
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688},
    "large": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 5504,
    },
}
SIZES: dict[str, tuple[int, int]] = {"small": (1, 32), "large": (8, 128)}  # sequences, tokens
VOCABULARY, RANK, ALPHA = 1024, 8, 16
Fast = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    way: Way
    num_tasks: int
    size: str
    model: str
    device: str
    compute: Literal["float32", "bfloat16"]


@dataclasses.dataclass
class Measured:
    """What a row's process tells."""

    peak_mib: float
    seconds: list[float]
    difference: float | None = None
    failure: str | None = None


# ---------------------------------------------------------------- one row


def make_llama(case: Case) -> OfTransformers:
    """With random weights that follow from a seed."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **MODELS[case.model], vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        torch.manual_seed(0)
        model = make_model(Path(folder), "causal-lm")
    return model.requires_grad_(False).to(case.device)


def start(model: OfTransformers, num_tasks: int, device: str) -> tuple[LoraAdapter, Fast]:
    """The adapter, and fast weights that differ by task."""
    adapter = LoraAdapter(
        model,
        targets="all-linear",
        rank=RANK,
        alpha=ALPHA,
        generator=torch.Generator().manual_seed(1),
        structure=Structure(model.block_names, model.head_name, model.embedding_name),
    )
    generator = torch.Generator().manual_seed(2)
    fast = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator).to(device)
        for name, value in adapter.init({}, num_tasks).items()
    }
    return adapter, fast


def tokens_of(case: Case) -> Tensor:
    """`[T, N, L + 1]`."""
    sequences, length = SIZES[case.size]
    generator = torch.Generator().manual_seed(3)
    shape = (case.num_tasks, sequences, length + 1)
    return torch.randint(VOCABULARY, shape, generator=generator).to(case.device)


def by_metaloom(case: Case, model: OfTransformers) -> Callable[[], Fast]:
    """The gradients by metaloom's adapter."""
    adapter, fast = start(model, case.num_tasks, case.device)
    learner, tokens = Learner(adapter, Precision(case.compute)), tokens_of(case)

    def of_tasks(own: Fast, numbers: range) -> list[Tensor]:
        part = tokens[numbers.start : numbers.stop]
        data = {"inputs": part[..., :-1], "targets": part[..., 1:]}
        leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
        losses, _ = learner.losses("support", {}, leaves, TaskBatch(tuple(numbers), data, data), 0)
        return list(torch.autograd.grad(losses.sum(), list(leaves.values())))

    def together() -> Fast:
        return dict(zip(fast, of_tasks(fast, range(case.num_tasks)), strict=True))

    def in_turn() -> Fast:
        rows = [
            of_tasks({name: value[task : task + 1] for name, value in fast.items()}, range(task, task + 1))
            for task in range(case.num_tasks)
        ]
        return {name: torch.cat(parts) for name, parts in zip(fast, zip(*rows, strict=True), strict=True)}

    return together if case.way == "one pass" else in_turn


def by_peft(case: Case, model: OfTransformers) -> Callable[[], Fast]:
    """The gradients by PEFT's layers."""
    from peft import LoraConfig, get_peft_model

    _, fast = start(model, case.num_tasks, case.device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    wrapped = get_peft_model(model, config).eval()
    prefix, sides = "base_model.model.", {"lora_a": "lora_A", "lora_b": "lora_B"}
    names = {}
    for name in fast:
        layer, _, side = name.rpartition(".")
        names[name] = f"{prefix}{layer}.{sides[side]}.default.weight"
    tokens = tokens_of(case)

    def loss(own: Fast, sequences: Tensor) -> Tensor:
        with Precision(case.compute).autocast(torch.device(case.device)):
            weights = {names[name]: value for name, value in own.items()}
            logits = functional_call(wrapped, weights, (sequences[:, :-1],))
        return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())

    def in_turn() -> Fast:
        rows = []
        for task in range(case.num_tasks):
            leaves = {name: value[task].detach().requires_grad_() for name, value in fast.items()}
            rows.append(torch.autograd.grad(loss(leaves, tokens[task]), list(leaves.values())))
        return {name: torch.stack(parts) for name, parts in zip(fast, zip(*rows, strict=True), strict=True)}

    def vectorized() -> Fast:
        leaves = {name: value.detach().requires_grad_() for name, value in fast.items()}
        # The fused kernel has no rule for vmap, which would run it task after task.
        with sdpa_kernel(SDPBackend.MATH):
            losses = torch.vmap(loss)(leaves, tokens)
        return dict(zip(fast, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))

    return vectorized if case.way == "PEFT, vmap" else in_turn


def serve(case: Case, gradient_path: Path) -> None:
    """Makes the gradients once and tells what that took; again for each further line of standard input."""
    is_gpu = case.device.startswith("cuda")
    if not is_gpu:
        keep_to_one_core()
    model = make_llama(case)
    gradients = by_peft(case, model) if case.way.startswith("PEFT") else by_metaloom(case, model)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        found = gradients()
        peak = torch.cuda.max_memory_allocated() / 2**20 - before
    else:
        found, peak, _ = peak_above(gradients)
    torch.save({name: value.cpu() for name, value in found.items()}, gradient_path)
    del found
    print(json.dumps({"peak_mib": peak}), flush=True)
    for _ in sys.stdin:
        gc.collect()
        started = time.perf_counter()
        gradients()
        if is_gpu:
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


# ---------------------------------------------------------------- the table


class Row:
    """A process that measures one case."""

    def __init__(self, case: Case, gradient_path: Path) -> None:
        self.case, self._gradient_path = case, gradient_path
        words = ["--row", json.dumps(dataclasses.asdict(case)), str(gradient_path)]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.task_batches", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        answer = self._answer()
        self.measured = Measured(answer.get("peak_mib", 0.0), [], failure=answer.get("failure"))

    def repeat(self) -> None:
        """Measures once more."""
        if self.measured.failure is None:
            assert self._process.stdin is not None
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
            self.measured.seconds.append(self._answer()["seconds"])

    def end(self, reference: Path) -> Measured:
        """What was measured, with the gradient's difference to another's."""
        self._process.communicate()
        if self.measured.failure is None:
            found, expected = (
                torch.cat([value.flatten().double() for value in torch.load(path).values()])
                for path in (self._gradient_path, reference)
            )
            self.measured.difference = float((found - expected).norm() / expected.norm())
        return self.measured

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        _, errors = self._process.communicate()
        return {"failure": (errors.strip().splitlines() or ["it ended without a word"])[-1]}


def measure_block(cases: list[Case], repeats: int) -> list[Measured]:
    """Cases whose repeats alternate."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.pt") for number in range(len(cases))]
        rows = [Row(case, path) for case, path in zip(cases, paths, strict=True)]
        for _ in range(repeats):
            for row in rows:
                row.repeat()
        return [row.end(paths[0]) for row in rows]


def table(cases: list[Case], found: list[Measured]) -> list[str]:
    """The lines of a block."""
    lines = []
    by_way = dict(zip((case.way for case in cases), found, strict=True))
    in_turn = by_way.get("PEFT, in turn")
    for case, measured in zip(cases, found, strict=True):
        start_of_line = f"{case.size:6} {case.num_tasks:3}  {case.way:16}"
        if measured.failure is not None:
            lines.append(f"{start_of_line}  {measured.failure}")
            continue
        sequences, length = SIZES[case.size]
        best = min(measured.seconds)
        ratio = f"{min(in_turn.seconds) / best:9.2f}" if in_turn and in_turn.seconds else f"{'':9}"
        lines.append(
            f"{start_of_line} {best:8.4f} {case.num_tasks * sequences * length / best:10.0f} {ratio} "
            f"{measured.peak_mib:9.1f} {measured.difference:11.1e}"
        )
    return lines


def main() -> None:
    """Measures all rows, or serves one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task_batches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        serve(Case(**json.loads(arguments.row[0])), Path(arguments.row[1]))
        return
    print(
        f"{'size':6} {'T':>3}  {'way':16} {'best s':>8} {'tokens/s':>10} {'/ in turn':>9} {'peak MiB':>9} "
        f"{'difference':>11}"
    )
    figures = []
    for size in arguments.sizes:
        for num_tasks in arguments.tasks:
            cases = [
                Case(way, num_tasks, size, arguments.model, arguments.device, arguments.compute)
                for way in WAYS
            ]
            found = measure_block(cases, arguments.repeats)
            print("\n".join(table(cases, found)), flush=True)
            figures += [
                {**dataclasses.asdict(case), **dataclasses.asdict(measured)}
                for case, measured in zip(cases, found, strict=True)
            ]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
