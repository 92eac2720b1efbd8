"""Algorithms that adapt to inputs without their labels, and the one that does not adapt."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from metaloom.build.model import model_structure, task_output
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.arm import ArmBn, ArmCml
from metaloom.engine.algorithms.erm import Erm
from metaloom.engine.algorithms.feed_forward import FeedForward
from metaloom.engine.algorithms.multi_task import MultiTask
from metaloom.engine.precision import Precision
from metaloom.engine.whole_model import WholeModel
from metaloom.models.context import ConvContext, MlpContext
from metaloom.recipe import (
    ARMBNAlgorithm,
    ARMCMLAlgorithm,
    Conv4Model,
    ERMAlgorithm,
    GroupsData,
    ImageInputs,
    MultiTaskAlgorithm,
    Recipe,
)
from metaloom.recipe.tasks import data_sets, groups_by_recipe, num_inputs, task_facts
from metaloom.weights import HeldModel


def build_unlabelled(
    recipe: Recipe,
    section: ERMAlgorithm | MultiTaskAlgorithm | ARMCMLAlgorithm | ARMBNAlgorithm,
    model: HeldModel,
    device: torch.device,
) -> FeedForward:
    """The algorithm of such a section."""
    output, precision = task_output(recipe), Precision(recipe.precision.compute)
    whole = WholeModel(
        model.module,
        model_structure(model.module),
        output.head,
        precision,
        recompute_blocks=recipe.memory.recompute_blocks,
    )
    match section:
        case ERMAlgorithm():
            return Erm(whole, output.criterion)
        case MultiTaskAlgorithm():
            # What is read is not one output, but that of each task's group.
            named = dataclasses.replace(whole, head=None)
            return MultiTask(named, output.criterion, section.groups or groups_by_recipe(recipe))
        case ARMBNAlgorithm():
            return ArmBn(whole, output.criterion, is_own_context(recipe))
    network = build_context(recipe, section).to(device=device, dtype=precision.storage_dtype)
    context = WholeModel(network, Structure(), None, precision, prefix=f"{BACKBONE}context.")
    return ArmCml(context, whole, output.criterion, is_own_context(recipe))


def build_context(recipe: Recipe, section: ARMCMLAlgorithm) -> nn.Module:
    """The context network, normalised as the model is, with its initial weights, which follow from the
    seed."""
    inputs = task_facts(recipe).inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if isinstance(inputs, ImageInputs):
            assert isinstance(recipe.model, Conv4Model), "a rule of the recipe has seen to it"
            return ConvContext(
                num_channels=inputs.channels,
                num_context=section.num_context,
                width=section.width,
                norm=recipe.model.norm,
            )
        return MlpContext(num_inputs=num_inputs(inputs), num_context=section.num_context, width=section.width)


def is_own_context(recipe: Recipe) -> bool:
    """Whether the queries of all tasks are their support examples."""
    return all(isinstance(data, GroupsData) and data.query_is_support for data in data_sets(recipe).values())
