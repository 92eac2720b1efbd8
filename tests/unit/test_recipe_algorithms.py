"""Rules about algorithms whose adaptation takes no steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from metaloom.errors import CapabilityError, RecipeError
from metaloom.recipe import load_recipe
from metaloom.recipe.schema import maml_of
from tests.commands import RECIPES

SMOKE, STDLIB = RECIPES / "smoke.yaml", RECIPES / "stdlib-lora.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adaptation.rule.learned=shared"],
            "adaptation.rule.learned: shared; has no effect, since algorithm.kind = protonet adapts without "
            "inner steps; set it to none",
        ),
        (
            ["adaptation.loss={learned: [temperature]}"],
            "adaptation.loss.learned: temperature; has no effect, since algorithm.kind = protonet",
        ),
        (
            ["memory.snapshots={kind: binomial, num_slots: 2}"],
            "memory.snapshots.kind: binomial; has no effect, since algorithm.kind = protonet",
        ),
        (["memory.head_chunk=8"], "memory.head_chunk: 8; has no effect, since algorithm.kind = protonet"),
        (
            ["sharding=sharded"],
            "sharding.kind: sharded; algorithm.kind = protonet computes with whole weights; set it to",
        ),
    ],
)
def test_what_has_no_effect_without_steps_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, ["algorithm=protonet", *overrides])


def test_an_algorithm_that_classifies_needs_classes() -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(STDLIB, ["algorithm=protonet"])
    message = str(raised.value)
    assert "algorithm.kind: protonet tells classes apart, and the tasks are language_modelling" in message
    assert "adaptation.rehearsal: given; has no effect" in message


def test_plan_and_check_name_algorithms_that_they_do_not_follow() -> None:
    with pytest.raises(
        CapabilityError, match=re.escape("algorithm.kind: protonet adapts without inner steps")
    ):
        maml_of(load_recipe(SMOKE, ["algorithm=protonet"]))
