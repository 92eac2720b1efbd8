"""The benchmark beside other libraries, by itself: these are tests of the measuring, not of speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from benchmarks import hypergradients
from benchmarks.hypergradients import Block, Row, measure_block, relative_error, table
from benchmarks.peers import CONTENDERS, Contender, metaloom_
from benchmarks.peers.torch_task import TorchProblem, torch_problem, twice_differentiable
from benchmarks.row import First, Timing
from benchmarks.workloads import WORKLOADS, Array, draw

ROUNDING = 1e-12  # float64, on gradients of norm 1 to 10 through three inner steps


def maml_by_hand(torch_side: TorchProblem) -> dict[str, Array]:
    """MAML as a textbook has it, in plain autograd on the module that the peers are given."""
    names = [name for name, _ in torch_side.module.named_parameters()]
    initial = dict(zip(names, torch_side.module.parameters(), strict=True))
    total = torch.zeros((), dtype=torch.float64)

    def loss(fast: dict[str, torch.Tensor], examples: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with twice_differentiable():
            logits: torch.Tensor = functional_call(torch_side.module, fast, (examples[0],)).flatten(0, -2)
        chosen = logits.gather(1, examples[1].reshape(-1, 1)).squeeze(1)
        return (logits.logsumexp(1) - chosen).mean()

    for task in torch_side.tasks:
        fast: dict[str, torch.Tensor] = dict(initial)
        for _ in range(torch_side.num_steps):
            grads = torch.autograd.grad(loss(fast, task.support), list(fast.values()), create_graph=True)
            pairs = zip(fast.items(), grads, strict=True)
            fast = {name: value - torch_side.rate * grad for (name, value), grad in pairs}
        total = total + loss(fast, task.query)
    learned = torch_side.meta_parameters()
    gradient = torch.autograd.grad(total, list(learned.values()))
    return {name: value.numpy() for name, value in zip(learned, gradient, strict=True)}


@pytest.mark.parametrize("workload", ["tiny-conv4", "tiny-gpt", "tiny-lora"])
def test_metaloom_and_the_peers_module_state_the_same_problem(workload: str) -> None:
    found = metaloom_.prepare(draw(WORKLOADS[workload], 3, "float64"), "unrolled").hypergradient()
    expected = maml_by_hand(torch_problem(draw(WORKLOADS[workload], 3, "float64")))
    assert relative_error(found, expected) < ROUNDING
    # Every tensor by itself, too: a small one could be wrong and not be seen in the whole.
    assert max(relative_error({name: found[name]}, {name: expected[name]}) for name in expected) < 1e-10


def test_first_order_differs_on_every_tiny_workload() -> None:
    for workload in ("tiny-conv4", "tiny-gpt", "tiny-lora"):
        exact, approximate = (
            metaloom_.prepare(draw(WORKLOADS[workload], 3, "float64"), variant).hypergradient()
            for variant in ("unrolled", "first_order")
        )
        assert relative_error(approximate, exact) > 1e-3


def test_the_driver_prints_rows_whose_gradients_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--workload", "tiny-lora", "--steps", "2", "--repeats", "2", "--dtype", "float64"]
    contenders = ["metaloom/unrolled", "metaloom/mixed_mode"]
    hypergradients.main([*words, "--contenders", *contenders, "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    assert "tiny-lora, K = 2" in printed
    (block,) = json.loads((tmp_path / "figures.json").read_text())["blocks"]
    assert [row["contender"] for row in block["rows"]] == contenders
    for row in block["rows"]:
        assert row["contender"] in printed
        assert row["failure"] is None
        assert row["error"] < ROUNDING
        assert len(row["repeats"]) == 2
        assert row["first"]["timing"]["wall_s"] > 0.0


def test_a_row_that_fails_says_why_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "absent", Contender("x", "x", "x", ("no_such_library",)))
    # Known here and unknown in the process that measures, which therefore ends with a KeyError.
    monkeypatch.setitem(CONTENDERS, "broken", Contender("x", "x", "x", ("torch",)))
    names = ["absent", "broken", "metaloom/first_order"]
    block = measure_block("tiny-conv4", 1, names, dtype="float32", repeats=0, long_s=1.0)
    text = table(block)
    assert "not installed" in text
    assert "failed (KeyError: 'broken')" in text
    assert block.rows[2].first is not None


def test_ratios_are_to_the_fastest_peer() -> None:
    def row(name: str, wall_s: float, peak_mib: float) -> Row:
        return Row(name, First(Timing(wall_s, wall_s - 1.0), 0.0, peak_mib, True))

    rows = [row("metaloom/unrolled", 3.0, 50.0), row("higher", 2.0, 400.0), row("jax/reverse", 4.0, 100.0)]
    lines = table(Block("W2", 4, rows, "metaloom/unrolled")).splitlines()
    assert lines[2].split()[:7] == ["metaloom/unrolled", "3.000", "3.000", "1.50", "2.000", "50", "0.12"]
    assert lines[3].split()[:7] == ["higher", "2.000", "2.000", "1.00", "1.000", "400", "1.00"]
    assert lines[4].split()[:7] == ["jax/reverse", "4.000", "4.000", "2.00", "3.000", "100", "0.25"]


def test_relative_error_is_of_all_tensors_as_one_vector() -> None:
    expected = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    found = {"a": np.array([3.0, 0.3]), "b": np.array([[4.4]])}
    assert relative_error(found, expected) == pytest.approx(0.1)  # |(0.3, 0.4)| / |(3, 4)|
    with pytest.raises(ValueError, match="gradients of other tensors"):
        relative_error({"a": expected["a"]}, expected)
