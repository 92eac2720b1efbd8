"""Rules about what knows groups by name, and about weights of data; what is built of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from metaloom.build.algorithm import build_algorithm
from metaloom.build.choices import Choices
from metaloom.build.model import build_model
from metaloom.build.outer import build_combiner
from metaloom.datasets import (
    ArrayInputs,
    EpisodeSource,
    GroupEpisodes,
    Mixture,
    NumberTargets,
    ShiftedTargets,
)
from metaloom.datasets.synthetic import SyntheticEpisodes, UnequalScales
from metaloom.engine.algorithms.multi_task import MultiTask
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import RecipeError, StreamError
from metaloom.models.multi_task import CrossStitch, Film, MultiHead
from metaloom.recipe import load_recipe
from metaloom.sources import open_data, require_episodes
from tests.commands import RECIPES
from tests.tiny_sets import group_set

SCALES, FACES = RECIPES / "unequal-scales.yaml", RECIPES / "faces-arm.yaml"
SMOKE = RECIPES / "smoke.yaml"
WEIGHTS = "adaptation.loss.learned=[group_weights]"
ADAPTED = ["algorithm={kind: maml, hypergradient: unrolled}", "outer.combiner=mean", WEIGHTS]
MIXED = (
    "{kind: mixture, parts: [{data: {kind: synthetic, task: sinusoid}}, "
    "{data: {kind: synthetic, task: {kind: sinusoid}, num_support: 3}}]}"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model={kind: single_layer, layer: linear}"],
            "algorithm.kind: multi_task; is made of the blocks of mlp and conv4, and model.kind is single_",
        ),
        (
            ["algorithm.groups=[a, b]"],
            "algorithm.groups: a, b; those of data.task are scale 1, scale 100, and need not be named; leave",
        ),
        (
            ["data.task=sinusoid", "outer.combiner=mean"],
            "algorithm.kind: multi_task; it has parts for each group of tasks, and those of sinusoid have",
        ),
        ([f"data={MIXED}"], "algorithm.groups: missing; name the groups of the training tasks, since it has"),
        ([f"data={MIXED}", "algorithm.groups=[a, a]"], "algorithm.groups: 'a' is listed twice; list it once"),
        (["data.task.scales=[1.0]"], "data.task.scales: [1.0]; must be a list of at least 2"),
        (["data.task.scales=[1.0, 0.0]"], "data.task.scales.1: 0.0; must be greater than 0"),
        (["algorithm.architecture=flim"], "did you mean 'film'?"),
        (["evaluation.baselines=[random]"], "evaluation.baselines: random; baselines adapt to labelled"),
        (["sharding=sharded"], "sharding.kind: sharded; algorithm.kind = multi_task computes with whole"),
    ],
)
def test_what_cannot_be_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SCALES, overrides)


def test_batch_statistics_are_refused_as_of_erm() -> None:
    with pytest.raises(
        RecipeError, match=r"model\.norm: batch; .* and algorithm\.kind = multi_task is not to"
    ):
        load_recipe(FACES, ["algorithm={kind: multi_task, groups: [a, b]}", "model.norm=batch"])


@pytest.mark.parametrize(
    ("architecture", "kind"), [("multi_head", MultiHead), ("film", Film), ("cross_stitch", CrossStitch)]
)
def test_what_is_built(architecture: str, kind: type) -> None:
    sizes = ["data.task.length=4", "data.task.num_targets=2", "model.width=3"]
    recipe = load_recipe(SCALES, [*sizes, f"algorithm.architecture={architecture}"])
    model = build_model(recipe, torch.device("cpu"), Replicated(bucket_bytes=1024))
    algorithm = build_algorithm(recipe, model, Choices(), torch.device("cpu"))
    assert isinstance(algorithm, MultiTask)
    assert algorithm.groups == ("scale 1", "scale 100")
    assert isinstance(algorithm.model.model, kind)
    modules = dict(model.module.named_modules())
    assert [name for name in algorithm.model.structure.blocks if name not in modules] == []
    learned = algorithm.meta_parameters()
    # As the recipe's own comments have it.
    of = ["outer.combiner.of=[backbone.networks.*.blocks.3.*]"] if architecture == "cross_stitch" else []
    weighing = load_recipe(SCALES, [*sizes, f"algorithm.architecture={architecture}", *of])
    build_combiner(weighing, learned, Replicated(bucket_bytes=1024), metric_names=())
    assert learned.keys() == {f"backbone.{name}" for name, _ in model.module.named_parameters()}


def test_names_of_groups_are_compared_with_the_data_before_anything_runs() -> None:
    parts = ["a", "b"]
    recipe = load_recipe(SCALES, [f"data={MIXED}", f"algorithm.groups={parts}", "outer.combiner=mean"])
    message = (
        r"algorithm\.groups: a, b; are to be the groups of the training tasks, and these are synthetic 0, "
        r"synthetic 1; give those\."
    )
    with pytest.raises(StreamError, match=message):
        require_episodes(recipe, open_data(recipe))
    found = load_recipe(
        SCALES, [f"data={MIXED}", "algorithm.groups=[synthetic 0, synthetic 1]", "outer.combiner=mean"]
    )
    require_episodes(found, open_data(found))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            SMOKE,
            ["adaptation.loss.learned=[class_weights]"],
            "adaptation.loss.learned: class_weights; every task gives its classes other labels, so that none",
        ),
        (
            SCALES,
            ["algorithm=maml", "adaptation.loss.learned=[class_weights]", "outer.combiner=mean"],
            "adaptation.loss.learned: class_weights; are those of classes, and the targets are numbers;",
        ),
        (
            SMOKE,
            [WEIGHTS],
            "adaptation.loss.learned: group_weights; there is one for each group of tasks, and those of "
            "classes have no groups; take data.kind groups or mixture, episodes that state their group, or "
            "leave them out",
        ),
        (
            SCALES,
            [*ADAPTED, "adaptation.loss.groups=[a, b]"],
            "adaptation.loss.groups: a, b; those of data.task are scale 1, scale 100, and need not be named",
        ),
        (
            SCALES,
            [*ADAPTED, f"data={MIXED}"],
            "adaptation.loss.groups: missing; name the groups of the training tasks, since there is one for",
        ),
        (
            SMOKE,
            ["adaptation.loss.groups=[a, b]"],
            "adaptation.loss.groups: a, b; has no effect, since adaptation.loss.learned has no group_weights",
        ),
        (SCALES, [WEIGHTS], "adaptation.loss.learned: group_weights; has no effect, since algorithm.kind ="),
    ],
)
def test_weights_of_data_that_cannot_be_are_refused(
    recipe: Path, overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(recipe, overrides)


def test_there_is_a_weight_for_each_class_and_each_group() -> None:
    kept = ["data.labels=kept", "adaptation.loss.learned=[class_weights]"]
    for path, overrides, name, count in (
        (SMOKE, kept, "class_weights", load_recipe(SMOKE).data.n_way),  # type: ignore[union-attr]
        (SCALES, [*ADAPTED, "adaptation.fast=full"], "group_weights", 2),
    ):
        recipe = load_recipe(path, overrides)
        model = build_model(recipe, torch.device("cpu"), Replicated(bucket_bytes=1024))
        choices = Choices(tasks="loop") if path == SCALES else Choices()
        algorithm = build_algorithm(recipe, model, choices, torch.device("cpu"))
        learned = {key: value for key, value in algorithm.meta_parameters().items() if "loss." in key}
        assert {key: tuple(value.shape) for key, value in learned.items()} == {f"loss.{name}": (count,)}


def test_groups_that_are_weighed_are_compared_with_the_data_before_anything_runs() -> None:
    recipe = load_recipe(SCALES, [*ADAPTED, f"data={MIXED}", "adaptation.loss.groups=[a, b]"])
    with pytest.raises(StreamError, match=r"adaptation\.loss\.groups: a, b; are to be the groups of the"):
        require_episodes(recipe, open_data(recipe))


def stated(source: EpisodeSource) -> set[str | None]:
    """The groups that episodes are of."""
    return {source.episode(number).group for number in range(60)}


def test_sources_name_the_groups_that_their_episodes_are_of(tmp_path: Path) -> None:
    index = group_set(tmp_path / "groups")
    inputs, targets = ArrayInputs((2,)), NumberTargets(2)
    source = GroupEpisodes(index, "train", inputs=inputs, targets=targets, num_support=3, num_query=2, seed=0)
    assert source.groups == stated(source)
    # Some groups have too few samples for a task.
    assert len(source.groups) < len(index.split("train").groups)
    family = UnequalScales(scales={"small": 1.0, "large": 9.0}, length=3, num_targets=2)
    computed = SyntheticEpisodes(family, "train", num_support=1, num_query=1, num_tasks=None, seed=0)
    assert computed.groups == stated(computed)
    mixed = Mixture([source, computed], [1.0, 1.0], seed=0, split="train", names=["g", "s"])
    assert set(mixed.groups or ()) == stated(mixed)
    shifted = ShiftedTargets(computed, std=1.0, seed=0, split="train")
    assert shifted.groups == computed.groups
