"""A process that is measured: `python -m metaloom.planning.probe process|loopback`; prints one number."""

from __future__ import annotations

import argparse
import datetime
import importlib
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from metaloom.planning.here import LOOPBACK_BYTES, NUM_REPEATS, resident_bytes
from metaloom.tracking import make_tracker

REDUCE_TIMEOUT_S = 60.0


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m metaloom.planning.probe")
    parser.add_argument("what", choices=("process", "loopback"))
    parser.add_argument("--tracked", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(process(is_tracked=arguments.tracked) if arguments.what == "process" else loopback())


def process(*, is_tracked: bool) -> int:
    """Bytes of a process that has loaded what a rank does, and run each kind of kernel once."""
    importlib.import_module("metaloom.worker")
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    kernels = torch.randn(4, 3, 3, 3, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    # Convolution, product, attention and normalisation, differentiated once and twice.
    convolved = torch.nn.functional.conv2d(images, kernels).relu().mean()
    rows = torch.randn(1, 2, 64, 64, requires_grad=True)
    attended = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
    product = torch.nn.functional.gelu(torch.nn.functional.layer_norm(attended @ weight, (64,)))
    torch.autograd.grad(product.sum(), [weight, rows])
    (first,) = torch.autograd.grad(convolved, [kernels], create_graph=True)
    torch.autograd.grad(first.square().sum(), [kernels])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))], foreach=False)
    optimizer.step()
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(torch.zeros(2), torch.ones(2))  # type: ignore[no-untyped-call]
    if not is_tracked:
        return resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        tracker = make_tracker(
            "mlflow",
            Path(folder),
            rank=0,
            uri=None,
            experiment="plan",
            first_step=0,
            warn=lambda text: None,
        )
        tracker.start(run_name="plan", params={}, tags={}, resume_id=None)
        tracker.log({"loss": 0.0}, 0)
        tracker.finish("finished")
        return resident_bytes()


def loopback() -> float:
    """Bytes per second that each of two processes sends."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        answers: SimpleQueue[float] = context.SimpleQueue()
        ranks = [
            context.Process(target=_reduce, args=(rank, f"{folder}/store", answers)) for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        join_all(ranks)
        return float(answers.get())


def join_all(ranks: Sequence[BaseProcess]) -> None:
    """Waits for processes that wait for each other: when one fails, the others are ended.

    Raises:
        RuntimeError: one has failed.
    """
    running = list(ranks)
    while running:
        wait([rank.sentinel for rank in running])
        # Each is asked once: one that ends between two questions would count as neither running nor failed.
        codes = [rank.exitcode for rank in running]
        running = [rank for rank, code in zip(running, codes, strict=True) if code is None]
        if any(codes):
            for rank in running:
                rank.terminate()
                rank.join()
            raise RuntimeError("a process of the all-reduce over loopback failed")


def _reduce(rank: int, store: str, answers: SimpleQueue[float]) -> None:
    torch.set_num_threads(1)
    # Ends of itself, should there be no one left to end it.
    timeout = datetime.timedelta(seconds=REDUCE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    numbers = torch.ones(LOOPBACK_BYTES // 4)
    dist.all_reduce(numbers)
    started = time.perf_counter()
    for _ in range(NUM_REPEATS):
        dist.all_reduce(numbers)
    seconds = (time.perf_counter() - started) / NUM_REPEATS
    # Of two ranks each sends 2 (N - 1) / N = 1 times the numbers.
    if rank == 0:
        answers.put(LOOPBACK_BYTES / seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
