"""The sections of a recipe that say which network is meta-trained, and what it has learned before."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import BelowOne, Count, CountOrZero, FloatOrZero, PositiveFloat, Section

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
