"""The benchmarks of task-batched LoRA and of long unrolls: tests of the measuring, not of speed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import long_unrolls, task_batches
from benchmarks.task_batches import WAYS, Case, by_metaloom, by_peft, make_llama, measure_block, table


# PEFT asks transformers by a name that is to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_way_gives_the_gradients_of_every_other() -> None:
    cases = [Case(way, 3, "small", "tiny", "cpu", "float32") for way in WAYS]
    first = None
    for case in cases:
        make = by_peft if case.way.startswith("PEFT") else by_metaloom
        found = make(case, make_llama(case))()
        first = first or found
        for name, value in first.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_rows_are_measured_in_processes_and_a_failure_is_a_row() -> None:
    cases = [Case("one pass", 2, "small", "tiny", device, "float32") for device in ("cpu", "nothing")]
    good, bad = measure_block(cases, 2)
    assert len(good.seconds) == 2
    assert good.difference == 0.0
    assert bad.failure is not None
    assert "nothing" in bad.failure
    shown, failed = table(cases, [good, bad])
    assert shown.startswith("small    2  one pass")
    assert failed.endswith(bad.failure)


def test_long_unrolls_are_of_the_recipe_with_as_many_steps() -> None:
    path = long_unrolls.REPOSITORY / "recipes" / "stdlib-lora.yaml"
    for way in long_unrolls.WAYS:
        recipe = long_unrolls.recipe_of(path, way, 3)
        assert (recipe.adaptation.num_steps, recipe.precision.compute) == (3, "bfloat16")
    batch = long_unrolls.batch_of(recipe)
    assert batch.rehearsal is not None
    assert batch.support["inputs"].shape == (4, 8, 64)
    assert batch.rehearsal["inputs"].shape == (4, 3, 64)
    long_unrolls.hypergradient(long_unrolls.recipe_of(path, "mixed_mode, binomial", 2))


def test_a_tiny_block_has_every_size() -> None:
    assert task_batches.tokens_of(Case("one pass", 2, "large", "tiny", "cpu", "float32")).shape == (2, 8, 129)
