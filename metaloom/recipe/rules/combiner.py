"""Rules about how the meta-gradients of tasks are combined."""

from metaloom.engine.capabilities import KINDS, Kind
from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.combiner import DWACombiner, MeanCombiner
from metaloom.recipe.rules.base import Broken, Rule, of_maml, repeated
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import may_have_groups

# What looks at single tasks side by side, or at groups side by side: of one there is nothing to compare.
COMPARING = ("pcgrad", "mgda", "gradnorm")


def weighed_groups_exist(recipe: Recipe) -> Broken:
    combiner = recipe.outer.combiner
    if combiner.weighs_groups and not may_have_groups(recipe):
        yield (
            "outer.combiner.kind",
            f"{combiner.kind}; weighs groups of tasks, and tasks of data.kind {recipe.data.kind} have none; "
            "take data.kind groups or mixture, episodes that state their group, or another combiner",
        )


def there_are_tasks_to_compare(recipe: Recipe) -> Broken:
    combiner = recipe.outer.combiner
    if recipe.outer.tasks_per_step > 1:
        return
    if combiner.kind in COMPARING:
        yield (
            "outer.combiner.kind",
            f"{combiner.kind}; has no effect, since outer.tasks_per_step is 1 and it compares the tasks of a "
            "step; raise outer.tasks_per_step, or set it to mean",
        )
    if combiner.measures_cosines:
        yield (
            "outer.combiner.log_cosines",
            "true; has no effect, since outer.tasks_per_step is 1 and a step has no pairs of tasks; "
            "raise outer.tasks_per_step, or leave it out",
        )


def single_tasks_are_no_micro_batch(recipe: Recipe) -> Broken:
    combiner, micro_batch = recipe.outer.combiner, recipe.outer.micro_batch
    if combiner.is_per_task and micro_batch is not None and micro_batch > 1:
        option = ".log_cosines = true" if isinstance(combiner, MeanCombiner) else f".kind = {combiner.kind}"
        yield (
            "outer.micro_batch",
            f"{micro_batch}; has no effect, since outer.combiner{option} differentiates one task at a time; "
            "leave it out",
        )


def losses_are_compared_in_time(recipe: Recipe) -> Broken:
    combiner = recipe.outer.combiner
    if isinstance(combiner, DWACombiner) and 2 * combiner.num_steps >= recipe.outer.num_steps:
        yield (
            "outer.combiner.num_steps",
            f"{combiner.num_steps}; weights change after twice as many outer steps, and outer.num_steps is "
            f"{recipe.outer.num_steps}; lower it",
        )


def combined_kinds_differ(recipe: Recipe) -> Broken:
    yield from repeated("outer.combiner.of", recipe.outer.combiner.combined)


@of_maml
def combined_kinds_are_learned(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    learned = maml.meta_parameters
    kinds: dict[Kind, bool] = {
        "init": learned.init,
        "backbone": bool(learned.backbone) or recipe.adaptation.norms.weights == "per_step",
        "rates": recipe.adaptation.rule.learned != "none",
        "loss": bool(recipe.adaptation.loss.learned),
    }
    shown = ", ".join(kind for kind in KINDS if kinds[kind])
    for position, entry in enumerate(recipe.outer.combiner.combined):
        kind = entry.partition(".")[0]
        is_pattern = any(sign in kind for sign in "*?[")
        if not is_pattern and not (kind in KINDS and kinds[kind]):
            yield (
                f"outer.combiner.of.{position}",
                f"{entry!r}; is no meta-parameter of this run, which learns {shown}; name these, or patterns "
                "of their names",
            )


RULES: tuple[Rule, ...] = (
    weighed_groups_exist,
    there_are_tasks_to_compare,
    single_tasks_are_no_micro_batch,
    losses_are_compared_in_time,
    combined_kinds_differ,
    combined_kinds_are_learned,
)
