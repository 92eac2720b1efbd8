"""LoRA matrices as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not
needed.

PEFT computes `y = W x + s B A x` with the same s, with A under `<layer>.lora_A.weight` `[R, D]` and B
under `<layer>.lora_B.weight` `[D', R]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from metaloom.build import build_model
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.selection import is_transposed
from metaloom.engine.sharding.replicated import Replicated
from metaloom.export.card import Card, read_card, write_card
from metaloom.export.configuration import FOLDER as BACKBONE_FOLDER
from metaloom.export.configuration import write_configuration
from metaloom.export.formats import PEFT
from metaloom.export.tensors import MODEL_FILE, write_tensors
from metaloom.export.trained import Trained
from metaloom.files import replace_file
from metaloom.models.as_function import AsFunction
from metaloom.recipe import HuggingFaceModel, LoRAFast

CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
LOADING = (
    "from peft import PeftModel",
    "from metaloom.export import load_backbone",
    "model = PeftModel.from_pretrained(load_backbone(FOLDER), FOLDER)",
)
_PREFIX = "base_model.model."
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}


def write(trained: Trained, card: Card, folder: Path) -> None:
    """Writes the adapter with its card and, unless they are those of a file or folder that the recipe names,
    the backbone's weights, in `backbone/`, as `model.weights` or `model.hf` of a recipe reads them."""
    model = card.recipe.model
    source = model.weights
    is_own = source is None or card.recipe.pretrain is not None
    # A classifier has the output head of its tasks, which no folder has.
    is_own = is_own or (isinstance(model, HuggingFaceModel) and model.task != "causal-lm")
    if is_own or any(name.startswith(BACKBONE) for name in trained.meta):
        source = BACKBONE_FOLDER
        (folder / BACKBONE_FOLDER).mkdir()
        write_tensors(folder / BACKBONE_FOLDER / MODEL_FILE, trained.weights())
        if isinstance(model, HuggingFaceModel):
            write_configuration(trained, model, folder / BACKBONE_FOLDER)
    is_of_language = isinstance(model, HuggingFaceModel) and model.task == "causal-lm"
    write_adapter(
        trained,
        folder,
        base=source,
        module=trained.module,
        task_type="CAUSAL_LM" if is_of_language else None,
        is_transposed=any(map(is_transposed, trained.module.modules())),
    )
    if not isinstance(model, HuggingFaceModel) or _has_own_head(trained, model):
        write_card(card, folder, kind=PEFT, loading=LOADING)
        return
    of_transformers = _CLASSES[model.task]
    path = f"FOLDER + '/{BACKBONE_FOLDER}'" if source == BACKBONE_FOLDER else repr(source)
    loading = (
        "from peft import PeftModel",
        f"from transformers import {of_transformers}",
        f"model = {of_transformers}.from_pretrained({path})",
        "model = PeftModel.from_pretrained(model, FOLDER)",
    )
    write_card(card, folder, kind=PEFT, loading=loading)


def _has_own_head(trained: Trained, model: HuggingFaceModel) -> bool:
    """Whether the adapter has a head that transformers' model lacks."""
    assert isinstance(trained.module, AsFunction)
    head = f"{trained.module.head_name}."
    return model.task == "feature-extraction" and any(name.startswith(head) for name in trained.start())


def write_adapter(
    trained: Trained,
    folder: Path,
    *,
    base: str | None,
    module: nn.Module,
    layer_of: Callable[[str], str] = str,
    task_type: str | None = None,
    is_transposed: bool = False,
) -> None:
    """Writes the two files of a PEFT adapter.

    Args:
        base: where the weights beside it are, as PEFT records it.
        module: has the layers that could be meant by the names of those that are adapted.
        layer_of: what an adapted layer is called in the model that the adapter is for.
        task_type: PEFT's name of what that model does; None where it has none.
        is_transposed: whether layers of that model keep their weights as `[D, D']`.
    """
    fast = trained.recipe.adaptation.fast
    assert isinstance(fast, LoRAFast), "the format was found fit"
    tensors: dict[str, Tensor] = {}
    layers: dict[str, None] = {}
    whole: dict[str, None] = {}
    for name, value in trained.start().items():
        layer, _, side = name.rpartition(".")
        if side in _SIDES:
            layers[layer] = None
            tensors[f"{_PREFIX}{layer_of(layer)}.{_SIDES[side]}.weight"] = value
        else:
            whole[layer] = None
            tensors[f"{_PREFIX}{layer_of(layer)}.{side}"] = value
    write_tensors(folder / ADAPTER_FILE, tensors)

    def named(chosen: Collection[str]) -> list[str]:
        others = [name for name, _ in module.named_modules() if name not in chosen]
        return short_names([*map(layer_of, chosen)], [*map(layer_of, others)])

    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": fast.rank,
        "lora_alpha": int(fast.alpha) if fast.alpha == int(fast.alpha) else fast.alpha,
        "lora_dropout": fast.dropout,
        "use_rslora": fast.rslora,
        "target_modules": named(layers),
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "modules_to_save": named(whole) or None,
    }
    replace_file(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def short_names(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """The last parts of the chosen names, where these mean no other module; else the whole names."""
    ends = {name.rpartition(".")[2] for name in chosen}
    if ends & {name.rpartition(".")[2] for name in others}:
        return sorted(chosen)
    return sorted(ends)


def read_backbone(folder: Path) -> nn.Module:
    """The network that an adapter is for, with its weights.

    Raises:
        CheckpointError: the folder holds no adapter, or the weights cannot be read.
    """
    recipe = read_card(folder, kind=PEFT).recipe
    own = folder / BACKBONE_FOLDER
    source = str(own) if own.is_dir() else recipe.model.weights
    is_folder = isinstance(recipe.model, HuggingFaceModel)
    update = {"hf": source, "start": "pretrained"} if is_folder else {"weights": source}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
    return build_model(recipe, torch.device("cpu"), Replicated()).module.eval()
