"""Small models of transformers, of random weights in float64, and tasks for them.

Shape letters: T tasks, N examples, L tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, ViTConfig

from metaloom.engine.adapters.model import Structure
from metaloom.models.hugging_face import HuggingFaceTask, OfTransformers, make_model

VOCABULARY, TOKENS, NUM_CLASSES = 23, 6, 3
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
_IMAGE = _SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 1}
_GPT2: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
CASES: Mapping[str, tuple[PretrainedConfig, HuggingFaceTask]] = {
    "GPT-2": (GPT2Config(**_GPT2, **_NO_ENDS), "causal-lm"),  # Conv1D; queries, keys and values in one layer
    "GPT-2, classes": (GPT2Config(**_GPT2, **_NO_ENDS), "sequence-classification"),
    "Llama": (LlamaConfig(**_TEXT, num_key_value_heads=1, **_NO_ENDS), "causal-lm"),  # grouped queries
    "Llama, classes": (LlamaConfig(**_TEXT, num_key_value_heads=1, **_NO_ENDS), "sequence-classification"),
    "Qwen": (Qwen2Config(**_TEXT, num_key_value_heads=2, tie_word_embeddings=True, **_NO_ENDS), "causal-lm"),
    "BERT": (BertConfig(**_TEXT), "sequence-classification"),
    "BERT, features": (BertConfig(**_TEXT), "feature-extraction"),
    "Llama, features": (LlamaConfig(**_TEXT, num_key_value_heads=1, **_NO_ENDS), "feature-extraction"),
    "ViT, features": (ViTConfig(**_IMAGE), "feature-extraction"),
    "ViT": (ViTConfig(**_IMAGE), "image-classification"),
}


def small_model(case: str) -> OfTransformers:
    """With initial weights so large that no part of it is close to linear."""
    config, task = CASES[case]
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        folder = Path(name)
        config.save_pretrained(folder)
        torch.manual_seed(1)
        model = make_model(folder, task, num_outputs=NUM_CLASSES)
        model.double().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def structure_of(model: OfTransformers) -> Structure:
    """Where it can be taken apart."""
    return Structure(model.block_names, model.head_name, model.embedding_name)


def examples(case: str, num_tasks: int, num_examples: int, *, seed: int) -> dict[str, Tensor]:
    """Inputs and targets `[T, N, ...]`; where a text has a class, some are padded."""
    generator = torch.Generator().manual_seed(seed)
    task, leading = CASES[case][1], (num_tasks, num_examples)
    if task == "causal-lm":
        tokens = torch.randint(VOCABULARY, (*leading, TOKENS + 1), generator=generator)
        return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    classes = torch.randint(NUM_CLASSES, leading, generator=generator)
    if case.startswith("ViT"):
        images = torch.randn((*leading, 1, 8, 8), generator=generator, dtype=torch.float64)
        return {"inputs": images, "targets": classes}
    tokens = torch.randint(VOCABULARY, (*leading, TOKENS), generator=generator)
    tokens[:, 0, 4:] = -1
    return {"inputs": tokens, "targets": classes}
