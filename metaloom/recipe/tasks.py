"""What a recipe's tasks are, whatever kind of data they come from.

Shape letters: S support examples, Q query examples, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metaloom.errors import RecipeError
from metaloom.recipe.algorithm import InContextAlgorithm
from metaloom.recipe.data import (
    ArrayInputs,
    ClassesData,
    ClassesRehearsal,
    ClassTargets,
    DocumentsData,
    DocumentsRehearsal,
    EpisodesData,
    GroupsData,
    ImageInputs,
    MixtureData,
    NumberTargets,
    TextInputs,
    TokenTargets,
)
from metaloom.recipe.model import ConfigError, CustomModel, GPTModel, HuggingFaceModel
from metaloom.recipe.schema import Recipe
from metaloom.recipe.synthetic import SyntheticData

ObjectiveName = Literal["classification", "regression", "language_modelling"]
DataSet = ClassesData | GroupsData | DocumentsData | EpisodesData | SyntheticData
InputSection = ImageInputs | ArrayInputs | TextInputs


class UnknownTaskError(Exception):
    """A recipe that does not say what its tasks are: one of its rules is broken, and tells."""


class UnknownModelError(RecipeError, UnknownTaskError):
    """A model of transformers whose folder is not here, or not as it should be. A rule tells of the latter; a
    recipe that is for another machine has the former."""


@dataclass(frozen=True)
class TaskFacts:
    """What a task is.

    Attributes:
        objective: what a model shall do.
        inputs: what it is shown.
        num_outputs: classes of a task, at most, or numbers to predict; None for the vocabulary.
        num_support: S, at most.
        num_query: Q, at most.
        is_ragged: whether tasks differ in S or Q, and are padded side by side.
        has_own_ways: whether tasks differ in their number of classes.
        draws_labels: whether a class number means another class in each task.
    """

    objective: ObjectiveName
    inputs: InputSection
    num_outputs: int | None
    num_support: int
    num_query: int
    is_ragged: bool = False
    has_own_ways: bool = False
    draws_labels: bool = False


def data_sets(recipe: Recipe) -> dict[str, DataSet]:
    """The data sets that tasks are drawn from, by their paths in the recipe."""
    data = recipe.data
    if isinstance(data, MixtureData):
        return {f"data.parts.{row}.data": part.data for row, part in enumerate(data.parts)}
    return {"data": data}


def groups_by_recipe(recipe: Recipe) -> tuple[str, ...]:
    """The groups of tasks that a recipe says itself; none where the data say which there are, if any."""
    return recipe.data.groups if isinstance(recipe.data, SyntheticData) else ()


def may_have_groups(recipe: Recipe) -> bool:
    """Whether tasks of such data can be of groups."""
    return bool(groups_by_recipe(recipe)) or isinstance(recipe.data, GroupsData | EpisodesData | MixtureData)


def num_outputs(recipe: Recipe) -> int:
    """Outputs that a target is read from: classes, tokens of a vocabulary, or numbers."""
    found = task_facts(recipe).num_outputs
    return vocabulary(recipe) if found is None else found


def vocabulary(recipe: Recipe) -> int:
    """Tokens that the model's texts are made of.

    Raises:
        UnknownModelError: the folder of a model of transformers does not say.
    """
    assert isinstance(recipe.model, GPTModel | HuggingFaceModel | CustomModel), (
        "a rule of the recipe has seen to it"
    )
    try:
        return recipe.model.vocabulary
    except ConfigError as error:
        raise UnknownModelError(f"model.hf: {error}.") from error


def context_length(recipe: Recipe) -> int | None:
    """Most tokens of a sequence that the model reads; None for any number, or where it reads no texts.

    Raises:
        UnknownModelError: the folder of a model of transformers does not say.
    """
    if not isinstance(recipe.model, GPTModel | HuggingFaceModel | CustomModel):
        return None
    try:
        return recipe.model.context_length
    except ConfigError as error:
        raise UnknownModelError(f"model.hf: {error}.") from error


def data_weights(recipe: Recipe) -> tuple[float, ...]:
    """The weight of each of `data_sets`."""
    data = recipe.data
    return tuple(part.weight for part in data.parts) if isinstance(data, MixtureData) else (1.0,)


def data_urls(recipe: Recipe) -> dict[str, str]:
    """Every URL that data are read from, by its path in the recipe; synthetic data have none."""
    urls = {
        f"{path}.url": data.url
        for path, data in data_sets(recipe).items()
        if not isinstance(data, SyntheticData)
    }
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.data is not None:
        urls["adaptation.rehearsal.data.url"] = rehearsal.data.url
    return urls


def task_facts(recipe: Recipe) -> TaskFacts:
    """The tasks of a recipe; of several data sets, what holds for all."""
    facts = [facts_of(data) for data in data_sets(recipe).values()]
    first = facts[0]
    is_same = len({(each.num_support, each.num_query) for each in facts}) == 1
    ways = {each.num_outputs for each in facts}
    return TaskFacts(
        objective=first.objective,
        inputs=first.inputs,
        num_outputs=None if None in ways else max(way for way in ways if way is not None),
        num_support=max(each.num_support for each in facts),
        num_query=max(each.num_query for each in facts),
        is_ragged=not is_same or any(each.is_ragged for each in facts),
        has_own_ways=len(ways) > 1 or any(each.has_own_ways for each in facts),
        draws_labels=any(each.draws_labels for each in facts),
    )


def facts_of(data: DataSet) -> TaskFacts:
    """The tasks of one data set."""
    match data:
        case ClassesData(variable=None, n_way=n_way, n_shot=n_shot, n_query=n_query):
            if n_way is None or n_shot is None or n_query is None:
                raise UnknownTaskError
            return TaskFacts(
                "classification", data.inputs, n_way, n_way * n_shot, n_way * n_query, draws_labels=True
            )
        case ClassesData(variable=variable):
            assert variable is not None
            return TaskFacts(
                "classification",
                data.inputs,
                variable.max_way,
                variable.max_support,
                variable.max_way * variable.max_query,
                is_ragged=True,
                has_own_ways=True,
                draws_labels=True,
            )
        case DocumentsData(sequence_length=length):
            inputs = TextInputs.model_construct(length=length)
            return TaskFacts("language_modelling", inputs, None, data.num_support, data.num_query)
        case SyntheticData(task=task):
            inputs_of_task = ArrayInputs.model_construct(shape=task.input_shape)
            return TaskFacts("regression", inputs_of_task, task.num_targets, data.num_support, data.num_query)
    num_query = data.num_query
    if isinstance(data, GroupsData) and data.query_is_support:
        num_query = data.num_support
    if num_query is None:
        raise UnknownTaskError
    objective, num_outputs = _stated(data.targets)
    return TaskFacts(
        objective,
        data.inputs,
        num_outputs,
        data.num_support,
        num_query,
        is_ragged=isinstance(data, EpisodesData) and data.ragged,
        has_own_ways=isinstance(data, EpisodesData) and objective == "classification",
    )


def _stated(targets: object) -> tuple[ObjectiveName, int | None]:
    match targets:
        case ClassTargets(num_classes=num_classes):
            return "classification", num_classes
        case NumberTargets(num_targets=num_targets):
            return "regression", num_targets
        case TokenTargets():
            return "language_modelling", None
        case _:  # of a recipe with mistakes
            raise UnknownTaskError


@dataclass(frozen=True)
class RehearsalFacts:
    """What is rehearsed.

    Attributes:
        objective: what a model shall do.
        inputs: what it is shown.
        num_outputs: of a head of its own; None for the vocabulary.
        shares_head: whether it is the tasks' own objective and head.
    """

    objective: ObjectiveName
    inputs: InputSection
    num_outputs: int | None
    shares_head: bool


def rehearsal_facts(recipe: Recipe) -> RehearsalFacts | None:
    """What a recipe rehearses; None for nothing."""
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is None:
        return None
    is_modelling = task_facts(recipe).objective == "language_modelling"
    match rehearsal.data:
        case ClassesRehearsal(inputs=inputs, num_classes=num_classes):
            return RehearsalFacts("classification", inputs, num_classes, shares_head=False)
        case DocumentsRehearsal(sequence_length=length):
            return RehearsalFacts(
                "language_modelling",
                TextInputs.model_construct(length=length),
                None,
                shares_head=is_modelling,
            )
    if not isinstance(recipe.data, DocumentsData):
        raise UnknownTaskError
    return RehearsalFacts("language_modelling", task_facts(recipe).inputs, None, shares_head=True)


def tokens_per_task(recipe: Recipe) -> int | None:
    """Tokens that one task's inner steps and query pass read, or its one pass where there are no steps; None
    where a model is shown no text."""
    facts, rehearsed = task_facts(recipe), rehearsal_facts(recipe)
    num_inner = recipe.adaptation.num_steps if recipe.maml is not None else 1
    tokens = 0
    if isinstance(recipe.algorithm, InContextAlgorithm):
        return facts.num_query * positions_in_context(recipe)
    if isinstance(facts.inputs, TextInputs):
        tokens += (num_inner * facts.num_support + facts.num_query) * facts.inputs.length
    if rehearsed is not None and isinstance(rehearsed.inputs, TextInputs):
        tokens += (num_rehearsed(recipe, num_inner) + num_rehearsed_outside(recipe)) * rehearsed.inputs.length
    return tokens or None


def num_in_context(recipe: Recipe) -> int:
    """The most support sequences, with the token after each, that fit in front of a query."""
    facts = task_facts(recipe)
    if not isinstance(facts.inputs, TextInputs):
        return 0
    length, longest = facts.inputs.length, context_length(recipe)
    if longest is None:
        return facts.num_support
    room = (longest - length) // (length + 1)
    return max(0, min(facts.num_support, room))


def positions_in_context(recipe: Recipe) -> int:
    """Tokens of the longest prompt and its query."""
    length = num_inputs(task_facts(recipe).inputs)
    return num_in_context(recipe) * (length + 1) + length


def num_rehearsed(recipe: Recipe, num_steps: int) -> int:
    """Samples that one task rehearses in `num_steps` inner steps."""
    rehearsal = recipe.adaptation.rehearsal
    return 0 if rehearsal is None or rehearsal.ratio == 0.0 else rehearsal.num_samples * num_steps


def num_rehearsed_outside(recipe: Recipe) -> int:
    """Samples of rehearsal data in one task's meta-loss."""
    rehearsal = recipe.adaptation.rehearsal
    return 0 if rehearsal is None or rehearsal.outer_ratio == 0.0 else rehearsal.outer_samples


def loss_name(recipe: Recipe) -> str:
    """What the tasks' loss is called where people read it; of what begins with `bits` in bits, not nats."""
    objective = task_facts(recipe).objective
    if objective != "language_modelling":
        return "loss" if objective == "classification" else "mean squared error"
    return "bits per byte" if vocabulary(recipe) == 256 else "bits per token"


def num_inputs(inputs: InputSection) -> int:
    """Numbers of one sample."""
    match inputs:
        case ImageInputs(size=size, channels=channels):
            return channels * size * size
        case ArrayInputs(shape=shape):
            return math.prod(shape)
        case TextInputs(length=length):
            return length


def shape_of(inputs: InputSection) -> Sequence[int]:
    """The shape of one sample as a model takes it."""
    match inputs:
        case ImageInputs(size=size, channels=channels):
            return (channels, size, size)
        case ArrayInputs(shape=shape):
            return shape
        case TextInputs(length=length):
            return (length,)
