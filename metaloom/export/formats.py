"""What a recipe's result can be written as. Needs no torch, so that the command line can ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from metaloom.errors import CapabilityError, RecipeError
from metaloom.recipe import (
    ERMAlgorithm,
    FullFast,
    GPTModel,
    HeadFast,
    HuggingFaceModel,
    InContextAlgorithm,
    LoRAFast,
    NormBiasFast,
    PartFast,
    Recipe,
)
from metaloom.recipe.tasks import task_facts

PEFT, HUGGINGFACE, SAFETENSORS, MLFLOW = "peft", "huggingface", "safetensors", "mlflow"
WHAT = {
    PEFT: "PEFT adapter",
    HUGGINGFACE: "Hugging Face model",
    SAFETENSORS: "safetensors file with its card",
    MLFLOW: "MLflow model",
}
FORMATS = tuple(WHAT)


def default_format(recipe: Recipe) -> str:
    """The format that a result is written in where none is named."""
    return SAFETENSORS if _not_for_peft(recipe) else PEFT


def possible_formats(recipe: Recipe) -> list[str]:
    """The formats that can hold the recipe's result, the default first."""
    found = [name for name in FORMATS if _OBSTACLES[name](recipe) is None]
    return sorted(found, key=lambda name: name != default_format(recipe))


def require_format(recipe: Recipe, name: str, *, merge: bool) -> None:
    """Passes where a format can hold a recipe's result.

    Args:
        merge: whether a LoRA initialisation is to be merged into the weights beside it.

    Raises:
        RecipeError: there is no such format.
        CapabilityError: it cannot; names those that can.
    """
    if name not in FORMATS:
        raise RecipeError(f"--format {name} is none of {', '.join(FORMATS)}.")
    obstacle = _OBSTACLES[name](recipe)
    if obstacle is not None:
        others = ", ".join(possible_formats(recipe))
        raise CapabilityError(f"--format {name}: {obstacle}. This run can be written as {others}.")
    if merge and (name != HUGGINGFACE or not _is_lora(recipe)):
        raise CapabilityError(
            f"--merge puts a LoRA initialisation into the weights of a Hugging Face model; with --format "
            f"{name} and adaptation.fast: {recipe.adaptation.fast.kind} it has no effect: leave it out."
        )


def _is_lora(recipe: Recipe) -> bool:
    return recipe.maml is not None and isinstance(recipe.adaptation.fast, LoRAFast)


def _not_for_peft(recipe: Recipe) -> str | None:
    if recipe.maml is None:
        return f"algorithm.kind: {recipe.algorithm.kind} has no fast weights, and so no adapter"
    if not _is_lora(recipe):
        return f"PEFT adapters of LoRA are written, and adaptation.fast is {recipe.adaptation.fast.kind}"
    return None


def _not_for_huggingface(recipe: Recipe) -> str | None:
    if isinstance(recipe.model, HuggingFaceModel):
        return (
            "a model of transformers is written as a PEFT adapter, with its folder where its weights changed"
        )
    if not isinstance(recipe.model, GPTModel):
        return f"model.kind: {recipe.model.kind} has no counterpart in transformers"
    objective = task_facts(recipe).objective
    if objective != "language_modelling":
        return (
            f"the model's head for {objective} has a bias and reads the last token before padding, which no "
            "class of transformers does alike; language models are written"
        )
    if isinstance(recipe.algorithm, ERMAlgorithm | InContextAlgorithm):
        return None
    if recipe.maml is None:
        return f"algorithm.kind: {recipe.algorithm.kind} learns more than the weights of one model"
    fast = recipe.adaptation.fast
    if not isinstance(fast, LoRAFast | FullFast | HeadFast | NormBiasFast | PartFast):
        return f"adaptation.fast: {fast.kind} adapts what is no weight of the model"
    if recipe.adaptation.norms.weights == "per_step":
        return "adaptation.norms.weights: per_step gives norms other weights in each inner step"
    return None


def _not_for_mlflow(recipe: Recipe) -> str | None:
    if recipe.maml is None and not isinstance(recipe.algorithm, ERMAlgorithm):
        return (
            f"what algorithm.kind: {recipe.algorithm.kind} says of an input depends on a task's support "
            "data, and an MLflow model is asked about inputs alone"
        )
    return None


_OBSTACLES: Mapping[str, Callable[[Recipe], str | None]] = {
    PEFT: _not_for_peft,
    HUGGINGFACE: _not_for_huggingface,
    SAFETENSORS: lambda recipe: None,
    MLFLOW: _not_for_mlflow,
}
