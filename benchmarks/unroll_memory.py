"""Peak memory and time of one hypergradient over K inner steps, by estimator: prints a table.

    python benchmarks/unroll_memory.py [--steps 1 4 16 64]

A four-layer GPT of width 128 with rank-8 LoRA, one task of 4 support and 4 query sequences of 128
bytes, float32, one thread. Every row is measured in a fresh process. Memory is the peak of the
resident set above what it was before the hypergradient, once the model is built and a forward pass
has been made.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.models.gpt import VOCABULARY, Gpt

LENGTH, NUM_SEQUENCES = 128, 4
ESTIMATORS = ("unrolled", "rematerialized", "mixed_mode", "first_order")


def measure(estimator: str, num_steps: int) -> tuple[float, float]:
    """(peak MiB above the model, seconds) of one hypergradient, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Gpt(num_layers=4, width=128, num_heads=4, context_length=LENGTH, tied_embeddings=True)
    model.requires_grad_(False)
    adapter = LoraAdapter(
        model, targets="all-linear", rank=8, alpha=8.0, generator=torch.Generator().manual_seed(0)
    )
    rates = Rates(0.1, "none", num_steps)
    unroll = Unroll(Learner(adapter, Precision()), Sgd(), rates, step_weights("last", num_steps))
    meta = adapter.meta_parameters(init=True, backbone=False)
    tokens = torch.randint(VOCABULARY, (2, 1, NUM_SEQUENCES, LENGTH + 1))
    support, query = ({"inputs": part[..., :-1], "targets": part[..., 1:]} for part in tokens)
    batch = TaskBatch((0,), support, query)
    with torch.no_grad():
        unroll.learner.losses("query", meta, unroll.learner.init(meta, 1), batch, 0)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s = time.perf_counter()
    HYPERGRADIENTS[estimator]().meta_gradient(unroll, meta, batch)
    seconds = time.perf_counter() - start_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak_kib - before_kib) / 1024, seconds


def main() -> None:
    """Prints the table, or one row's numbers where a row is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16, 64], metavar="K")
    parser.add_argument("--row", nargs=2, metavar=("ESTIMATOR", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        mib, seconds = measure(arguments.row[0], int(arguments.row[1]))
        print(mib, seconds)
        return
    print(f"{'estimator':16}" + "".join(f"{f'K = {k}':>20}" for k in arguments.steps))
    for estimator in ESTIMATORS:
        cells = []
        for num_steps in arguments.steps:
            command = [sys.executable, __file__, "--row", estimator, str(num_steps)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            mib, seconds = map(float, output.split())
            cells.append(f"{mib:8.0f} MiB {seconds:5.1f} s")
        print(f"{estimator:16}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
