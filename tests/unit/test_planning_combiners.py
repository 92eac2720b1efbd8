"""What a plan says of combiners that keep the gradients of single tasks."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from metaloom.planning.counting import count
from metaloom.planning.estimate import Layout, estimate
from metaloom.planning.facts import Facts
from metaloom.recipe import load_recipe
from tests.commands import RECIPES
from tests.unit.test_planning_estimate import HARDWARE


@functools.cache
def facts(combiner: str) -> Facts:
    recipe = load_recipe(
        RECIPES / "smoke.yaml", (f"outer.combiner={combiner}", "adaptation.rule.learned=per_tensor")
    )
    return count(recipe, with_shards=False, on_gpu=False)


def test_each_task_of_a_rank_is_stored_once() -> None:
    mean, surgery = facts("mean"), facts("pcgrad")
    assert (mean.stored_bytes, mean.micro_batch) == (0.0, None)
    assert (surgery.stored_bytes, surgery.micro_batch) == (surgery.own.gradients, 1)
    for num_ranks, num_tasks in ((1, 4), (2, 2)):
        found = estimate(surgery, HARDWARE, Layout("replicated"), num_ranks)
        without = estimate(
            dataclasses.replace(surgery, stored_bytes=0.0), HARDWARE, Layout("replicated"), num_ranks
        )
        added = found.memory.gradients - without.memory.gradients
        assert added == pytest.approx(num_tasks * surgery.own.gradients)
        assert (found.micro_batch, found.num_micro_batches) == (1, num_tasks)


def test_what_is_not_combined_is_not_stored() -> None:
    whole, rates = facts("pcgrad"), facts("{kind: pcgrad, of: [rates]}")
    assert 0.0 < rates.stored_bytes < whole.stored_bytes
    assert not rates.takes_turns
