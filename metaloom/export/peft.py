"""LoRA matrices as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not
needed.

PEFT computes `y = W x + (lora_alpha / r) B A x` too, with A under `<layer>.lora_A.weight` `[R, D]` and B
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
from metaloom.engine.sharding.replicated import Replicated
from metaloom.export.card import Card, read_card, write_card
from metaloom.export.formats import PEFT
from metaloom.export.tensors import MODEL_FILE, write_tensors
from metaloom.export.trained import Trained
from metaloom.files import replace_file
from metaloom.recipe import LoRAFast

CONFIG, ADAPTER_FILE, BACKBONE_FOLDER = "adapter_config.json", "adapter_model.safetensors", "backbone"
LOADING = (
    "from peft import PeftModel",
    "from metaloom.export import load_backbone",
    "model = PeftModel.from_pretrained(load_backbone(FOLDER), FOLDER)",
)
_PREFIX = "base_model.model."
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def write(trained: Trained, card: Card, folder: Path) -> None:
    """Writes the adapter with its card and, unless they are those of a file that the recipe names, the
    backbone's weights, in `backbone/`, as `model.weights` of a recipe reads them."""
    source = card.recipe.model.weights
    is_own = source is None or card.recipe.pretrain is not None
    if is_own or any(name.startswith(BACKBONE) for name in trained.meta):
        source = BACKBONE_FOLDER
        (folder / BACKBONE_FOLDER).mkdir()
        write_tensors(folder / BACKBONE_FOLDER / MODEL_FILE, trained.weights())
    write_adapter(trained, folder, base=source, module=trained.module)
    write_card(card, folder, kind=PEFT, loading=LOADING)


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
    for name, value in trained.start().items():
        layer, _, side = name.rpartition(".")
        layers[layer] = None
        tensors[f"{_PREFIX}{layer_of(layer)}.{_SIDES[side]}.weight"] = value
    write_tensors(folder / ADAPTER_FILE, tensors)
    others = [name for name, _ in module.named_modules() if name not in layers]
    targets = short_names([*map(layer_of, layers)], [*map(layer_of, others)])
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": fast.rank,
        "lora_alpha": int(fast.alpha) if fast.alpha == int(fast.alpha) else fast.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "modules_to_save": None,
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
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": source})})
    return build_model(recipe, torch.device("cpu"), Replicated()).module.eval()
