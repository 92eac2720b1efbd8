"""The sections of a recipe that say which network is meta-trained, and what it has learned before."""

import functools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from metaloom.recipe.base import (
    BelowOne,
    Count,
    CountOrZero,
    FloatOrZero,
    ImportPath,
    Keys,
    Options,
    PositiveFloat,
    Section,
    Text,
)

WEIGHTS = (
    "safetensors file to start from, or a folder with model.safetensors or several and their index; "
    "null for random weights"
)


class Conv4Model(Section):
    """The convolutional network of the few-shot literature; as many outputs as a task has classes."""

    kind: Literal["conv4"] = Field(default="conv4", description="convolutional network for images")
    width: Count = Field(default=32, description="channels of each block")
    num_blocks: int = Field(
        default=4,
        ge=1,
        le=4,
        description="blocks of convolution with stride 2, norm and ReLU, each halving the image",
    )
    norm: Literal["batch", "layer", "none"] = Field(
        default="batch",
        description="normalisation in each block: batch (statistics per task), layer (of each image) or none",
    )
    weights: str | None = Field(default=None, description=WEIGHTS)


class MLPModel(Section):
    """A fully connected network, for arrays of numbers."""

    kind: Literal["mlp"] = Field(default="mlp", description="fully connected network for arrays of numbers")
    width: Count = Field(default=40, description="units of each hidden layer")
    num_layers: Count = Field(default=2, description="hidden layers")
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="units of each hidden layer where they differ, num_layers of them; null for width",
    )
    activation: Literal["relu", "tanh"] = Field(default="relu", description="after each hidden layer")
    weights: str | None = Field(default=None, description=WEIGHTS)


class LinearLayer(Section):
    """Every output from every number of the input."""

    kind: Literal["linear"] = Field(default="linear", description="fully connected")


KernelSize = Annotated[Count, Field(description="places of a filter along each side; no padding")]


class LocallyConnectedLayer(Section):
    """A convolution whose places have filters of their own."""

    kind: Literal["locally_connected"] = Field(
        default="locally_connected", description="filters that each place has for itself; of one dimension"
    )
    kernel_size: KernelSize = 3


class ConvolutionLayer(Section):
    """A convolution of one or two dimensions."""

    kind: Literal["convolution"] = Field(
        default="convolution", description="filters that all places share; of one or two dimensions"
    )
    kernel_size: KernelSize = 3


class SingleLayerModel(Section):
    """One layer without an activation, for arrays of numbers; as many channels as targets ask for."""

    kind: Literal["single_layer"] = Field(
        default="single_layer",
        description="one layer, for regressions that have a symmetry (Zhou et al. 2021)",
    )
    layer: LinearLayer | LocallyConnectedLayer | ConvolutionLayer = Field(
        discriminator="kind", description="which"
    )
    bias: bool = Field(default=False, description="whether it has a bias")
    weights: str | None = Field(default=None, description=WEIGHTS)


class GPTModel(Section):
    """A decoder-only transformer over bytes or tokens; for classification with a head on the last token."""

    kind: Literal["gpt"] = Field(default="gpt", description="decoder-only transformer over bytes or tokens")
    vocabulary: int = Field(
        default=256, ge=2, description="tokens that texts are made of; 256 where they are read as bytes"
    )
    num_layers: Count = Field(default=4, description="transformer blocks")
    width: Count = Field(default=128, description="width of the residual stream; a multiple of num_heads")
    num_heads: Count = Field(default=4, description="attention heads per block")
    context_length: Count = Field(default=128, description="most positions in one sequence, in tokens")
    tied_embeddings: bool = Field(
        default=True, description="whether the output head shares the embedding's weight"
    )
    dropout: BelowOne = Field(
        default=0.0,
        description="dropout of activations in ordinary training and in adaptation steps, 0 for none",
    )
    weights: str | None = Field(default=None, description=WEIGHTS)


class HuggingFaceModel(Section):
    """A model of transformers, from a folder as its `from_pretrained` reads one."""

    kind: Literal["hf"] = Field(default="hf", description="model of transformers, from a folder")
    hf: Text = Field(
        description="the folder: config.json and, unless start is random, model.safetensors or several and "
        "their index"
    )
    task: Literal["causal-lm", "sequence-classification", "image-classification", "feature-extraction"] = (
        Field(
            description="causal-lm (the next token of texts), sequence-classification (classes of texts), "
            "image-classification, or feature-extraction (the model without a head, and a new linear layer "
            "for classes or numbers behind it); classes are as many as a task has"
        )
    )
    pooling: Literal["mean", "first", "last"] | None = Field(
        default=None,
        description="of feature-extraction: which of the last layer's vectors are the features: their mean, "
        "that of the first token, or of the last; null for mean",
    )
    start: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="pretrained: the folder's weights, and those of a new output head from the seed; random: "
        "all from the seed",
    )

    @property
    def weights(self) -> str | None:
        """Where weights are read from; None for random ones."""
        return self.hf if self.start == "pretrained" else None

    @property
    def config(self) -> dict[str, Any]:
        """What the folder's `config.json` says, for a model of several kinds of input that of texts.

        Raises:
            ConfigError: it cannot be read.
        """
        return _config(Path(self.hf) / "config.json")

    @property
    def reads(self) -> Literal["text", "image"]:
        """What it is shown.

        Raises:
            ConfigError: that depends on the configuration, which cannot be read.
        """
        if self.task == "feature-extraction":
            return "image" if "num_channels" in self.config else "text"
        return "image" if self.task == "image-classification" else "text"

    @property
    def vocabulary(self) -> int:
        """Tokens that texts are made of.

        Raises:
            ConfigError: the configuration has none.
        """
        found = self.config.get("vocab_size")
        if not isinstance(found, int):
            raise ConfigError("config.json has no vocab_size: this is no model of texts")
        return found

    @property
    def context_length(self) -> int | None:
        """Most tokens of a sequence; None where the configuration has no limit."""
        return self._first("max_position_embeddings", "n_positions", "max_seq_len")

    @property
    def num_layers(self) -> int | None:
        """Layers; None where the configuration does not say."""
        return self._first("num_hidden_layers", "n_layer", "num_layers")

    def _first(self, *names: str) -> int | None:
        """The first whole number that the configuration has under one of these names."""
        config = self.config
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)


class CustomModel(Section):
    """A module of your own: see docs/backbones.md."""

    kind: Literal["custom"] = Field(default="custom", description="a torch.nn.Module of your own")
    factory: ImportPath = Field(
        description="module and class, or function, that makes it, as module:name; called with num_outputs "
        "(classes, numbers or tokens that it has to tell) and the options; the module is looked for in the "
        "working folder and among what is installed"
    )
    options: Options = Field(default_factory=Keys, description="further arguments of what makes it, by name")
    head: Text | None = Field(
        default=None,
        description="name in the model of its last layer, which gives the outputs; null where none can be "
        "told from the rest",
    )
    blocks: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="names, or patterns of names, of the layers whose activations may be computed again, "
        "none inside another; null for the items of its lists of modules",
    )
    embedding: Text | None = Field(
        default=None, description="name of what makes vectors of tokens; null where it reads no texts"
    )
    vocabulary: int = Field(
        default=256, ge=2, description="tokens that texts are made of; 256 where they are read as bytes"
    )
    context_length: Count | None = Field(
        default=None, description="most tokens of a sequence; null for any number"
    )
    weights: str | None = Field(default=None, description=WEIGHTS)


class ConfigError(Exception):
    """A folder's `config.json` cannot be read, or is of another model."""


def _config(path: Path) -> dict[str, Any]:
    try:
        return _read_config(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


@functools.lru_cache(maxsize=8)
def _read_config(path: Path, changed: int) -> dict[str, Any]:
    """Args:
    changed: when the file was changed, so that it is read again then.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigError(f"{path} has no model_type: it is no model of transformers")
    texts = values.get("text_config")
    return values | texts if isinstance(texts, dict) else values


class Pretrain(Section):
    """Ordinary training of the backbone before meta-training."""

    num_steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences per step, over all ranks")
    lr: PositiveFloat = Field(description="peak learning rate of AdamW")
    warmup_steps: CountOrZero = Field(default=0, description="steps of linear warm-up; fewer than num_steps")
    weight_decay: FloatOrZero = Field(
        default=0.0, description="decoupled weight decay, per unit of learning rate"
    )
    sequence_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="tokens per sequence, at most model.context_length; null for data.sequence_length",
    )
    splits: Annotated[tuple[Literal["train", "rehearsal"], ...], Field(min_length=1)] = Field(
        default=("train", "rehearsal"), description="splits of the data trained on"
    )
