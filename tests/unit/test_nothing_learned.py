"""What a recipe asks to be learned, where the model's own parameters decide whether it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from metaloom.build import Choices, build_algorithm, build_model
from metaloom.engine.algorithms.feed_forward import together
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError
from metaloom.recipe import load_recipe
from tests.commands import RECIPES

CPU = torch.device("cpu")
ALL_OF_IT = 'adaptation.fast={kind: part, parameters: ["*"], tasks: loop}'
HEAD_OF_IT = 'adaptation.fast={kind: part, parameters: ["head.*"]}'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([HEAD_OF_IT, "adaptation.head.init=zero"], "algorithm.meta_parameters: nothing is learned"),
        (
            [ALL_OF_IT, "algorithm.meta_parameters={init: false, backbone: true}"],
            "algorithm.meta_parameters: nothing is learned",
        ),
        (
            [ALL_OF_IT, "algorithm.meta_parameters.backbone=true"],
            "algorithm.meta_parameters.backbone: given; has no effect, since adaptation.fast adapts every",
        ),
        (
            [HEAD_OF_IT, "adaptation.head.first_steps=1", "adaptation.num_steps=2"],
            "adaptation.head.first_steps: has no effect, since adaptation.fast adapts nothing but the head",
        ),
    ],
)
def test_what_is_not_there_cannot_be_learned(overrides: Sequence[str], message: str) -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml", ["algorithm.hypergradient=unrolled", *overrides])
    model = build_model(recipe, CPU, Replicated())
    with pytest.raises(CapabilityError, match=re.escape(message)):
        build_algorithm(recipe, model, Choices(), CPU)


@pytest.mark.parametrize("padded", ["support", "query"])
def test_examples_of_numbers_lie_together_where_one_part_is_padded(padded: str) -> None:
    def part(name: str, count: int) -> dict[str, torch.Tensor]:
        values = {"inputs": torch.randn(2, count, 3), "targets": torch.randn(2, count, 4)}
        return values | ({"weights": torch.tensor([[1.0] * count] * 2)} if name == padded else {})

    inputs, weights, num_support = together(TaskBatch((0, 1), part("support", 5), part("query", 2)))
    assert inputs.shape == (2, 7, 3)
    assert weights is not None
    assert torch.equal(weights, torch.ones(2, 7))
    assert num_support == 5
