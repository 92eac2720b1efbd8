"""From recipes to learners that are given the support set, and to language models that have it in context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaloom.build import Choices, build_algorithm, build_in_context, build_model
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.in_context import InContext
from metaloom.engine.algorithms.neural_process import NeuralProcess
from metaloom.engine.algorithms.set_learner import SetLearner
from metaloom.engine.losses import CrossEntropy, MeanSquaredError
from metaloom.engine.sharding.replicated import Replicated
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES

CPU = torch.device("cpu")
REGRESSION = """\
name: waves
model: {kind: mlp, width: 5}
data: {kind: groups, url: waves, inputs: {kind: array, shape: [3]}, targets: {kind: number, num_targets: 2},
  num_support: 3, num_query: 2}
adaptation: {fast: full, rule: {kind: sgd, lr: 0.01}, num_steps: 1}
outer: {num_steps: 1, tasks_per_step: 1}
"""


def built(recipe: Recipe) -> Algorithm:
    return build_algorithm(recipe, build_model(recipe, CPU, Replicated()), Choices(), CPU)


def network_of(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in meta.items() if name.startswith("network.")}


@pytest.mark.parametrize(
    ("section", "name", "shape"),
    [
        # Features of an example: 8 of the convolutional network; 3 classes.
        ("{kind: cnp, width: 6, num_layers: 2}", "network.decoder.2.weight", (3, 6)),
        ("{kind: attention_learner, width: 8, num_layers: 2}", "network.blocks.1.query.weight", (8, 8)),
        ("{kind: recurrent_learner, width: 6, num_layers: 2}", "network.cells.0.weight_ih", (24, 11)),
    ],
)
def test_a_classifier_has_the_widths_of_its_section_and_weights_of_its_seed(
    section: str, name: str, shape: tuple[int, ...]
) -> None:
    overrides = [f"algorithm={section}", "precision.compute=float64"]
    learner = built(load_recipe(RECIPES / "smoke.yaml", overrides))
    assert isinstance(learner, SetLearner)
    assert learner.criterion == CrossEntropy()
    meta = learner.meta_parameters()
    assert meta[name].shape == shape
    assert {value.dtype for value in meta.values()} == {torch.float64}
    assert "backbone.blocks.0.conv.weight" in meta
    again = built(load_recipe(RECIPES / "smoke.yaml", overrides)).meta_parameters()
    other = built(load_recipe(RECIPES / "smoke.yaml", [*overrides, "seed=1"])).meta_parameters()
    assert all(torch.equal(value, again[key]) for key, value in meta.items())
    assert not torch.equal(meta[name], other[name])


def test_the_network_and_the_model_begin_with_other_numbers() -> None:
    # The same layer in both: only the seeds make them differ.
    recipe = load_recipe(RECIPES / "smoke.yaml", ["algorithm=recurrent_learner"])
    first = network_of(built(recipe).meta_parameters())["network.cells.0.weight_ih"]
    torch.manual_seed(recipe.seed)
    same_seed = torch.nn.LSTMCell(8 + 3, 128).weight_ih
    assert not torch.equal(first, same_seed)


@pytest.mark.parametrize("kind", ["cnp", "attention_learner", "recurrent_learner"])
def test_a_regression_has_as_many_outputs_as_targets(kind: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(REGRESSION)
    learner = built(load_recipe(tmp_path / "recipe.yaml", [f"algorithm={kind}"]))
    meta = learner.meta_parameters()
    if kind == "cnp":
        assert isinstance(learner, NeuralProcess)
        assert meta["network.encoder.0.weight"].shape == (128, 5 + 2)
        assert meta["network.decoder.4.weight"].shape == (2 * 2, 128)
        assert learner.metric_names == ("loss_after", "log_likelihood_after")
    else:
        assert isinstance(learner, SetLearner)
        assert learner.criterion == MeanSquaredError()
        assert meta["network.head.weight"].shape == (2, 128)


def test_a_language_model_is_shown_what_fits() -> None:
    overrides = ["data.sequence_length=20", "adaptation.rule.learned=none", "outer.lr_rates=null"]
    recipe = load_recipe(
        RECIPES / "stdlib-lora.yaml", ["algorithm=in_context", "adaptation.rehearsal=null", *overrides]
    )
    model = build_model(recipe, CPU, Replicated())
    learner = build_algorithm(recipe, model, Choices(), CPU)
    assert isinstance(learner, InContext)
    assert learner.num_shown == 2
    assert learner.meta_parameters().keys() == {f"backbone.{name}" for name in model.values()}
    assert build_in_context(recipe, model) == learner
