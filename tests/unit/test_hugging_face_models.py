"""Models of transformers from folders: their weights, and what a recipe may say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)

from metaloom.build import build_model, model_structure
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Sharded
from metaloom.errors import CapabilityError, CheckpointError, RecipeError
from metaloom.recipe import HuggingFaceModel, Recipe, recipe_from_dict
from metaloom.recipe.tasks import vocabulary
from metaloom.weights import HeldModel
from tests.numerics.hugging_face_problems import CASES, NUM_CLASSES, examples

CPU = torch.device("cpu")
CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "feature-extraction": AutoModel,
}
DATA: dict[str, dict[str, Any]] = {
    "causal-lm": {"kind": "documents", "num_support": 1, "num_query": 1, "sequence_length": 6},
    "sequence-classification": {
        "kind": "classes",
        "inputs": {"kind": "text", "length": 6},
        "n_way": NUM_CLASSES,
        "n_shot": 1,
        "n_query": 1,
    },
    "image-classification": {
        "kind": "classes",
        "inputs": {"kind": "image", "size": 8, "channels": 1},
        "n_way": NUM_CLASSES,
        "n_shot": 1,
        "n_query": 1,
    },
}
either = pytest.mark.parametrize("sharding", [Replicated(), Sharded(CPU)], ids=["whole", "shards"])
all_cases = pytest.mark.parametrize("case", [case for case in CASES if "features" not in case])


def recipe_of(folder: Path, task: str, *, seed: int = 0, **model: Any) -> Recipe:
    config = folder / "config.json"
    if task == "feature-extraction":
        is_of_images = config.is_file() and "num_channels" in config.read_text()
        data = DATA["image-classification" if is_of_images else "sequence-classification"]
    else:
        data = DATA[task]
    values = {
        "name": "x",
        "seed": seed,
        "model": {"hf": str(folder), "task": task, **model},
        "data": data | {"url": "data/x"},
        "adaptation": {"fast": "lora", "rule": {"kind": "sgd", "lr": 0.1}, "num_steps": 1},
        "outer": {"num_steps": 1, "tasks_per_step": 1, "optimizer": {"kind": "adam", "lr": 0.01}},
    }
    return recipe_from_dict(values, source="here")


def saved(folder: Path, config: PretrainedConfig, kind: Any) -> dict[str, Tensor]:
    """What `from_pretrained` reads of a folder that a model is written to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = kind.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    read = kind.from_pretrained(folder)
    return {name: value.detach() for name, value in read.named_parameters()}


def built(
    folder: Path, task: str, sharding: Replicated | None = None, *, seed: int = 0, **model: Any
) -> HeldModel:
    return build_model(recipe_of(folder, task, seed=seed, **model), CPU, sharding or Replicated())


@either
@all_cases
def test_weights_are_those_that_from_pretrained_reads(
    case: str, sharding: Replicated, tmp_path: Path
) -> None:
    config, task = CASES[case]
    config.num_labels = NUM_CLASSES
    expected = saved(tmp_path, config, CLASSES[task])
    held = built(tmp_path, task, sharding)
    found = held.values()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@all_cases
def test_outputs_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    config, task = CASES[case]
    config.num_labels = NUM_CLASSES
    saved(tmp_path, config, CLASSES[task])
    model = CLASSES[task].from_pretrained(tmp_path).eval()
    inputs = examples(case, 1, 3, seed=0)["inputs"][0]
    if task == "image-classification":
        expected = model(pixel_values=inputs.float()).logits
    elif task == "causal-lm":
        expected = model(input_ids=inputs).logits
    else:
        # Each text by itself and without padding.
        texts = [row[row >= 0][None] for row in inputs]
        model.config.pad_token_id = None
        expected = torch.cat([model(input_ids=text).logits for text in texts])
    found = built(tmp_path, task).module(inputs.float() if task == "image-classification" else inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("case", ["BERT, features", "Llama, features", "ViT, features"])
def test_features_are_read_of_a_folder_with_any_head(case: str, sharding: Replicated, tmp_path: Path) -> None:
    config, task = CASES[case]
    base = saved(tmp_path, config, AutoModel)
    held = built(tmp_path, task, sharding)
    found = held.values()
    assert {name for name in base if "pooler" not in name} == found.keys() - {"head.weight", "head.bias"}
    for name in found.keys() & base.keys():
        assert torch.equal(found[name], base[name]), name
    assert not found["head.bias"].any()
    with_head = CASES[case.partition(",")[0]][1]
    saved(tmp_path, config, CLASSES[with_head])
    assert built(tmp_path, task, sharding).values().keys() == found.keys()


@pytest.mark.parametrize("pooling", [None, "mean", "first", "last"])
@pytest.mark.parametrize("case", ["BERT, features", "Llama, features", "ViT, features"])
def test_features_are_the_last_layers_vectors(case: str, pooling: str | None, tmp_path: Path) -> None:
    config, task = CASES[case]
    saved(tmp_path, config, AutoModel)
    model = AutoModel.from_pretrained(tmp_path).eval()
    module = built(tmp_path, task, pooling=pooling).module
    inputs = examples(case, 1, 3, seed=0)["inputs"][0]
    if case.startswith("ViT"):
        hidden = list(model(pixel_values=inputs.float()).last_hidden_state)
    else:
        # Each text by itself and without padding.
        hidden = [model(input_ids=row[row >= 0][None]).last_hidden_state[0] for row in inputs]
    place = {"first": 0, "last": -1}
    features = torch.stack(
        [each[place[pooling]] if pooling in place else each.mean(dim=0) for each in hidden]
    )
    head = module.get_submodule("head")
    found = module(inputs.float() if case.startswith("ViT") else inputs)
    torch.testing.assert_close(found, head(features), rtol=1e-5, atol=1e-6)


def test_images_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    config, task = CASES["ViT"]
    config.num_labels = NUM_CLASSES
    saved(tmp_path, config, CLASSES[task])
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = CLASSES[task].from_pretrained(tmp_path).eval()
    for says, pixels in (
        ({"image_mean": [0.3], "image_std": [0.5], "do_normalize": True}, (images - 0.3) / 0.5),
        ({"image_mean": [0.3], "image_std": [0.5], "do_normalize": False}, images),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        found = built(tmp_path, task).module(images)
        torch.testing.assert_close(found, model(pixel_values=pixels).logits, rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("case", ["GPT-2, classes", "Llama, classes", "BERT", "ViT"])
def test_a_new_head_is_drawn_from_the_seed_beside_the_folders_weights(
    case: str, sharding: Replicated, tmp_path: Path
) -> None:
    config, task = CASES[case]
    base = saved(tmp_path, config, AutoModel)
    held = built(tmp_path, task, sharding)
    head = model_structure(held.module).head
    assert isinstance(head, str)
    found = held.values()
    new = {name: value for name, value in found.items() if name.startswith(f"{head}.")}
    assert new
    shared = {name.partition(".")[2]: name for name in found.keys() - new.keys()}
    assert shared.keys() == {name for name in base if case != "ViT" or "pooler" not in name}
    for name, own in shared.items():
        assert torch.equal(found[own], base[name]), own
    again = built(tmp_path, task).values()
    other = built(tmp_path, task, seed=1).values()
    for name, value in new.items():
        assert torch.equal(value, again[name])
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            assert 0.2 < float(value.std()) / config.initializer_range < 2.0


def test_random_weights_need_a_configuration_alone(tmp_path: Path) -> None:
    config, task = CASES["Qwen"]
    config.save_pretrained(tmp_path)
    one, again, other = (
        build_model(recipe_of(tmp_path, task, seed=seed, start="random"), CPU, Replicated()).values()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_weights_of_another_model_than_the_configuration_has_are_refused(tmp_path: Path) -> None:
    config, task = CASES["Llama"]
    saved(tmp_path, config, AutoModelForCausalLM)
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_hidden_layers"], values["layer_types"] = 3, None
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError,
        match=r"model\.hf: the weights in .* are of another model than its config\.json \(9 differences\):\n"
        r"  model\.layers\.2\.self_attn\.q_proj\.weight: in the model, not in the files",
    ):
        built(tmp_path, task)


def test_weights_that_are_put_together_when_they_are_read_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        num_local_experts=2,
        vocab_size=23,
    )
    saved(tmp_path, config, AutoModelForCausalLM)
    with pytest.raises(CheckpointError, match="is stored in another layout than MixtralForCausalLM has"):
        built(tmp_path, "causal-lm")


NUMBERS = {
    "kind": "groups",
    "url": "data/x",
    "inputs": {"kind": "text", "length": 6},
    "targets": {"kind": "number", "num_targets": 2},
    "num_support": 2,
    "num_query": 2,
}


def test_features_tell_numbers_and_classifiers_do_not(tmp_path: Path) -> None:
    config, task = CASES["BERT, features"]
    saved(tmp_path, config, AutoModel)
    values = recipe_of(tmp_path, task).model_dump(mode="json") | {"data": NUMBERS}
    recipe = recipe_from_dict(values, source="here")
    tokens = torch.tensor([[1, 2, 3], [4, -1, -1], [-1, -1, -1]])  # one has nothing in it
    outputs = build_model(recipe, CPU, Replicated()).module(tokens)
    assert outputs.shape == (3, 2)
    assert outputs.isfinite().all()
    for other in ("sequence-classification", "causal-lm"):
        values["model"]["task"] = other
        with pytest.raises(RecipeError, match=rf"model\.task: {other} tells .*set it to feature-extraction"):
            recipe_from_dict(values, source="here")
    values = recipe_of(tmp_path, "causal-lm").model_dump(mode="json")
    values["model"]["task"] = task
    with pytest.raises(RecipeError, match=r"the tasks are language_modelling; set it to causal-lm"):
        recipe_from_dict(values, source="here")
    values = recipe_of(tmp_path, "sequence-classification").model_dump(mode="json")
    values["adaptation"]["fast"] = {"kind": "soft_prompt", "num_tokens": 2}
    with pytest.raises(RecipeError, match=r"model\.task is sequence-classification, which may be read at"):
        recipe_from_dict(values, source="here")


def test_a_model_of_two_parts_has_no_features(tmp_path: Path) -> None:
    T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8, num_heads=2, vocab_size=23).save_pretrained(tmp_path)
    with pytest.raises(CapabilityError, match="T5Model is an encoder with a decoder"):
        built(tmp_path, "feature-extraction", start="random")


def test_a_model_that_transformers_has_not_for_the_task_is_refused(tmp_path: Path) -> None:
    config, _ = CASES["ViT"]
    values = config.to_dict() | {"vocab_size": 23}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CapabilityError, match=r"model\.hf: .*ViTConfig"):
        build_model(recipe_of(tmp_path, "causal-lm", start="random"), CPU, Replicated())


def test_what_a_recipe_needs_to_know_is_read_from_the_folder(tmp_path: Path) -> None:
    for case, positions in (("GPT-2", 16), ("Llama", 16), ("BERT", 16), ("Qwen", 16)):
        config, task = CASES[case]
        config.save_pretrained(tmp_path)
        recipe = recipe_of(tmp_path, task)
        assert isinstance(recipe.model, HuggingFaceModel)
        assert (vocabulary(recipe), recipe.model.context_length, recipe.model.num_layers) == (
            23,
            positions,
            2,
        )


def test_mistakes_about_a_folder_are_told_before_anything_starts(tmp_path: Path) -> None:
    def told(task: str, **model: Any) -> str:
        with pytest.raises(RecipeError) as raised:
            recipe_of(tmp_path, task, **model)
        return str(raised.value)

    assert "model.hf: " in told("causal-lm")
    (tmp_path / "config.json").write_text("{]")
    assert "config.json is no JSON" in told("causal-lm")
    (tmp_path / "config.json").write_text("{}")
    assert "has no model_type: it is no model of transformers" in told("causal-lm")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "config.json has no vocab_size: this is no model of texts" in told("causal-lm")
    assert "config.json has no num_channels: this is no model of images" in told("image-classification")
    config, _ = CASES["Llama"]
    config.save_pretrained(tmp_path)
    assert "model.pooling: last; has no effect, since model.task is causal-lm" in told(
        "causal-lm", pooling="last"
    )
    values = config.to_dict() | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "its weights are quantised (bitsandbytes)" in told("causal-lm")
    config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.task: 'question-answering' is not one of causal-lm, "):
        recipe_from_dict(
            {"name": "x", "model": {"hf": str(tmp_path), "task": "question-answering"}}, source="here"
        )


def test_a_folder_of_another_machine_is_missed_where_it_is_read(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "elsewhere", "causal-lm")
    with pytest.raises(RecipeError, match=r"model\.hf: .*elsewhere/config\.json cannot be read: No such"):
        vocabulary(recipe)
