"""A folder that `from_pretrained` of transformers reads: `config.json` and `model.safetensors`. Transformers
itself is not needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from metaloom.engine.adapters.lora import lora_scale
from metaloom.engine.adapters.selection import uses_of
from metaloom.errors import CapabilityError
from metaloom.export import gpt2
from metaloom.export.card import Card, write_card
from metaloom.export.formats import HUGGINGFACE
from metaloom.export.peft import write_adapter
from metaloom.export.tensors import MODEL_FILE, write_tensors
from metaloom.export.trained import Trained
from metaloom.files import replace_file
from metaloom.models.gpt import Gpt
from metaloom.recipe import LoRAFast

CONFIG, ADAPTER_FOLDER = "config.json", "adapter"


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What a network of ours is in transformers.

    Attributes:
        architecture: the class there.
        config: `config.json` of a network.
        tensors: its weights under the names, and in the shapes, that they have there.
        layer_of: what a module is called there.
        task_type: what PEFT calls what it does.
    """

    architecture: str
    config: Callable[[nn.Module], dict[str, object]]
    tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    layer_of: Callable[[str], str]
    task_type: str


COUNTERPARTS: Mapping[type[nn.Module], Counterpart] = {
    Gpt: Counterpart(gpt2.ARCHITECTURE, gpt2.config, gpt2.tensors, gpt2.layer_of, "CAUSAL_LM")
}


def write(trained: Trained, card: Card, folder: Path, *, merge: bool) -> None:
    """Writes the model with its card, at the weights that adaptation starts at. A LoRA initialisation is a
    PEFT adapter for it, in `adapter/`, or merged into its weights.

    Raises:
        CapabilityError: it cannot be merged.
    """
    counterpart = COUNTERPARTS[type(trained.module)]
    is_lora = trained.unroll is not None and isinstance(trained.recipe.adaptation.fast, LoRAFast)
    weights = trained.weights()
    if is_lora and merge:
        weights = merged(trained)
    elif trained.unroll is not None and not is_lora:
        # Of a head that starts at zero, the zero.
        weights |= trained.start()
    write_tensors(folder / MODEL_FILE, counterpart.tensors(weights))
    config = counterpart.config(trained.module)
    replace_file(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    loading = [
        f"from transformers import {counterpart.architecture}",
        f"model = {counterpart.architecture}.from_pretrained(FOLDER)",
    ]
    if is_lora and not merge:
        (folder / ADAPTER_FOLDER).mkdir()
        write_adapter(
            trained,
            folder / ADAPTER_FOLDER,
            base="..",
            module=trained.module,
            layer_of=counterpart.layer_of,
            task_type=counterpart.task_type,
            is_transposed=True,
        )
        loading.insert(0, "from peft import PeftModel")
        loading.append(f"model = PeftModel.from_pretrained(model, FOLDER + '/{ADAPTER_FOLDER}')")
    write_card(card, folder, kind=HUGGINGFACE, loading=loading)


def merged(trained: Trained) -> dict[str, Tensor]:
    """The network's weights with the scaled B A added to those of the adapted layers.

    Raises:
        CapabilityError: such a weight is another layer's too, which would change with it.
    """
    fast = trained.recipe.adaptation.fast
    assert isinstance(fast, LoRAFast), "the format was found fit"
    weights, start = trained.weights(), trained.start()
    uses = {name: names for names in uses_of(trained.module).values() for name in names}
    scale = lora_scale(fast.alpha, fast.rank, rank_stabilized=fast.rslora)
    for name, value in start.items():
        layer, _, side = name.rpartition(".")
        if side not in ("lora_a", "lora_b"):
            weights[name] = value  # one of a whole module
        if side != "lora_a":
            continue
        weight = f"{layer}.weight"
        if len(uses[weight]) > 1:
            raise CapabilityError(
                f"--merge: {weight} is one weight of several layers ({', '.join(uses[weight])}), and its "
                "LoRA product belongs to one of them: leave --merge out."
            )
        product = start[f"{layer}.lora_b"] @ start[name]
        weights[weight] = weights[weight] + scale * product
    return weights
