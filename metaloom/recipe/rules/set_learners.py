"""Rules about learners that are given the support set, and about language models that have it in context."""

from metaloom.recipe.algorithm import (
    AttentionLearnerAlgorithm,
    CNPAlgorithm,
    InContextAlgorithm,
    RecurrentLearnerAlgorithm,
)
from metaloom.recipe.data import DocumentsData
from metaloom.recipe.machine import ShardedSharding
from metaloom.recipe.model import HuggingFaceModel
from metaloom.recipe.rules.base import Broken, Rule
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import (
    context_length,
    data_sets,
    num_in_context,
    num_inputs,
    positions_in_context,
    task_facts,
)

SET_LEARNERS = (CNPAlgorithm, AttentionLearnerAlgorithm, RecurrentLearnerAlgorithm)


def set_learners_label_examples(recipe: Recipe) -> Broken:
    objective = task_facts(recipe).objective
    if isinstance(recipe.algorithm, SET_LEARNERS) and objective == "language_modelling":
        yield (
            "algorithm.kind",
            f"{recipe.algorithm.kind} reads examples with a label each, and the tasks are {objective}; take "
            "in_context, or maml",
        )


def heads_divide_the_learners_width(recipe: Recipe) -> Broken:
    section = recipe.algorithm
    if isinstance(section, AttentionLearnerAlgorithm) and section.width % section.num_heads:
        yield (
            "algorithm.width",
            f"{section.width}; must be a multiple of algorithm.num_heads = {section.num_heads}, "
            f"for example {max(1, round(section.width / section.num_heads)) * section.num_heads}",
        )


def a_deviation_is_predicted(recipe: Recipe) -> Broken:
    section = recipe.algorithm
    if (
        isinstance(section, CNPAlgorithm)
        and section.min_std != CNPAlgorithm().min_std
        and task_facts(recipe).objective == "classification"
    ):
        yield (
            "algorithm.min_std",
            f"{section.min_std}; has no effect, since the tasks are classification, and standard deviations "
            "are predicted of numbers; leave it out",
        )


def in_context_a_support_sequence_fits(recipe: Recipe) -> Broken:
    asker = _asker(recipe)
    if asker is None:
        return
    path, name = asker
    if not all(isinstance(data, DocumentsData) for data in data_sets(recipe).values()):
        yield (
            path,
            f"'{name}' puts the text before a query in front of it, which data.kind = documents alone has, "
            f"and data.kind is {recipe.data.kind}; take another",
        )
        return
    longest = context_length(recipe)
    if longest is not None and num_in_context(recipe) == 0:
        length = num_inputs(task_facts(recipe).inputs)
        is_fixed = isinstance(recipe.model, HuggingFaceModel)
        ways_out = "" if is_fixed else f"raise it to {2 * length + 1} or more, or "
        yield (
            "model.hf" if is_fixed else "model.context_length",
            f"{longest}{' positions' if is_fixed else ''}; '{name}' ({path}) needs room for a support "
            f"sequence and the token after it, {length + 1} tokens, in front of a query of {length}; "
            f"{ways_out}lower data.sequence_length",
        )


def positions_in_context_are_trained(recipe: Recipe) -> Broken:
    names, pretrain = _baselines(recipe), recipe.pretrain
    if not names or recipe.model.weights is not None or num_in_context(recipe) == 0:
        return
    needed = positions_in_context(recipe)
    if pretrain is None:
        yield (
            "evaluation.baselines",
            f"'{names[0]}' reads {needed} tokens at once, and no training before has seen so many; give "
            "model.weights or pretrain, or remove it from the list",
        )
        return
    trained = pretrain.sequence_length or num_inputs(task_facts(recipe).inputs)
    if trained < needed:
        yield (
            "pretrain.sequence_length",
            f"{trained if pretrain.sequence_length else 'null'}; pre-training sees {trained} tokens at once, "
            f"and '{names[0]}' (evaluation.baselines) reads {needed}; set it to {needed} or more, or remove "
            "that baseline",
        )


def in_context_weights_are_whole(recipe: Recipe) -> Broken:
    names = _baselines(recipe)
    if names and isinstance(recipe.sharding, ShardedSharding):
        yield (
            "evaluation.baselines",
            f"'{names[0]}' computes with whole weights, and sharding.kind is sharded; remove it from the "
            "list",
        )


def _asker(recipe: Recipe) -> tuple[str, str] | None:
    """What has support sequences in front of queries, and where the recipe asks for it; None for nothing."""
    if isinstance(recipe.algorithm, InContextAlgorithm):
        return "algorithm.kind", recipe.algorithm.kind
    return next((("evaluation.baselines", name) for name in _baselines(recipe)), None)


def _baselines(recipe: Recipe) -> list[str]:
    """The baselines in context that are asked for."""
    return [name for name in recipe.baselines if name.startswith("in_context")]


RULES: tuple[Rule, ...] = (
    set_learners_label_examples,
    heads_divide_the_learners_width,
    a_deviation_is_predicted,
    in_context_a_support_sequence_fits,
    positions_in_context_are_trained,
    in_context_weights_are_whole,
)
