"""Rules about models for groups that ask different things of the same inputs."""

from metaloom.recipe.algorithm import MultiTaskAlgorithm
from metaloom.recipe.data import EpisodesData, GroupsData, MixtureData
from metaloom.recipe.model import Conv4Model, MLPModel
from metaloom.recipe.rules.base import Broken, Rule, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.synthetic import SyntheticData


def groups_share_blocks(recipe: Recipe) -> Broken:
    if isinstance(recipe.algorithm, MultiTaskAlgorithm) and not isinstance(
        recipe.model, MLPModel | Conv4Model
    ):
        yield (
            "algorithm.kind",
            f"multi_task; is made of the blocks of mlp and conv4, and model.kind is {recipe.model.kind}; "
            "take one of these, or algorithm.kind = erm",
        )


def groups_are_known(recipe: Recipe) -> Broken:
    section, data = recipe.algorithm, recipe.data
    if not isinstance(section, MultiTaskAlgorithm):
        return
    own = data.groups if isinstance(data, SyntheticData) else ()
    if own and section.groups is not None:
        yield (
            "algorithm.groups",
            f"{', '.join(section.groups)}; those of data.task are {', '.join(own)}, and need not be named; "
            "leave it out",
        )
    if own:
        return
    if not isinstance(data, GroupsData | EpisodesData | MixtureData):
        kind = data.task.kind if isinstance(data, SyntheticData) else data.kind
        yield (
            "algorithm.kind",
            f"multi_task; has parts for each group of tasks, and those of {kind} have no groups; take "
            "data.kind groups or mixture, episodes that state their group, or algorithm.kind = erm",
        )
    elif section.groups is None:
        yield (
            "algorithm.groups",
            "missing; name the groups of the data, since the model has parts for each of them",
        )
    yield from repeated("algorithm.groups", section.groups or ())


RULES: tuple[Rule, ...] = (
    groups_share_blocks,
    groups_are_known,
)
