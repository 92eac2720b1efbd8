"""Rules about groups, and about methods that adapt without labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from metaloom.errors import RecipeError
from metaloom.recipe import load_recipe
from metaloom.recipe.tasks import task_facts
from tests.commands import RECIPES

FACES, SMOKE, STDLIB = (RECIPES / f"{name}.yaml" for name in ("faces-arm", "smoke", "stdlib-lora"))
LEARNED = ["algorithm=maml", "adaptation.learned_loss={}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.num_query=4"],
            "data.num_query: 4; has no effect, since data.query_is_support is true and the queries are",
        ),
        (
            ["data.query_is_support=false"],
            "data.num_query: missing; give it, or set query_is_support to true",
        ),
        (
            ["algorithm=maml"],
            "data.query_is_support: true; algorithm.kind = maml adapts to the labels of support examples",
        ),
        (
            ["algorithm=protonet"],
            "data.query_is_support: true; algorithm.kind = protonet adapts to the labels",
        ),
        (
            ["evaluation.baselines=[random]"],
            "evaluation.baselines: random; baselines adapt to labelled support data, and algorithm.kind = "
            "arm_cml has no labels",
        ),
        (
            [*LEARNED, "evaluation.baselines=[random]"],
            "evaluation.baselines: random; baselines adapt to labelled support data, and adaptation.lea",
        ),
        (["algorithm=erm", "model.norm=batch"], "model.norm: batch; takes the statistics of a task's inputs"),
        (
            ["algorithm=arm_bn"],
            "algorithm.kind: arm_bn; adapts by the statistics of batch norm, and the model",
        ),
        (
            ["adaptation.learned_loss={}"],
            "adaptation.learned_loss: given; has no effect, since algorithm.kind = arm_cml adapts without",
        ),
        (
            [*LEARNED, "adaptation.loss={temperature: 2.0, learned: [temperature]}"],
            "adaptation.loss.temperature: 2.0; has no effect, since adaptation.learned_loss is in the place",
        ),
        (
            [*LEARNED, "adaptation.loss={learned: [temperature]}"],
            "adaptation.loss.learned: temperature; has no effect, since adaptation.learned_loss",
        ),
        ([*LEARNED, "memory.head_chunk=4"], "memory.head_chunk: 4; adaptation.learned_loss sees all outputs"),
        (
            [*LEARNED, "adaptation.rehearsal={data: {kind: classes, url: x, num_classes: 3}}"],
            "adaptation.rehearsal.ratio: 0.1; adaptation.learned_loss takes no other loss beside it",
        ),
        (
            [*LEARNED, "algorithm.hypergradient=first_order"],
            "algorithm.hypergradient.kind: first_order gives no gradient of loss parameters",
        ),
        ([*LEARNED, "model.norm=batch"], "evaluation.stream: true; with model.norm = batch a prediction"),
        (
            ["algorithm=maml", "data.query_is_support=false", "data.num_query=4"],
            "evaluation.stream: true; the inputs of a stream have no labels, and algorithm.kind = maml",
        ),
        (["data.num_support=1"], "evaluation.stream: true; a stream has at least two inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(FACES, overrides)


def test_streams_are_of_groups_and_unlabelled_classes_fixed() -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(SMOKE, ["algorithm=arm_bn", "evaluation.stream=true"])
    message = str(raised.value)
    assert "evaluation.stream: true; goes through the inputs of a group, and data.kind is classes" in message
    assert (
        "data.labels: shuffled; every task gives its classes other labels, and algorithm.kind = arm_bn"
        in (message)
    )


def test_a_learned_loss_reads_as_many_outputs_in_every_task() -> None:
    with pytest.raises(
        RecipeError, match=r"learned_loss: given; reads as many outputs of each example, and the"
    ):
        load_recipe(STDLIB, ["adaptation.learned_loss={}"])
    ready = (
        "data={kind: episodes, url: x, inputs: {kind: image}, targets: {kind: class, num_classes: 4}, "
        "num_support: 2, num_query: 2}"
    )
    with pytest.raises(RecipeError, match=r"and the tasks tell classes whose number differs"):
        load_recipe(SMOKE, ["adaptation.learned_loss={}", ready])


def test_a_context_is_shown_beside_images_or_arrays() -> None:
    with pytest.raises(RecipeError, match=r"algorithm.kind: arm_cml; shows the context as channels"):
        load_recipe(STDLIB, ["algorithm=arm_cml"])


def test_no_baseline_applies_where_support_data_have_no_labels() -> None:
    assert load_recipe(FACES, []).baselines == ()
    assert load_recipe(FACES, LEARNED).baselines == ()
    labelled = [
        "algorithm=maml",
        "data.query_is_support=false",
        "data.num_query=4",
        "evaluation.stream=false",
    ]
    assert load_recipe(FACES, labelled).baselines != ()


def test_queries_that_are_the_support_are_as_many() -> None:
    facts = task_facts(load_recipe(FACES, []))
    assert (facts.num_support, facts.num_query) == (32, 32)


def test_a_rate_of_the_loss_has_an_effect_on_a_learned_one() -> None:
    assert load_recipe(FACES, [*LEARNED, "outer.lr_loss=0.1"]).outer.lr_loss == 0.1
