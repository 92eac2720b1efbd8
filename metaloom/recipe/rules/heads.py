"""Rules about linear heads, and about features that stand under them."""

from metaloom.recipe.algorithm import ProtonetAlgorithm
from metaloom.recipe.heads import LogisticAlgorithm, RidgeAlgorithm, SVMAlgorithm
from metaloom.recipe.model import Conv4Model
from metaloom.recipe.rules.base import Broken, Rule, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import task_facts


def a_bias_has_an_effect(recipe: Recipe) -> Broken:
    algorithm = recipe.algorithm
    if not isinstance(algorithm, RidgeAlgorithm) or task_facts(recipe).objective != "classification":
        return
    because = "has no effect, since the same number on all logits changes no probability"
    if algorithm.bias != 0.0:
        yield "algorithm.bias", f"{algorithm.bias}; {because}; set it to 0"
    if "bias" in algorithm.learned:
        yield "algorithm.learned", f"bias {because}; leave it out"


def learned_parameters_of_a_head_are_listed_once(recipe: Recipe) -> Broken:
    if isinstance(recipe.algorithm, RidgeAlgorithm | LogisticAlgorithm | SVMAlgorithm):
        yield from repeated("algorithm.learned", recipe.algorithm.learned)


def chunks_do_not_change_batch_statistics(recipe: Recipe) -> Broken:
    algorithm, model = recipe.algorithm, recipe.model
    if not isinstance(algorithm, ProtonetAlgorithm | RidgeAlgorithm | LogisticAlgorithm | SVMAlgorithm):
        return
    has_batch_norm = isinstance(model, Conv4Model) and model.norm == "batch"
    if algorithm.feature_chunk is not None and has_batch_norm:
        yield (
            "algorithm.feature_chunk",
            f"{algorithm.feature_chunk}; model.norm = batch normalises by the statistics of all of a "
            "task's examples, which chunks would change; set it to null, or model.norm to none",
        )


RULES: tuple[Rule, ...] = (
    a_bias_has_an_effect,
    learned_parameters_of_a_head_are_listed_once,
    chunks_do_not_change_batch_statistics,
)
