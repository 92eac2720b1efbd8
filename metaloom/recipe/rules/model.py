"""Rules about the network and its pre-training."""

from metaloom.recipe.data import (
    DocumentsData,
)
from metaloom.recipe.model import GPTModel
from metaloom.recipe.rules.base import Broken, Rule, repeated
from metaloom.recipe.schema import Recipe

GPT_BLOCK_LAYERS = ("attention.qkv", "attention.proj", "mlp.fc_in", "mlp.fc_out")


def heads_divide_the_width(recipe: Recipe) -> Broken:
    model = recipe.model
    if isinstance(model, GPTModel) and model.width % model.num_heads:
        yield (
            "model.width",
            f"{model.width}; must be a multiple of model.num_heads = {model.num_heads}, "
            f"for example {max(1, round(model.width / model.num_heads)) * model.num_heads}",
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
            "and give "
            "weights that were trained before as model.weights",
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


RULES: tuple[Rule, ...] = (
    heads_divide_the_width,
    pretrain_needs_gpt,
    pretrain_warmup_ends,
    pretrain_splits_differ,
    pretraining_fits_the_context,
)
