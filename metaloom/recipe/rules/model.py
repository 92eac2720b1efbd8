"""Rules about the network and its pre-training."""

from metaloom.recipe.data import (
    DocumentsData,
)
from metaloom.recipe.model import Conv4Model, GPTModel, MLPModel
from metaloom.recipe.rules.base import Broken, Rule, Unreadable, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import task_facts

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
        case _:  # of a recipe with mistakes
            raise Unreadable


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


RULES: tuple[Rule, ...] = (
    heads_divide_the_width,
    pretrain_needs_gpt,
    pretrain_warmup_ends,
    pretrain_splits_differ,
)
