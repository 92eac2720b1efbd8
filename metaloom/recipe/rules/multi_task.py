"""Rules about models for groups that ask different things of the same inputs."""

from metaloom.recipe.algorithm import MultiTaskAlgorithm
from metaloom.recipe.model import Conv4Model, MLPModel
from metaloom.recipe.rules.base import Broken, Rule, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.synthetic import SyntheticData
from metaloom.recipe.tasks import groups_by_recipe, may_have_groups


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
    section = recipe.algorithm
    if isinstance(section, MultiTaskAlgorithm):
        yield from named_groups(
            recipe,
            section.groups,
            path="algorithm.groups",
            asker=("algorithm.kind", "multi_task; it has parts for each group of tasks"),
            remedy="algorithm.kind = erm",
        )


def named_groups(
    recipe: Recipe, groups: tuple[str, ...] | None, *, path: str, asker: tuple[str, str], remedy: str
) -> Broken:
    """What is wrong with the names of groups that something is made for.

    Args:
        groups: the names that the recipe gives; None for none.
        path: where it does.
        asker: path and value of what asks for groups, and why.
        remedy: what would do without.
    """
    data, own = recipe.data, groups_by_recipe(recipe)
    if own:
        if groups is not None:
            yield (
                path,
                f"{', '.join(groups)}; those of data.task are {', '.join(own)}, and need not be named; leave "
                "it out",
            )
        return
    asked_at, because = asker
    if not may_have_groups(recipe):
        kind = data.task.kind if isinstance(data, SyntheticData) else data.kind
        yield (
            asked_at,
            f"{because}, and those of {kind} have no groups; take data.kind groups or mixture, episodes that "
            f"state their group, or {remedy}",
        )
    elif groups is None:
        yield path, f"missing; name the groups of the training tasks, since {because.partition('; ')[2]}"
    yield from repeated(path, groups or ())


RULES: tuple[Rule, ...] = (
    groups_share_blocks,
    groups_are_known,
)
