"""What goes wrong on one rank ends all of them, at once and with its cause."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from metaloom.datasets import Index
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.outer import OuterOptimizer
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from metaloom.errors import StreamError
from metaloom.recipe import Recipe, load_recipe
from metaloom.sources import Data, episode_source, open_data
from tests.commands import RECIPES, curve, run
from tests.multirank.processes import RanksFailedError, run_ranks
from tests.numerics.problems import gpt_problem
from tests.unit.test_engine_step import SETTINGS

NUM_STEPS = 5
RECIPE = RECIPES / "stdlib-lora.yaml"
OVERRIDES = (
    "model.width=16",
    "model.num_heads=2",
    "pretrain=null",
    "adaptation.num_steps=1",  # one stretch of rehearsal text per task
    "outer.tasks_per_step=2",
    f"outer.num_steps={NUM_STEPS}",
    "outer.schedule.warmup_steps=1",
    "validation.every_steps=null",
    "tracking=none",
    "launcher.num_processes=2",
)


def with_a_damaged_text(data: Path, copy: Path) -> str:
    """Copies a data set and damages the first text of split `rehearsal` there; returns the text's key."""
    shutil.copytree(data, copy)
    index, document = Index.load(copy), 0
    table = index.split("rehearsal")
    with (copy / index.shards[int(table.shard[document])].name).open("r+b") as shard:
        shard.seek(int(table.offset[document]) + int(table.length[document]) // 2)
        shard.write(b"\0" * 16)
    return table.key(document)


def first_step_with_damage(data: Data, recipe: Recipe, seed: int, rank: int) -> int | None:
    """The first step whose task of that rank, of two, meets the damaged text."""
    source = episode_source(recipe, data, "train", seed=seed, num_steps=1)
    met = (step for step in range(NUM_STEPS) if source.episode(2 * step + rank).broken)
    return next(met, None)


def test_a_rehearsal_text_too_many_that_one_rank_alone_meets_ends_both(tmp_path: Path, stdlib: Path) -> None:
    data = tmp_path / "stdlib"
    key = with_a_damaged_text(stdlib, data)
    recipe = load_recipe(RECIPE, (f"data.url={data}", *OVERRIDES))
    opened = open_data(recipe)
    step, seed = next(
        (step, seed)
        for seed in range(1000)
        if (step := first_step_with_damage(opened, recipe, seed, 1)) is not None
        and step > 0
        and first_step_with_damage(opened, recipe, seed, 0) is None
    )
    # The collectives' time limit is ten minutes: a rank that waited for the other would be seen.
    finished = run(
        "train",
        RECIPE,
        f"data.url={data}",
        f"seed={seed}",
        *OVERRIDES,
        "loading.max_broken=0",
        "launcher.timeout_s=600",
        "--run",
        tmp_path / "run",
        cwd=tmp_path,
        timeout_s=90,
    )
    assert finished.code == StreamError.exit_code, finished
    assert finished.errors.count("error:") == 1
    assert f"sample {key!r} is damaged" in finished.errors
    assert "1 sample is damaged, and loading.max_broken is 0" in finished.errors
    assert "Traceback" not in finished.errors + finished.output
    logged = [record["step"] for record in curve(tmp_path / "run") if record["step"] > 0]
    assert logged == list(range(1, step + 1))


class Failing(Mean):
    """Fails on rank 1 when half of the gradients are final, some of them sent."""

    def take(self, name: str, gradient: Tensor) -> None:
        super().take(name, gradient)
        if dist.get_rank() == 1 and len(self._final) == len(self._like) // 2:
            raise ValueError("a defect in the midst of a pass")


def fails_in_the_midst_of_a_backward_pass() -> None:
    problem = gpt_problem(step_weights=(0.0, 1.0), backbone=True)
    sharding = Replicated(bucket_bytes=2048)
    algorithm = Maml(problem.unroll, Rematerialized())
    outer = OuterOptimizer(problem.meta, SETTINGS, sharding)
    combiner = Failing(outer.meta, sharding, metric_names=algorithm.metric_names)
    outer_step(StepTasks(problem.batch, 4, 1), algorithm, combiner, outer, LossScaler(Precision("float64")))


def test_a_failure_inside_a_pass_ends_the_rank_that_waits_for_what_was_not_sent() -> None:
    with pytest.raises(RanksFailedError, match="ranks failed:") as caught:
        run_ranks(2, fails_in_the_midst_of_a_backward_pass)
    assert "ValueError: a defect in the midst of a pass" in caught.value.failures[1]
    # By this a worker knows the loss of its partner, which is no cause, from a defect of its own.
    assert "gloo" in caught.value.failures[0]
