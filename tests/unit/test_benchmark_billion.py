"""benchmarks/billion.py, tiny, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "billion.py"
MODEL = ["--layers", "2", "--width", "32", "--heads", "2", "--vocabulary", "64", "--rank", "2"]
TINY = ["--device", "cpu", *MODEL, "--length", "16", "--batch", "2", "--head-chunk", "10", "--matmul", "64"]


ROW = ("estimator", "recompute_blocks", "snapshots", "weights")


@pytest.fixture(scope="module")
def billion() -> ModuleType:
    spec = importlib.util.spec_from_file_location("billion", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["billion"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_has_every_estimator_and_the_exact_ones_agree_in_float64(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--steps", "2", "--rows", "9", "--compute", "float64", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, *options],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    header, sizes, *lines = done.stdout.splitlines()
    assert header.split()[:5] == ["K", "estimator", "blocks", "snapshots", "weights"]
    # 12 D^2 + 13 D in each of 2 blocks, 64 + 16 embeddings of width D, a last norm; LoRA has 16 D R a block.
    assert sizes == f"# {2 * (12 * 32**2 + 13 * 32) + 80 * 32 + 64:,} parameters, {2 * 16 * 32 * 2:,} of LoRA"
    rows = json.loads(figures.read_text())["rows"]
    assert [line.split()[:5] for line in lines] == [
        [
            str(row["num_steps"]),
            row["estimator"],
            "yes" if row["recompute_blocks"] else "no",
            row["snapshots"],
            row["weights"],
        ]
        for row in rows
    ]
    assert [tuple(row[name] for name in ROW) for row in rows] == [
        ("rematerialized", False, "all", "whole"),
        ("mixed_mode", False, "all", "whole"),
        ("unrolled", False, "none", "whole"),
        ("rematerialized", True, "all", "whole"),
        ("mixed_mode", True, "all", "whole"),
        ("rematerialized", True, "binomial", "whole"),
        ("first_order", False, "all", "whole"),
        ("rematerialized", True, "all", "shards"),
        ("mixed_mode", True, "all", "shards"),
    ]
    assert all(row["outcome"] == "measured" and row["is_finite"] for row in rows)
    exact = [row for row in rows if row["estimator"] != "first_order"]
    (first_order,) = (row for row in rows if row["estimator"] == "first_order")
    # float64 rounds at 1e-16; sums of some thousand terms lose less than three digits.
    assert all(row["difference"] < 1e-12 for row in exact)
    assert first_order["difference"] > 1e-3


def _one_row(billion: ModuleType, *options: str, weights: str = "whole") -> Any:
    settings = billion.parsed([*TINY, *options])
    row = billion.Row("rematerialized", 1, recompute_blocks=True, weights=weights)
    return billion.build_problem(settings, row, torch.device("cpu"))


@pytest.mark.parametrize("where", ["whole", "shards"])
def test_in_half_precision_the_frozen_matrices_alone_are_stored_in_it(
    billion: ModuleType, where: str
) -> None:
    problem = _one_row(billion, weights=where)
    adapter = problem.unroll.learner.adapter
    weights = adapter._shards.values if where == "shards" else dict(adapter._model.named_parameters())
    half = {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
    layers = ("attention.qkv", "attention.proj", "mlp.fc_in", "mlp.fc_out")
    linear = {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert half == linear | {"token_embedding.weight"}
    assert {value.dtype for value in problem.meta.values()} == {torch.float32}


def test_the_formula_counts_the_products_of_a_forward_pass_with_half_of_the_attention(
    billion: ModuleType,
) -> None:
    problem = _one_row(billion, "--compute", "float32")
    model, tokens = problem.unroll.learner.adapter._model, problem.batch.query["inputs"][0]
    with billion.FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens)
    lora = 2 * sum(value.numel() for value in problem.meta.values())
    half_attention = 2 * 16 * 32 * 2  # 2 products of L D for each of 2 layers, half of 2 FLOPs per pair
    assert counter.total == (problem.flops_per_token - lora + half_attention) * tokens.numel()
    assert problem.flops("rematerialized", 3) == problem.flops_per_token * tokens.numel() * (6 * 3 + 2)
    assert problem.flops("unrolled", 3) == problem.flops_per_token * tokens.numel() * (4 * 3 + 2)


def _outcomes(billion: ModuleType, settings: Any, folder: Path) -> dict[tuple[Any, ...], str]:
    return {
        (row["estimator"], row["recompute_blocks"], row["snapshots"], row["num_steps"]): row["outcome"]
        for row in billion.run_table(settings, [], folder)
    }


def test_after_running_out_of_memory_no_larger_k_of_that_configuration_is_tried(
    billion: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def stub(row: Any, *_: Any) -> dict[str, Any]:
        tried.append(row)
        return {"outcome": "out of memory" if row.estimator == "unrolled" and row.num_steps > 4 else "tried"}

    monkeypatch.setattr(billion, "in_fresh_process", stub)
    outcomes = _outcomes(billion, billion.parsed([*TINY, "--steps", "4", "16", "64"]), tmp_path)
    assert outcomes["unrolled", False, "none", 16] == "out of memory"
    assert outcomes["unrolled", False, "none", 64] == "not tried: out of memory at a smaller K"
    assert outcomes["unrolled", True, "none", 16] == "out of memory"
    assert outcomes["rematerialized", False, "all", 64] == "tried"
    assert billion.Row("unrolled", 64, False, "none") not in tried


def test_rows_beyond_the_budget_are_skipped_and_say_so(
    billion: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcomes = _outcomes(billion, billion.parsed([*TINY, "--budget-s", "0"]), tmp_path)
    assert outcomes
    assert all(outcome.startswith("skipped: ") for outcome in outcomes.values())
    assert "0 s are left of the budget" in capsys.readouterr().out


def test_a_gpu_has_rows_with_snapshots_in_host_memory_and_no_row_comes_twice(billion: ModuleType) -> None:
    rows = billion.planned([64, 4, 16], has_host_memory=True)
    assert len(set(rows)) == len(rows)
    assert (rows[0].num_steps, rows[3].num_steps) == (4, 64)
    assert {row.snapshots for row in rows} == {"all", "none", "binomial", "host"}
    assert "host" not in {row.snapshots for row in billion.planned([4], has_host_memory=False)}
