"""Rules about groups, and about methods that adapt to inputs without their labels."""

from metaloom.recipe.algorithm import ARMBNAlgorithm, ARMCMLAlgorithm, ERMAlgorithm, MultiTaskAlgorithm
from metaloom.recipe.data import ClassesData, GroupsData
from metaloom.recipe.model import Conv4Model, MLPModel, SingleLayerModel
from metaloom.recipe.rules.base import Broken, Rule
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import data_sets, task_facts


def queries_are_given_or_are_the_support(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, GroupsData):
            continue
        if data.num_query is None and not data.query_is_support:
            yield f"{path}.num_query", "missing; give it, or set query_is_support to true"
        if data.num_query is not None and data.query_is_support:
            yield (
                f"{path}.num_query",
                f"{data.num_query}; has no effect, since {path}.query_is_support is true and the queries are "
                f"the {data.num_support} support examples; leave it out",
            )


def labels_of_queries_are_not_read(recipe: Recipe) -> Broken:
    if recipe.adapts_without_labels:
        return
    for path, data in data_sets(recipe).items():
        if isinstance(data, GroupsData) and data.query_is_support:
            yield (
                f"{path}.query_is_support",
                f"true; algorithm.kind = {recipe.algorithm.kind} adapts to the labels of support examples, "
                "which would be those that it is judged by; set it to false, or take erm, arm_cml, arm_bn, "
                "or adaptation.learned_loss",
            )


def unlabelled_classes_are_fixed(recipe: Recipe) -> Broken:
    if not recipe.adapts_without_labels:
        return
    for path, data in data_sets(recipe).items():
        if isinstance(data, ClassesData) and data.labels != "kept":
            yield (
                f"{path}.labels",
                f"{data.labels}; every task gives its classes other labels, and {_method(recipe)} reads none "
                "of them; set it to kept, or take other data",
            )


def baselines_have_labels(recipe: Recipe) -> Broken:
    if recipe.adapts_without_labels and recipe.evaluation.baselines:
        yield (
            "evaluation.baselines",
            f"{', '.join(recipe.evaluation.baselines)}; baselines adapt to labelled support data, and "
            f"{_method(recipe)} has no labels; leave them out, and compare with a run of "
            "algorithm.kind = erm",
        )


def erm_sees_one_example_at_a_time(recipe: Recipe) -> Broken:
    section = recipe.algorithm
    if isinstance(section, ERMAlgorithm | MultiTaskAlgorithm) and _has_batch_norm(recipe):
        yield (
            "model.norm",
            "batch; takes the statistics of a task's inputs, which is to adapt to them, and algorithm.kind = "
            f"{section.kind} is not to; set it to layer or none, or algorithm.kind to arm_bn",
        )


def arm_bn_needs_batch_norm(recipe: Recipe) -> Broken:
    if isinstance(recipe.algorithm, ARMBNAlgorithm) and not _has_batch_norm(recipe):
        yield (
            "algorithm.kind",
            "arm_bn; adapts by the statistics of batch norm, and the model has none; take model.kind = conv4 "
            "with model.norm = batch, or another algorithm, for example arm_cml",
        )


def arm_cml_has_a_place_for_the_context(recipe: Recipe) -> Broken:
    if isinstance(recipe.algorithm, ARMCMLAlgorithm) and not isinstance(
        recipe.model, Conv4Model | MLPModel | SingleLayerModel
    ):
        yield (
            "algorithm.kind",
            "arm_cml; shows the context as channels beside an image's or numbers beside an array's, and "
            f"model.kind = {recipe.model.kind} has no place for it; take another algorithm, or other data",
        )


def a_learned_loss_stands_alone(recipe: Recipe) -> Broken:
    adaptation = recipe.adaptation
    if adaptation.learned_loss is None or recipe.maml is None:
        return
    because = "has no effect, since adaptation.learned_loss is in the place of the loss of the labels"
    loss = adaptation.loss
    for name, neutral in (("temperature", 1.0), ("label_smoothing", 0.0)):
        if getattr(loss, name) != neutral:
            yield f"adaptation.loss.{name}", f"{getattr(loss, name)}; {because}; leave it out"
    if loss.learned:
        yield "adaptation.loss.learned", f"{', '.join(loss.learned)}; {because}; set it to []"
    if adaptation.rehearsal is not None and adaptation.rehearsal.ratio > 0.0:
        yield (
            "adaptation.rehearsal.ratio",
            f"{adaptation.rehearsal.ratio}; adaptation.learned_loss takes no other loss beside it; set it to "
            "0, and rehearse in the meta-loss (outer_ratio)",
        )
    if recipe.memory.head_chunk is not None:
        yield (
            "memory.head_chunk",
            f"{recipe.memory.head_chunk}; adaptation.learned_loss sees all outputs at once; set it to null",
        )
    facts = task_facts(recipe)
    if facts.objective == "language_modelling" or facts.has_own_ways:
        what = "tokens of a vocabulary" if not facts.has_own_ways else "classes whose number differs"
        yield (
            "adaptation.learned_loss",
            f"given; reads as many outputs of each example, and the tasks tell {what}; set it to null",
        )


def streams_are_of_groups(recipe: Recipe) -> Broken:
    if not recipe.evaluation.stream:
        return
    if not isinstance(recipe.data, GroupsData):
        yield (
            "evaluation.stream",
            f"true; goes through the inputs of a group, and data.kind is {recipe.data.kind}; set it to false",
        )
    elif recipe.data.query_is_support and recipe.data.num_support < 2:
        yield (
            "evaluation.stream",
            "true; a stream has at least two inputs, and data.num_support is 1; raise it",
        )
    if not recipe.adapts_without_labels:
        yield (
            "evaluation.stream",
            f"true; the inputs of a stream have no labels, and algorithm.kind = {recipe.algorithm.kind} "
            "adapts to labels; set it to false",
        )
    elif recipe.maml is not None and _has_batch_norm(recipe):
        yield (
            "evaluation.stream",
            "true; with model.norm = batch a prediction depends on the inputs that are predicted beside it; "
            "set that to layer or none",
        )


def _method(recipe: Recipe) -> str:
    return "adaptation.learned_loss" if recipe.maml else f"algorithm.kind = {recipe.algorithm.kind}"


def _has_batch_norm(recipe: Recipe) -> bool:
    return isinstance(recipe.model, Conv4Model) and recipe.model.norm == "batch"


RULES: tuple[Rule, ...] = (
    queries_are_given_or_are_the_support,
    labels_of_queries_are_not_read,
    unlabelled_classes_are_fixed,
    baselines_have_labels,
    erm_sees_one_example_at_a_time,
    arm_bn_needs_batch_norm,
    arm_cml_has_a_place_for_the_context,
    a_learned_loss_stands_alone,
    streams_are_of_groups,
)
