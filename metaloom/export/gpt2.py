"""`metaloom.models.gpt.Gpt` as transformers' `GPT2LMHeadModel`: the same computation under other names.

Both are pre-norm with learned positions, biases everywhere but in the head, query, key and value side by side
in one layer, and epsilon 1e-5; GELU is the exact one (`gelu`). GPT-2 keeps the weights of its layers
transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from metaloom.models.gpt import Gpt

ARCHITECTURE = "GPT2LMHeadModel"
_BLOCK = re.compile(r"blocks\.(\d+)")
_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_IN_BLOCK = {
    "norm_attention": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "norm_mlp": "ln_2",
    "mlp.fc_in": "mlp.c_fc",
    "mlp.fc_out": "mlp.c_proj",
}


def config(model: nn.Module) -> dict[str, object]:
    """What `config.json` says of the model."""
    assert isinstance(model, Gpt)
    vocabulary, width = model.token_embedding.weight.shape
    attention = model.get_submodule("blocks.0.attention")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": len(model.position_embedding.weight),
        "n_embd": width,
        "n_layer": len(model.blocks),
        "n_head": attention.num_heads,
        "n_inner": 4 * width,
        "activation_function": "gelu",
        "layer_norm_epsilon": model.norm.eps,
        "resid_pdrop": model.dropout.p,
        "embd_pdrop": model.dropout.p,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": model.head.weight is model.token_embedding.weight,
        # No token of the vocabulary begins or ends a text.
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }


def tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights as GPT-2 has them."""
    found = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        found[f"{layer_of(layer)}.{part}"] = value.T if _is_transposed(layer) and part == "weight" else value
    return found


def layer_of(name: str) -> str:
    """What GPT-2 calls a module of ours; a module that it has not keeps its name."""
    block, _, inside = name.partition(".")[2].partition(".")
    if _BLOCK.match(name) and inside in _IN_BLOCK:
        return f"transformer.h.{block}.{_IN_BLOCK[inside]}"
    return _NAMES.get(name, name)


def _is_transposed(name: str) -> bool:
    """Whether GPT-2 keeps a module's weight transposed."""
    return name.startswith("blocks.") and not name.rpartition(".")[2].startswith("norm_")
