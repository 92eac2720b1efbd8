"""Rules about symmetries that are learned, and about the networks of one layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from metaloom.build import Choices, build_adapter, build_model
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import RecipeError
from metaloom.recipe import (
    ConvolutionLayer,
    DenseSymmetry,
    KroneckerSymmetry,
    MSRFast,
    Recipe,
    SingleLayerModel,
    load_recipe,
)
from tests.commands import RECIPES

SMOKE = RECIPES / "smoke.yaml"
GROUPS = """
name: tiny
model: {kind: single_layer, layer: convolution}
data:
  kind: groups
  url: data/somewhere
  inputs: {kind: array, shape: [10]}
  targets: {kind: number, num_targets: 8}
  num_support: 1
  num_query: 2
adaptation:
  fast: {kind: msr, symmetry: {kind: dense, rank: 3}}
  rule: {kind: sgd, lr: 0.1}
  num_steps: 1
algorithm: {kind: maml, meta_parameters: {backbone: true}}
outer: {num_steps: 2, tasks_per_step: 2}
"""


def load(folder: Path, *overrides: str) -> Recipe:
    path = folder / "tiny.yaml"
    path.write_text(GROUPS, encoding="utf-8")
    return load_recipe(path, overrides)


def test_a_symmetry_has_the_authors_start_and_all_layers_by_default(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.model == SingleLayerModel(layer=ConvolutionLayer(kernel_size=3), bias=False)
    assert recipe.adaptation.fast == MSRFast(
        symmetry=DenseSymmetry(rank=3, std=0.01), layers="all", tasks="auto"
    )
    fast = load(tmp_path, "adaptation.fast={kind: msr, symmetry: kronecker, layers: [layer]}").adaptation.fast
    assert fast == MSRFast(symmetry=KroneckerSymmetry(), layers=("layer",))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.meta_parameters.backbone=false"],
            "algorithm.meta_parameters.backbone: false; under adaptation.fast.kind = msr it is the symmetry, "
            "which is what msr is there to learn; set it to true",
        ),
        (
            ["adaptation.fast.layers=[layer, layer]"],
            "adaptation.fast.layers: 'layer' is listed twice; list it once",
        ),
        (
            ["model.weights=some.safetensors"],
            "model.weights: given; adaptation.fast.symmetry = dense makes the weights of layers from random "
            "numbers; set it to kronecker, which starts at the weights, or model.weights to null",
        ),
        (
            ["sharding=sharded", "memory.recompute_blocks=true"],
            "sharding.kind: sharded divides the weights that tasks share, and with adaptation.fast.kind = "
            "msr every task has a whole copy of all weights; set sharding.kind to replicated, or "
            "adaptation.fast to lora",
        ),
        (
            ["memory.recompute_blocks=true"],
            "memory.recompute_blocks: True; has no effect, since model.kind = single_layer has neither "
            "blocks nor a head apart from them; leave it out",
        ),
        (["memory.head_chunk=4"], "memory.head_chunk: 4; has no effect, since model.kind = single_layer"),
        (
            ["data.targets={kind: class, num_classes: 8}"],
            "model.kind: single_layer is for targets that are numbers, and the tasks are classification; "
            "take another, for example mlp",
        ),
        (
            [
                "adaptation.rehearsal={data: {kind: classes, url: x, num_classes: 2, "
                "inputs: {kind: array, shape: [10]}}}"
            ],
            "adaptation.rehearsal: given; model.kind = single_layer has one output, that of the tasks; set "
            "it to null",
        ),
        (
            ["model.layer={kind: locally_connected}", "data.inputs.shape=[1, 4, 4]"],
            "model.layer.kind: locally_connected reads inputs of [length] or [channels, length], and the "
            "data give [1, 4, 4]; take another",
        ),
        (
            ["data.inputs.shape=[1, 4, 4, 4]"],
            "model.layer.kind: convolution reads inputs of [length] or [channels, length] or [channels, "
            "height, width], and the data give [1, 4, 4, 4]; take another",
        ),
        (
            ["model.layer={kind: convolution, kernel_size: 5}", "data.inputs.shape=[20, 4, 6]"],
            "model.layer.kernel_size: 5; must be at most the shortest side of the inputs, 4",
        ),
        (
            ["data.targets.num_targets=9"],
            "model.layer.kernel_size: 3; leaves 8 places, and each output channel gives one number for each: "
            "targets have 9, which is no multiple",
        ),
        (
            ["model.layer=linear", "adaptation.fast={kind: lora, rank: 1}"],
            "adaptation.fast.targets: all-linear; leaves the output head out, and model.kind = single_layer "
            "has no other linear layer; set it to [layer], or adaptation.fast to full",
        ),
        (
            ["adaptation.fast={kind: lora, rank: 1, targets: [layer]}"],
            "adaptation.fast.kind: lora; adapts linear layers, and model.kind = single_layer has none here",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(tmp_path, *overrides)


def test_a_single_linear_layer_may_have_a_low_rank_adapter(tmp_path: Path) -> None:
    recipe = load(tmp_path, "model.layer=linear", "adaptation.fast={kind: lora, rank: 1, targets: [layer]}")
    model = build_model(recipe, torch.device("cpu"), Replicated())
    fast = build_adapter(recipe, model, Choices()).init({}, 1)
    assert {name: tuple(value.shape) for name, value in fast.items()} == {
        "layer.lora_a": (1, 1, 10),
        "layer.lora_b": (1, 8, 1),
    }


def test_a_linear_layer_takes_any_shape(tmp_path: Path) -> None:
    load(tmp_path, "model.layer=linear", "data.inputs.shape=[2, 3, 4, 5]", "data.targets.num_targets=7")


def test_nothing_is_learned_of_a_symmetry_without_inner_steps() -> None:
    message = "adaptation.fast.kind: msr; learns no symmetry, since algorithm.kind = protonet; set it to full"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, ["adaptation.fast={kind: msr, symmetry: kronecker}", "algorithm=protonet"])


def test_vmap_recomputes_nothing_under_a_symmetry_either() -> None:
    with pytest.raises(RecipeError, match=re.escape("memory.recompute_blocks: True; adaptation.fast.tasks")):
        load_recipe(
            SMOKE,
            [
                "adaptation.fast={kind: msr, symmetry: kronecker, tasks: vmap}",
                "algorithm.meta_parameters.backbone=true",
                "memory.recompute_blocks=true",
            ],
        )
