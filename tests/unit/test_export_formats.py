"""Which formats can hold a run's result, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metaloom.build import Choices, build_algorithm, build_model
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError, CheckpointError
from metaloom.export import gpt2, load, load_backbone, peft
from metaloom.export.card import Card, read_card, write_card
from metaloom.export.formats import default_format, possible_formats, require_format
from metaloom.export.huggingface import merged
from metaloom.export.peft import short_names
from metaloom.export.tensors import write_tensors
from metaloom.export.trained import Trained, rebuilt
from metaloom.models.gpt import Gpt
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES

LORA = RECIPES / "stdlib-lora.yaml"
SMOKE = RECIPES / "smoke.yaml"
TINY = "model={kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 64}"
TEXT_CLASSES = (
    "pretrain=null",
    "adaptation.rehearsal=null",
    "data={kind: classes, url: x, inputs: {kind: text, length: 12}, n_way: 2, n_shot: 1, n_query: 1}",
)


@pytest.mark.parametrize(
    ("path", "overrides", "formats"),
    [
        (LORA, (), ["peft", "huggingface", "safetensors", "mlflow"]),
        (LORA, TEXT_CLASSES, ["peft", "safetensors", "mlflow"]),
        (LORA, ("adaptation.fast=soft_prompt", "data.sequence_length=32"), ["safetensors", "mlflow"]),
        (LORA, ("adaptation.fast={kind: full, tasks: loop}",), ["safetensors", "huggingface", "mlflow"]),
        (LORA, ("adaptation.fast=norm_bias",), ["safetensors", "huggingface", "mlflow"]),
        (SMOKE, (), ["safetensors", "mlflow"]),
        (SMOKE, ("algorithm=protonet",), ["safetensors"]),
    ],
)
def test_the_formats_of_a_recipe(path: Path, overrides: tuple[str, ...], formats: list[str]) -> None:
    recipe = load_recipe(path, overrides)
    assert possible_formats(recipe) == formats
    assert default_format(recipe) == formats[0]


@pytest.mark.parametrize(
    ("path", "overrides", "name", "message"),
    [
        (LORA, ("adaptation.fast=norm_bias",), "peft", "adaptation.fast is norm_bias"),
        (SMOKE, ("algorithm=protonet",), "peft", "algorithm.kind: protonet has no fast weights"),
        (SMOKE, ("algorithm=protonet",), "mlflow", "depends on a task's support data"),
        (LORA, TEXT_CLASSES, "huggingface", "head for classification has a bias"),
        (
            LORA,
            ("adaptation.fast=soft_prompt", "data.sequence_length=32"),
            "huggingface",
            "adaptation.fast: soft_prompt adapts what is no weight",
        ),
    ],
)
def test_a_format_that_cannot_hold_a_result_names_those_that_can(
    path: Path, overrides: tuple[str, ...], name: str, message: str
) -> None:
    recipe = load_recipe(path, overrides)
    with pytest.raises(
        CapabilityError, match=rf"--format {name}: .*{message}.*can be written as .*safetensors"
    ):
        require_format(recipe, name, merge=False)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_of_transformers_is_our_gpt_in_float64(tied: bool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = Gpt(num_layers=2, width=12, num_heads=3, context_length=10, tied_embeddings=tied, dropout=0.1)
    model = model.double().requires_grad_(False).train(False)
    for value in model.parameters():
        value.add_(0.3 * torch.randn_like(value))
    config = gpt2.config(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", gpt2.tensors(dict(model.named_parameters())))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)  # which is in eval mode
    tokens = torch.randint(0, 256, (3, 10))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0.0, atol=1e-12)


def test_names_of_layers_are_short_where_they_mean_no_other_module() -> None:
    assert short_names(["a.0.qkv", "a.1.qkv"], ["a", "a.0", "head"]) == ["qkv"]
    assert short_names(["a.0.qkv"], ["a.1.qkv", "head"]) == ["a.0.qkv"]


def trained(*overrides: str) -> Trained:
    """A tiny language model with a LoRA initialisation, as it starts."""
    recipe: Recipe = load_recipe(LORA, (TINY, "adaptation.rule.learned=shared", *overrides))
    model = build_model(recipe, torch.device("cpu"), Replicated())
    meta = build_algorithm(recipe, model, Choices(), torch.device("cpu")).meta_parameters()
    return rebuilt(recipe, 1, model.values(), meta)


def test_a_tied_weight_is_not_merged_into() -> None:
    assert merged(trained()).keys() == trained().weights().keys()
    with pytest.raises(CapabilityError, match=r"--merge: head.weight is one weight of several layers"):
        merged(trained("adaptation.fast.targets=[head]"))


def test_a_backbone_that_is_a_file_of_the_recipes_is_not_written_again(tmp_path: Path) -> None:
    torch.manual_seed(5)
    like = trained().module
    write_tensors(tmp_path / "own.safetensors", dict(like.named_parameters()))
    result = trained("pretrain=null", f"model.weights={tmp_path / 'own.safetensors'}")
    recipe = load_recipe(LORA, ("pretrain=null", TINY, f"model.weights={tmp_path / 'own.safetensors'}"))
    (tmp_path / "peft").mkdir()
    peft.write(result, Card(recipe, 1), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "own.safetensors")
    assert not (tmp_path / "peft" / "backbone").exists()
    for name, value in load_backbone(tmp_path / "peft").named_parameters():
        torch.testing.assert_close(value, like.get_parameter(name), rtol=0.0, atol=0.0)


def test_a_card_reads_back_without_secrets_and_refuses_what_is_none(tmp_path: Path) -> None:
    recipe = load_recipe(LORA, ("tracking.uri=http://host:5000",))
    write_card(Card(recipe, 3, {"loss": 1.0}), tmp_path, kind="peft", loading=("x",))
    card = read_card(tmp_path, kind="peft")
    assert (card.step, card.metrics, card.recipe.model) == (3, {"loss": 1.0}, recipe.model)
    assert "host:5000" not in (tmp_path / "card.json").read_text()
    with pytest.raises(CheckpointError, match="is an export of format peft, and safetensors is read here"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no export of metaloom \(card.json is missing\)"):
        load_backbone(tmp_path / "none")
    values = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2 is not known; this release reads"):
        load_backbone(tmp_path)
