"""The recipe's section on combining tasks: its rules, what is built of it, and the groups that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metaloom.build import build_combiner, task_batch
from metaloom.datasets import Episode, EpisodeSource, Mixture
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.combiners.per_task import PerTask, selected
from metaloom.engine.combiners.uncertainty import Uncertainty
from metaloom.engine.combiners.weighted import Weighted
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import CapabilityError, RecipeError, StreamError
from metaloom.recipe import Recipe, load_recipe
from metaloom.sources import episode_source, open_data, require_episodes
from tests.commands import RECIPES
from tests.tiny_sets import npy, ready_set

PART = "{data: {kind: classes, url: a, n_way: 3, n_shot: 1, n_query: 1}}"
GROUPED = f"data={{kind: mixture, parts: [{PART}, {PART}]}}"
META: Mapping[str, Tensor] = {"init.head.weight": torch.zeros(2), "init.body.A": torch.ones(1)}


def recipe_with(combiner: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / "smoke.yaml", (f"outer.combiner={combiner}", *overrides))


def built(combiner: str, *overrides: str) -> Combiner:
    return build_combiner(recipe_with(combiner, *overrides), META, Replicated(), metric_names=())


@pytest.mark.parametrize(
    ("combiner", "overrides", "message"),
    [
        (
            "dwa",
            ("outer.num_steps=200",),
            r"outer\.combiner\.kind: dwa; weighs groups of tasks, and tasks of data\.kind classes have none; "
            r"take data\.kind groups or mixture, episodes that state their group, or another combiner",
        ),
        (
            "mgda",
            ("outer.tasks_per_step=1",),
            r"outer\.combiner\.kind: mgda; has no effect, since outer\.tasks_per_step is 1 and it compares "
            r"the tasks of a step; raise outer\.tasks_per_step, or set it to mean",
        ),
        (
            "{kind: mean, log_cosines: true}",
            ("outer.tasks_per_step=1",),
            r"outer\.combiner\.log_cosines: true; has no effect, since outer\.tasks_per_step is 1",
        ),
        (
            "pcgrad",
            ("outer.micro_batch=2",),
            r"outer\.micro_batch: 2; has no effect, since outer\.combiner\.kind = pcgrad differentiates one "
            r"task at a time; leave it out",
        ),
        (
            "{kind: mean, log_cosines: true}",
            ("outer.micro_batch=2",),
            r"outer\.micro_batch: 2; has no effect, since outer\.combiner\.log_cosines = true differentiates",
        ),
        (
            "{kind: dwa, num_steps: 3}",
            (GROUPED,),
            r"outer\.combiner\.num_steps: 3; weights change after twice as many outer steps, and "
            r"outer\.num_steps is 6; lower it",
        ),
        (
            "{kind: mgda, of: [init, backbone]}",
            (),
            r"outer\.combiner\.of\.1: 'backbone'; is no meta-parameter of this run, which learns init; "
            r"name these, or patterns of their names",
        ),
        ("{kind: mgda, of: [init, init]}", (), r"outer\.combiner\.of: 'init' is listed twice; list it once"),
        ("{kind: q_ffl, q: 0.0}", (), r"outer\.combiner\.q: .*greater than 0"),
    ],
)
def test_a_combiner_without_effect_is_refused(
    combiner: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_with(combiner, *overrides)


@pytest.mark.parametrize("combiner", ["pcgrad", "mgda", "q_ffl", "{kind: mean, log_cosines: true}"])
def test_combiners_of_single_tasks_take_them_one_at_a_time(combiner: str) -> None:
    assert isinstance(built(combiner), PerTask)
    assert recipe_with(combiner).outer.side_by_side == 1


@pytest.mark.parametrize("combiner", ["gradnorm", "group_dro"])
def test_combiners_of_single_tasks_by_groups_take_data_with_groups(combiner: str) -> None:
    assert isinstance(built(combiner, GROUPED), PerTask)
    assert recipe_with(combiner, GROUPED).outer.side_by_side == 1


@pytest.mark.parametrize("combiner", ["uncertainty", "{kind: dwa, num_steps: 2}", "upweighting"])
def test_weights_that_are_known_beforehand_leave_tasks_side_by_side(combiner: str) -> None:
    assert isinstance(built(combiner, GROUPED, "outer.micro_batch=3"), Weighted)
    assert recipe_with(combiner, GROUPED, "outer.micro_batch=3").outer.side_by_side == 3


def test_the_default_is_the_mean() -> None:
    recipe = load_recipe(RECIPES / "smoke.yaml")
    assert isinstance(build_combiner(recipe, META, Replicated(), metric_names=()), Mean)
    assert recipe.outer.side_by_side is None


@pytest.mark.parametrize(
    ("of", "names"),
    [
        ((), ["init.head.weight", "init.body.A", "backbone.init.B"]),
        (("init",), ["init.head.weight", "init.body.A"]),
        (("*.A",), ["init.body.A"]),
        (("backbone", "init.head.*"), ["init.head.weight", "backbone.init.B"]),
    ],
)
def test_kinds_and_patterns_choose_what_is_combined(of: tuple[str, ...], names: list[str]) -> None:
    assert list(selected({**META, "backbone.init.B": torch.zeros(3)}, of)) == names


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = (
        r"outer\.combiner\.of: 'init\.\*\.B' matches no meta-parameter; this run learns init\.body\.A, "
        r"init\.head\.weight\."
    )
    with pytest.raises(CapabilityError, match=message):
        built("{kind: pcgrad, of: ['init.*.B']}")


def test_a_task_without_a_group_cannot_be_weighed() -> None:
    combiner = Weighted(Uncertainty(0.1), META, Replicated(), metric_names=())
    message = r"outer\.combiner\.kind: uncertainty; weighs groups of tasks, and episode 7 has no group\. Take"
    with pytest.raises(CapabilityError, match=message):
        combiner.parts(TaskBatch((7,), {}, {}))


# ---------------------------------------------------------------- groups of tasks


def test_parts_of_a_mixture_are_groups_and_reach_the_batch(glyphs: Path) -> None:
    part = f"{{data: {{kind: classes, url: '{glyphs}', n_way: 3, n_shot: 1, n_query: 1}}}}"
    recipe = recipe_with("uncertainty", f"data={{kind: mixture, parts: [{part}, {part}]}}")
    source = episode_source(recipe, open_data(recipe), "train", seed=0, num_steps=1)
    episodes = [source.episode(number) for number in range(8)]
    assert {episode.group for episode in episodes} == {"glyphs 0", "glyphs 1"}
    batch = task_batch(recipe, episodes, torch.device("cpu"), num_steps=1)
    assert batch.groups == tuple(episode.group for episode in episodes)
    assert [part.groups for part in batch.split(3)] == [batch.groups[:3], batch.groups[3:6], batch.groups[6:]]


def test_groups_of_several_data_sets_are_kept_apart_by_the_names_of_these() -> None:
    class Own(EpisodeSource):
        def __init__(self, group: str | None) -> None:
            self.group = group

        def episode(self, number: int) -> Episode:
            return Episode(number, "task", {}, {}, group=self.group)

    sources = [Own(None), Own("user 1"), Own("user 1")]
    mixture = Mixture(sources, [1, 1, 1], seed=0, split="train", names=["plain", "one", "other"])
    found = {mixture.episode(number).group for number in range(300)}
    assert found == {"plain", "one/user 1", "other/user 1"}


def test_ready_episodes_without_groups_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaloom.sources.SPLITS", ("train",))
    inputs = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    part = {f"{part}.inputs.npy": npy(inputs[row]) for row, part in enumerate(("support", "query"))}
    part |= {f"{part}.targets.npy": npy(np.array([0, 1])) for part in ("support", "query")}
    data = (
        "data={kind: episodes, url: '%s', inputs: {kind: array, shape: [2]}, "
        "targets: {kind: class, num_classes: 2}, num_support: 2, num_query: 2}"
    )
    model = "model={kind: mlp, width: 4, num_layers: 1}"
    ready_set(tmp_path / "named", [part] * 4, groups=("a", "b"))
    ready_set(tmp_path / "plain", [part] * 4)
    recipe = recipe_with("group_dro", data % (tmp_path / "named"), model)
    require_episodes(recipe, open_data(recipe))
    recipe = recipe_with("group_dro", data % (tmp_path / "plain"), model)
    message = (
        r"outer\.combiner\.kind: group_dro; weighs groups of tasks, and episodes of split 'train' of ready "
        r"at .*plain state no group: pack them with one, or take another combiner\."
    )
    with pytest.raises(StreamError, match=message):
        require_episodes(recipe, open_data(recipe))
