"""Rules about the network and its pre-training."""

import math
from pathlib import Path

from metaloom.recipe.adaptation import FullFast, LoRAFast, MSRFast
from metaloom.recipe.algorithm import CustomAlgorithm, ERMAlgorithm, MAMLAlgorithm
from metaloom.recipe.data import (
    DocumentsData,
)
from metaloom.recipe.model import (
    ConfigError,
    Conv4Model,
    CustomModel,
    GPTModel,
    HuggingFaceModel,
    LinearLayer,
    LocallyConnectedLayer,
    MLPModel,
    SingleLayerModel,
)
from metaloom.recipe.rules.base import Broken, Rule, Unreadable, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import shape_of, task_facts

GPT_BLOCK_LAYERS = ("attention.qkv", "attention.proj", "mlp.fc_in", "mlp.fc_out")


def linear_layers(recipe: Recipe) -> list[str]:
    """The names of the linear layers of a recipe's model."""
    match recipe.model:
        case GPTModel(num_layers=num_layers):
            layers = [f"blocks.{block}.{name}" for block in range(num_layers) for name in GPT_BLOCK_LAYERS]
            is_classifier = task_facts(recipe).objective == "classification"
            return [*layers, "head", *(["classifier"] if is_classifier else [])]
        case MLPModel(num_layers=num_layers):
            return [*(f"blocks.{block}.linear" for block in range(num_layers)), "head"]
        case Conv4Model():
            return ["head"]
        case SingleLayerModel(layer=layer):
            return ["layer"] if isinstance(layer, LinearLayer) else []
        case HuggingFaceModel() | CustomModel():
            raise Unreadable  # where the model is made tells
        case _:  # of a recipe with mistakes
            raise Unreadable


def has_tied_head(recipe: Recipe) -> bool:
    """Whether the weight of the head that tasks read is the embedding's too."""
    model = recipe.model
    if not isinstance(model, GPTModel) or not model.tied_embeddings:
        return False
    return task_facts(recipe).objective == "language_modelling"


def folders_of_transformers_are_read(recipe: Recipe) -> Broken:
    model = recipe.model
    if not isinstance(model, HuggingFaceModel) or not Path(model.hf).exists():
        return  # of another machine: where it is trained tells
    try:
        quantised = model.config.get("quantization_config")
        if quantised is not None:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            yield (
                "model.hf",
                f"{model.hf}; its weights are quantised ({method}), and hypergradients are of plain ones; "
                "give a folder that model.dequantize().save_pretrained(FOLDER) of transformers has written",
            )
        if model.reads == "text":
            _ = model.vocabulary
        elif "num_channels" not in model.config:
            yield "model.hf", f"{model.hf}; its config.json has no num_channels: this is no model of images"
    except ConfigError as error:
        yield "model.hf", f"{error}; give the folder that save_pretrained of transformers has written"


def pooling_is_of_features(recipe: Recipe) -> Broken:
    model = recipe.model
    if isinstance(model, HuggingFaceModel) and model.pooling and model.task != "feature-extraction":
        yield (
            "model.pooling",
            f"{model.pooling}; has no effect, since model.task is {model.task}; leave it out",
        )


def heads_divide_the_width(recipe: Recipe) -> Broken:
    model = recipe.model
    if isinstance(model, GPTModel) and model.width % model.num_heads:
        yield (
            "model.width",
            f"{model.width}; must be a multiple of model.num_heads = {model.num_heads}, "
            f"for example {max(1, round(model.width / model.num_heads)) * model.num_heads}",
        )


def widths_are_of_the_layers(recipe: Recipe) -> Broken:
    model = recipe.model
    if not isinstance(model, MLPModel) or model.widths is None:
        return
    if len(model.widths) != model.num_layers:
        yield (
            "model.widths",
            f"{list(model.widths)}; must have one width for each of model.num_layers = {model.num_layers}",
        )


def pretrain_needs_gpt(recipe: Recipe) -> Broken:
    if recipe.pretrain is None:
        return
    if not isinstance(recipe.model, GPTModel):
        yield (
            "pretrain",
            f"only for model.kind = gpt, and model.kind is {recipe.model.kind}; set pretrain to null",
        )
    elif not isinstance(recipe.data, DocumentsData):
        yield (
            "pretrain",
            f"only for data.kind = documents, and data.kind is {recipe.data.kind}; set pretrain to null, "
            "and give weights that were trained before as model.weights",
        )


def pretrain_warmup_ends(recipe: Recipe) -> Broken:
    pretrain = recipe.pretrain
    if pretrain is not None and pretrain.warmup_steps >= pretrain.num_steps:
        yield (
            "pretrain.warmup_steps",
            f"{pretrain.warmup_steps}; must be less than pretrain.num_steps = {pretrain.num_steps}",
        )


def pretrain_splits_differ(recipe: Recipe) -> Broken:
    if recipe.pretrain is not None:
        yield from repeated("pretrain.splits", recipe.pretrain.splits)


def pretraining_fits_the_context(recipe: Recipe) -> Broken:
    pretrain, model = recipe.pretrain, recipe.model
    if pretrain is None or pretrain.sequence_length is None or not isinstance(model, GPTModel):
        return
    if pretrain.sequence_length > model.context_length:
        yield (
            "pretrain.sequence_length",
            f"{pretrain.sequence_length}; must be at most model.context_length = {model.context_length}",
        )


def single_layers_do_regression(recipe: Recipe) -> Broken:
    if not isinstance(recipe.model, SingleLayerModel):
        return
    objective = task_facts(recipe).objective
    if objective != "regression":
        yield (
            "model.kind",
            f"single_layer is for targets that are numbers, and the tasks are {objective}; take another, for "
            "example mlp",
        )
    if not isinstance(recipe.algorithm, MAMLAlgorithm | ERMAlgorithm | CustomAlgorithm):
        yield (
            "algorithm.kind",
            f"{recipe.algorithm.kind}; stands on what a model makes of its inputs before its head, and "
            "model.kind = single_layer has nothing before it; take maml, or model.kind = mlp",
        )
    fast = recipe.adaptation.fast
    if recipe.maml is not None and not isinstance(fast, FullFast | MSRFast | LoRAFast):
        yield (
            "adaptation.fast.kind",
            f"{fast.kind}; adapts a part of a model, and model.kind = single_layer is one layer; set it to "
            "full or msr",
        )
    if recipe.adaptation.rehearsal is not None:
        yield (
            "adaptation.rehearsal",
            "given; model.kind = single_layer has one output, that of the tasks; set it to null",
        )
    for name in ("recompute_blocks", "head_chunk"):
        if getattr(recipe.memory, name):
            yield (
                f"memory.{name}",
                f"{getattr(recipe.memory, name)}; has no effect, since model.kind = single_layer has neither "
                "blocks nor a head apart from them; leave it out",
            )


def single_layers_fit_the_data(recipe: Recipe) -> Broken:
    model = recipe.model
    if not isinstance(model, SingleLayerModel) or isinstance(model.layer, LinearLayer):
        return
    facts, layer = task_facts(recipe), model.layer
    shape = list(shape_of(facts.inputs))
    most = 2 if isinstance(layer, LocallyConnectedLayer) else 3
    if len(shape) > most:
        yield (
            "model.layer.kind",
            f"{layer.kind} reads inputs of {' or '.join(_SHAPES[:most])}, and the data give {shape}; take "
            "another",
        )
        return
    sides = shape if len(shape) == 1 else shape[1:]
    if layer.kernel_size > min(sides):
        yield (
            "model.layer.kernel_size",
            f"{layer.kernel_size}; must be at most the shortest side of the inputs, {min(sides)}",
        )
        return
    num_places = math.prod(side - layer.kernel_size + 1 for side in sides)
    if facts.num_outputs is not None and facts.num_outputs % num_places:
        yield (
            "model.layer.kernel_size",
            f"{layer.kernel_size}; leaves {num_places} places, and each output channel gives one number for "
            f"each: targets have {facts.num_outputs}, which is no multiple",
        )


_SHAPES = ("[length]", "[channels, length]", "[channels, height, width]")

RULES: tuple[Rule, ...] = (
    folders_of_transformers_are_read,
    pooling_is_of_features,
    heads_divide_the_width,
    widths_are_of_the_layers,
    pretrain_needs_gpt,
    pretrain_warmup_ends,
    pretrain_splits_differ,
    pretraining_fits_the_context,
    single_layers_do_regression,
    single_layers_fit_the_data,
)
