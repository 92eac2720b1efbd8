"""Learners that are given the support set, and language models that have it in context."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import nn

from metaloom.build.model import model_structure, task_output
from metaloom.engine.algorithms.feed_forward import FeedForward
from metaloom.engine.algorithms.in_context import InContext
from metaloom.engine.algorithms.neural_process import NeuralProcess
from metaloom.engine.algorithms.set_learner import SetLearner, SetReader
from metaloom.engine.backbone import Backbone
from metaloom.engine.precision import Precision
from metaloom.models import neural_process
from metaloom.models.attention_learner import AttentionLearner
from metaloom.models.recurrent_learner import RecurrentLearner
from metaloom.recipe import AttentionLearnerAlgorithm, CNPAlgorithm, Recipe, RecurrentLearnerAlgorithm
from metaloom.recipe.tasks import num_in_context, task_facts
from metaloom.weights import HeldModel

SetLearnerSection = CNPAlgorithm | AttentionLearnerAlgorithm | RecurrentLearnerAlgorithm


def build_set_learner(recipe: Recipe, section: SetLearnerSection, backbone: Backbone) -> FeedForward:
    """A network that reads support sets, over the features of the recipe's model."""
    facts = task_facts(recipe)
    assert facts.num_outputs is not None, "a rule of the recipe has seen to it"
    is_regression = facts.objective == "regression"
    num_features, num_labels = _num_features(backbone), facts.num_outputs

    def make() -> nn.Module:
        match section:
            case CNPAlgorithm() if is_regression:
                return neural_process.NeuralProcess(
                    num_features=num_features,
                    num_targets=num_labels,
                    width=section.width,
                    num_layers=section.num_layers,
                    min_std=section.min_std,
                )
            case CNPAlgorithm():
                return neural_process.ClassNeuralProcess(
                    num_features=num_features,
                    num_classes=num_labels,
                    width=section.width,
                    num_layers=section.num_layers,
                )
            case AttentionLearnerAlgorithm():
                return AttentionLearner(
                    num_features=num_features,
                    num_labels=num_labels,
                    width=section.width,
                    num_layers=section.num_layers,
                    num_heads=section.num_heads,
                    num_outputs=num_labels,
                )
            case RecurrentLearnerAlgorithm():
                return RecurrentLearner(
                    num_features=num_features,
                    num_labels=num_labels,
                    width=section.width,
                    num_layers=section.num_layers,
                    num_outputs=num_labels,
                )

    reader = SetReader(backbone, _drawn(recipe, backbone, make), None if is_regression else num_labels)
    if isinstance(section, CNPAlgorithm) and is_regression:
        return NeuralProcess(reader)
    return SetLearner(reader, task_output(recipe).criterion)


def build_in_context(recipe: Recipe, model: HeldModel) -> InContext:
    """The recipe's language model, with as many support sequences in front of a query as fit."""
    return InContext(
        model.module,
        model_structure(model.module),
        task_output(recipe).head,
        Precision(recipe.precision.compute),
        num_in_context(recipe),
        recompute_blocks=recipe.memory.recompute_blocks,
    )


def _num_features(backbone: Backbone) -> int:
    name = backbone.structure.head_of(backbone.head)
    assert name is not None, "the backbone has seen to it"
    head = backbone.model.get_submodule(name)
    assert isinstance(head, nn.Linear), "the built-in models have linear heads"
    return head.in_features


def _drawn(recipe: Recipe, backbone: Backbone, make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose initial weights follow from the recipe's seed, where the model's weights are."""
    like = next(backbone.model.parameters())
    with torch.random.fork_rng(devices=[]):
        # Another seed than the model's, whose weights would begin with the same numbers.
        torch.manual_seed(zlib.crc32(f"network {recipe.seed}".encode()))
        network = make()
    return network.to(like.device, like.dtype).requires_grad_(False)
