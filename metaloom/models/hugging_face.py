"""Models of transformers as functions of one tensor.

Shape letters: N examples, L tokens, D width, V outputs (vocabulary, classes).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from metaloom.models.as_function import PREPROCESSING_FILE, AsFunction, items_of_lists, with_parts
from metaloom.models.gpt import PAD, at_last_token

HuggingFaceTask = Literal[
    "causal-lm", "sequence-classification", "image-classification", "feature-extraction"
]
Pooling = Literal["mean", "first", "last"]
_CLASSES: dict[HuggingFaceTask, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "feature-extraction": AutoModel,
}
_HEAD, _SCORE = "head", "score"  # of features; of a decoder's classes
CLASSIFICATION, LANGUAGE_MODELLING = "classification", "language_modelling"


class OfTransformers(AsFunction):
    """A model of transformers, which always has a head."""

    head_name: str

    def own_names(self, stored: Iterable[str]) -> dict[str, str]:
        model: Any = self
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        own = dict(self.named_parameters(remove_duplicate=False))
        found = {}
        for name in stored:
            renamed, is_converted = rename_source_key(
                name, renamings, converters, model.base_model_prefix, own
            )
            if is_converted is not None:
                raise ValueError(
                    f"{name} is stored in another layout than {type(self).__name__} has it in, and is not "
                    "read as it is"
                )
            found[name] = renamed
        return found


class _CausalLM(OfTransformers):
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[N, L, V]` of the next token. A token sees none behind it: padding needs no mask."""
        logits: Tensor = super().forward(input_ids=tokens.clamp(min=0), use_cache=False).logits
        return logits


class _EncoderClassification(OfTransformers):
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[N, V]` of the class."""
        mask = (tokens != PAD).long()
        logits: Tensor = super().forward(input_ids=tokens.clamp(min=0), attention_mask=mask).logits
        return logits


class _DecoderClassification(OfTransformers):
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[N, V]` of the class, read at the last token. Transformers finds it by the padding token's
        number, which may be a token's of the text, or may not be set."""
        base: Any = self.base_model
        hidden = base(input_ids=tokens.clamp(min=0), use_cache=False).last_hidden_state
        logits: Tensor = self.get_submodule(self.head_name)(at_last_token(hidden, tokens))
        return logits


class _DecoderOfTwo(OfTransformers):
    """A language model with a head for classes beside its own."""

    language_head_name: str

    def forward(self, tokens: Tensor, head: str) -> Tensor:
        """Logits of the text's class `[N, V]`, read at the last token, or of the next tokens
        `[N, L, vocabulary]`, as the head's name has it."""
        base: Any = self.base_model
        hidden = base(input_ids=tokens.clamp(min=0), use_cache=False).last_hidden_state
        if head == CLASSIFICATION:
            hidden = at_last_token(hidden, tokens)
        name = self.head_name if head == CLASSIFICATION else self.language_head_name
        logits: Tensor = self.get_submodule(name)(hidden)
        return logits


class _OfImages(OfTransformers):
    image_mean: tuple[float, ...] = (0.0,)
    image_std: tuple[float, ...] = (1.0,)

    def normalised(self, images: Tensor) -> Tensor:
        """What the model is shown, of numbers from 0 to 1."""
        mean, std = (images.new_tensor(each)[:, None, None] for each in (self.image_mean, self.image_std))
        return (images - mean) / std


class _ImageClassification(_OfImages):
    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, V]` of the class, of numbers from 0 to 1."""
        logits: Tensor = super().forward(pixel_values=self.normalised(images)).logits
        return logits


def _read(model: OfTransformers, pooled: Tensor) -> Tensor:
    """What the head makes of features `[N, D]`."""
    head = model.get_submodule(model.head_name)
    if isinstance(head, nn.Linear) and pooled.shape[-1] != head.in_features:
        raise ValueError(
            f"the last layer of {type(model).__name__} gives {pooled.shape[-1]} numbers, and its "
            f"config.json says {head.in_features} (hidden_size): no head can be put behind it"
        )
    outputs: Tensor = head(pooled)
    return outputs


class _TextFeatures(OfTransformers):
    pooling: Pooling
    takes_cache: bool

    def forward(self, tokens: Tensor) -> Tensor:
        """What the head makes of a text's features, `[N, V]`."""
        is_token = tokens != PAD
        # Keys that a decoder keeps would be there twice where a block is computed again.
        options = {"use_cache": False} if self.takes_cache else {}
        output = super().forward(input_ids=tokens.clamp(min=0), attention_mask=is_token.long(), **options)
        hidden: Tensor = output.last_hidden_state  # [N, L, D]
        if self.pooling == "first":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            pooled = at_last_token(hidden, tokens)
        else:
            share = is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1)
            pooled = (share.to(hidden.dtype)[..., None] * hidden).sum(dim=1)
        return _read(self, pooled)


class _ImageFeatures(_OfImages):
    pooling: Pooling

    def forward(self, images: Tensor) -> Tensor:
        """What the head makes of the features of an image, numbers from 0 to 1: `[N, V]`."""
        hidden: Tensor = super().forward(pixel_values=self.normalised(images)).last_hidden_state
        if hidden.ndim == 4:  # [N, D, height, width]
            hidden = hidden.flatten(2).transpose(1, 2)
        if self.pooling == "mean":
            pooled = hidden.mean(dim=1)
        else:
            pooled = hidden[:, 0 if self.pooling == "first" else -1]
        return _read(self, pooled)


def make_model(
    folder: Path,
    task: HuggingFaceTask,
    *,
    num_outputs: int | None = None,
    pooling: Pooling = "mean",
    keeps_language_head: bool = False,
) -> OfTransformers:
    """The model that a folder's `config.json` describes, with random weights, which gives logits:

    * `causal-lm`: of tokens `[N, L]`, those of the next ones, `[N, L, V]`;
    * `sequence-classification`: of tokens, those of the text's class, `[N, V]`;
    * `image-classification`: of images `[N, channels, height, width]`, numbers from 0 to 1, `[N, V]`: by the
      mean and standard deviation that the folder's `preprocessor_config.json` says, where it has one;
    * `feature-extraction`: of tokens or images, what a new linear layer, `head`, makes of the features of the
      model without a head, `[N, V]`.

    Sequences may be padded on the right with `PAD`. Dropout is off. Attention is torch's
    `scaled_dot_product_attention` where the model can have it.

    Args:
        num_outputs: V; None for as many classes as the configuration says.
        pooling: of `feature-extraction`: which of the last layer's vectors are a text's or an image's
            features, those of padding left out.
        keeps_language_head: of `sequence-classification` by a decoder: whether it has its language model's
            head, too. It is then called with the name of a head beside the tokens, `classification` or
            `language_modelling`, and gives the logits of the one, `[N, V]`, or the other.

    Raises:
        ValueError: transformers has no such model for the task; or it has no layers or no head that can be
            told from the rest; or it is no decoder, and has no language model's head to keep.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if num_outputs is not None and task != "causal-lm":
        config.num_labels = num_outputs
    if keeps_language_head:
        _require_decoder(config)
    kind = AutoModelForCausalLM if keeps_language_head else _CLASSES[task]
    try:
        model = kind.from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = kind.from_config(config, attn_implementation="eager")
    if task == "feature-extraction":
        _add_head(model, num_outputs or config.num_labels)
    if keeps_language_head:
        model.add_module(_SCORE, nn.Linear(config.hidden_size, config.num_labels, bias=False))
    takes_cache = "use_cache" in inspect.signature(type(model).forward).parameters
    function = as_function(model, task)
    function.eval()
    if isinstance(function, _DecoderOfTwo):
        function.language_head_name = _name_of(model, model.get_output_embeddings())
    if isinstance(function, _TextFeatures | _ImageFeatures):
        function.pooling = pooling
    if isinstance(function, _TextFeatures):
        function.takes_cache = takes_cache
    if isinstance(function, _OfImages):
        function.image_mean, function.image_std = _normalisation(folder)
    return function


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / PREPROCESSING_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not values.get("do_normalize", True) or "image_mean" not in values or "image_std" not in values:
        return (0.0,), (1.0,)
    return tuple(values["image_mean"]), tuple(values["image_std"])


def as_function(model: PreTrainedModel, task: HuggingFaceTask) -> OfTransformers:
    """The same model, called as its task has it: with a class of its own beside that of transformers; its
    modules, its parameters and their names stay as they are.

    Raises:
        ValueError: it has no layers or no head that can be told from the rest.
    """
    head = _head_name(model, task)
    classifies = _DecoderClassification if head == _SCORE else _EncoderClassification
    kinds: dict[HuggingFaceTask, type[OfTransformers]] = {
        "causal-lm": _CausalLM,
        # Decoders read a class at one token, and have no layer there but the last.
        "sequence-classification": _DecoderOfTwo if _has_two(model) else classifies,
        "image-classification": _ImageClassification,
        "feature-extraction": _ImageFeatures if reads_images(model.config) else _TextFeatures,
    }
    blocks, embedding = items_of_lists(model), None
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    if not issubclass(kinds[task], _OfImages):
        embedding = _name_of(model, model.get_input_embeddings())
    model.__class__ = with_parts(kinds[task], type(model))
    assert isinstance(model, OfTransformers)
    model.block_names, model.head_name, model.embedding_name = blocks, head, embedding
    return model


def _has_two(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None and hasattr(model, _SCORE)


def _require_decoder(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, _SCORE):
        raise ValueError(
            f"{type(model).__name__} is no decoder: it has no head for next tokens that rehearsal of texts "
            "could read. Rehearse with a decoder, or leave adaptation.rehearsal out"
        )


def reads_images(config: Any) -> bool:
    """Whether a model is shown images."""
    return hasattr(config, "num_channels")


def _add_head(model: PreTrainedModel, num_outputs: int) -> None:
    """Puts a linear layer behind a model without a head, and takes a pooler away: features are what is in
    front of it."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder with a decoder, whose features are not of one text")
    if hasattr(model, _HEAD):
        raise ValueError(f"{name} has a part named {_HEAD} of its own")
    width = getattr(config, "hidden_size", None) or getattr(config, "hidden_sizes", [None])[-1]
    if width is None:
        raise ValueError(f"{name} does not say how wide its last layer is (hidden_size)")
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        model.pooler = None
    model.add_module(_HEAD, nn.Linear(width, num_outputs))


def _head_name(model: PreTrainedModel, task: HuggingFaceTask) -> str:
    if task == "feature-extraction":
        return _HEAD
    if task == "causal-lm":
        return _name_of(model, model.get_output_embeddings())
    for name in (_SCORE, "classifier"):
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(f"{type(model).__name__} has no head named score or classifier; it has {children}")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    if wanted in names:
        return names[wanted]
    raise ValueError(f"{type(model).__name__} has no output layer over a vocabulary")
