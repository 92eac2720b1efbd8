"""The recipe's network, its outputs, and how its weights lie on the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from metaloom.build.custom_model import make_custom
from metaloom.engine.adapters.model import Structure
from metaloom.engine.losses import Criterion, CrossEntropy, MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero, ZeroSettings
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import ReadRows, Sharded
from metaloom.errors import CapabilityError
from metaloom.models.as_function import AsFunction
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import Gpt
from metaloom.models.mlp import Mlp
from metaloom.models.multi_task import CrossStitch, Film, MultiHead, MultiTask, Network
from metaloom.models.single_layer import SingleLayer, convolution, linear, locally_connected
from metaloom.recipe import (
    ActivationsRegularisation,
    ARMCMLAlgorithm,
    Conv4Model,
    ConvolutionLayer,
    CustomModel,
    DeepSpeedZeroSharding,
    GPTModel,
    HuggingFaceModel,
    ImageInputs,
    LinearLayer,
    LocallyConnectedLayer,
    MLPModel,
    MultiTaskAlgorithm,
    Recipe,
    ReplicatedSharding,
    ShardedSharding,
    SingleLayerModel,
)
from metaloom.recipe.tasks import (
    groups_by_recipe,
    num_inputs,
    rehearsal_facts,
    shape_of,
    task_facts,
    vocabulary,
)
from metaloom.weights import HeldModel, Source, hold, of_file, of_pretrained

if TYPE_CHECKING:
    from metaloom.models.hugging_face import HuggingFaceTask, Pooling

_ONE_HEAD = (
    "adaptation.rehearsal.data reads a head of its own, and {} has the tasks' alone: rehearse what the tasks "
    "are (documents beside documents), or documents beside classes of texts."
)


def build_sharding(recipe: Recipe, device: torch.device) -> Sharding:
    """How the meta-parameters lie on the ranks. Every rank must call."""
    match recipe.sharding:
        case ShardedSharding(shard_size=shard_size):
            return Sharded(device, shard_size=shard_size)
        case ReplicatedSharding(bucket_mib=bucket_mib):
            return Replicated(bucket_bytes=int(bucket_mib * 2**20))
        case DeepSpeedZeroSharding(stage=stage, offload_optimizer=offload_optimizer, extra=extra):
            return DeepSpeedZero(ZeroSettings(stage, offload_optimizer, extra), device)


def build_model(
    recipe: Recipe, device: torch.device, sharding: Sharding, *, num_classes: int | None = None
) -> HeldModel:
    """The recipe's model with its initial weights: those of `model.weights`, or such as follow from the seed.

    Args:
        num_classes: outputs of a classifier; as many as a task has classes where None.

    Raises:
        CheckpointError: `model.weights` cannot be read, or belongs to another model.
    """

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return _make_model(recipe, num_classes)

    return hold(
        make,
        _source(recipe),
        sharding,
        device,
        Precision(recipe.precision.compute).storage_dtype,
    )


def _source(recipe: Recipe) -> Source | None:
    """Where the initial weights are read."""
    if recipe.model.weights is None:
        return None
    path = Path(recipe.model.weights)
    if not isinstance(recipe.model, HuggingFaceModel):
        return of_file(path)

    std = recipe.model.config.get("initializer_range", 0.02)

    def source(module: nn.Module) -> ReadRows:
        assert isinstance(module, AsFunction)
        assert module.head_name is not None
        read = of_pretrained(
            path, own_names=module.own_names, head=module.head_name, std=std, seed=recipe.seed
        )
        return read(module)

    return source


def _make_model(recipe: Recipe, num_classes: int | None) -> nn.Module:
    section = recipe.algorithm
    if not isinstance(section, MultiTaskAlgorithm):
        return _make_network(recipe, num_classes)

    def make() -> Network:
        network = _make_network(recipe, num_classes)
        assert isinstance(network, Mlp | Conv4), "a rule of the recipe has seen to it"
        return network

    groups = section.groups or groups_by_recipe(recipe)
    kinds: dict[str, type[MultiHead | Film | CrossStitch]] = {
        "multi_head": MultiHead,
        "film": Film,
        "cross_stitch": CrossStitch,
    }
    return kinds[section.architecture](make, groups)


def _make_network(recipe: Recipe, num_classes: int | None) -> nn.Module:
    facts, rehearsed = task_facts(recipe), rehearsal_facts(recipe)
    num_context = recipe.algorithm.num_context if isinstance(recipe.algorithm, ARMCMLAlgorithm) else 0
    num_outputs = num_classes or facts.num_outputs
    own_head = None if rehearsed is None or rehearsed.shares_head else rehearsed.num_outputs
    section = recipe.regularisation
    stochastic = section if isinstance(section, ActivationsRegularisation) else None
    match recipe.model:
        case Conv4Model(width=width, num_blocks=num_blocks, norm=norm):
            assert isinstance(facts.inputs, ImageInputs)
            assert num_outputs is not None
            return Conv4(
                num_classes=num_outputs,
                width=width,
                num_blocks=num_blocks,
                norm=norm,
                num_channels=facts.inputs.channels + num_context,
                num_rehearsal_classes=own_head,
                bottleneck=None if stochastic is None else stochastic.width,
            )
        case MLPModel(width=width, num_layers=num_layers, activation=activation):
            assert num_outputs is not None
            return Mlp(
                num_inputs=num_inputs(facts.inputs) + num_context,
                width=width,
                num_layers=num_layers,
                num_outputs=num_outputs,
                activation=activation,
                num_rehearsal_outputs=own_head,
                widths=recipe.model.widths,
                bottleneck=None if stochastic is None else (stochastic.after or num_layers, stochastic.width),
            )
        case SingleLayerModel(layer=layer, bias=bias):
            assert num_outputs is not None
            shape = shape_of(facts.inputs)
            match layer:
                case LinearLayer():
                    return linear(shape, num_outputs, bias=bias)
                case LocallyConnectedLayer(kernel_size=kernel_size):
                    return locally_connected(shape, num_outputs, kernel_size=kernel_size, bias=bias)
                case ConvolutionLayer(kernel_size=kernel_size):
                    return convolution(shape, num_outputs, kernel_size=kernel_size, bias=bias)
        case HuggingFaceModel(hf=folder, task=task):
            if own_head is not None:
                raise CapabilityError(_ONE_HEAD.format("a model of transformers"))
            return _of_transformers(
                Path(folder),
                task,
                num_outputs,
                recipe.model.pooling,
                keeps_language_head=_has_language_head(recipe),
            )
        case CustomModel():
            if own_head is not None:
                raise CapabilityError(_ONE_HEAD.format("a model of your own"))
            return make_custom(recipe.model, num_outputs or vocabulary(recipe))
        case GPTModel():
            return Gpt(
                num_layers=recipe.model.num_layers,
                width=recipe.model.width,
                num_heads=recipe.model.num_heads,
                context_length=recipe.model.context_length,
                tied_embeddings=recipe.model.tied_embeddings,
                dropout=recipe.model.dropout,
                vocabulary=recipe.model.vocabulary,
                num_classes=num_outputs,
            )


def _of_transformers(
    folder: Path,
    task: HuggingFaceTask,
    num_outputs: int | None,
    pooling: Pooling | None,
    *,
    keeps_language_head: bool,
) -> nn.Module:
    # Takes seconds to import, and is there where it is asked for alone.
    try:
        from metaloom.models.hugging_face import make_model
    except ImportError as error:
        raise CapabilityError("model.hf needs transformers: pip install 'metaloom[transformers]'.") from error
    try:
        return make_model(
            folder,
            task,
            num_outputs=num_outputs,
            pooling=pooling or "mean",
            keeps_language_head=keeps_language_head,
        )
    except (ValueError, OSError) as error:
        raise CapabilityError(f"model.hf: {folder}: {error}") from error


def model_structure(model: nn.Module) -> Structure:
    """Where a model can be taken apart: the built-in ones alike have `blocks` and `heads`."""
    if isinstance(model, MultiTask):
        return Structure(model.block_names)  # a task's name says which output is read
    if isinstance(model, AsFunction):
        heads: str | Mapping[str, str] | None = model.head_name
        if model.language_head_name is not None:
            assert model.head_name is not None
            heads = {"classification": model.head_name, "language_modelling": model.language_head_name}
        return Structure(model.block_names, heads, model.embedding_name)
    names = [name for name, _ in model.named_modules()]
    blocks = tuple(name for name in names if name.startswith("blocks.") and name.count(".") == 1)
    assert isinstance(model, Conv4 | Mlp | SingleLayer | Gpt)
    return Structure(blocks, model.heads, "token_embedding" if isinstance(model, Gpt) else None)


@dataclasses.dataclass(frozen=True)
class Output:
    """Which output of a model is read, None of one that has one alone; and what it is judged by."""

    head: str | None
    criterion: Criterion


def task_output(recipe: Recipe) -> Output:
    """What tasks read of the model."""
    objective = task_facts(recipe).objective
    criterion = MeanSquaredError() if objective == "regression" else CrossEntropy()
    if isinstance(recipe.model, HuggingFaceModel | CustomModel):
        return Output("classification" if _has_language_head(recipe) else None, criterion)
    return Output(objective if isinstance(recipe.model, GPTModel) else "tasks", criterion)


def rehearsal_output(recipe: Recipe) -> Output:
    """What rehearsal reads of the model."""
    rehearsed = rehearsal_facts(recipe)
    if rehearsed is None or rehearsed.shares_head:
        return task_output(recipe)
    # Of a language model, its own: that it was trained by before.
    is_language = isinstance(recipe.model, GPTModel) or _has_language_head(recipe)
    return Output("language_modelling" if is_language else "rehearsal", CrossEntropy())


def _has_language_head(recipe: Recipe) -> bool:
    """Whether a model of transformers that tells classes apart has the head that its rehearsal reads, too."""
    rehearsed = rehearsal_facts(recipe)
    return (
        isinstance(recipe.model, HuggingFaceModel)
        and recipe.model.task == "sequence-classification"
        and rehearsed is not None
        and rehearsed.objective == "language_modelling"
    )
