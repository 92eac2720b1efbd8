"""`metaloom plan`: what a recipe takes, before it is started."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from metaloom.cli import main
from metaloom.errors import CapabilityError, LaunchError
from metaloom.planning import report
from metaloom.planning.command import make_plan
from metaloom.planning.estimate import Layout, estimate
from metaloom.planning.facts import Facts, Sizes
from metaloom.planning.hardware import DEVICES, LINKS, Hardware
from metaloom.planning.here import measured_device
from metaloom.planning.probe import join_all
from metaloom.planning.report import remarks
from metaloom.planning.request import Request
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES, command, environment, run, run_well
from tests.unit.test_planning_estimate import some_facts

# Large enough not to fit on the smallest GPU of the table, small enough to be counted in seconds.
LARGE = """
name: large
model: {kind: gpt, num_layers: 2, width: 4096, num_heads: 32, context_length: 1024}
data: {kind: documents, url: nowhere, num_support: 8, num_query: 8, sequence_length: 1024}
adaptation:
  fast: {kind: lora, rank: 2, alpha: 2, targets: [qkv]}
  rule: {kind: sgd, lr: 0.1}
  num_steps: 2
algorithm: {kind: maml, hypergradient: unrolled}
outer: {num_steps: 10, tasks_per_step: 64}
precision: {compute: bfloat16}
"""


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "hardware": "a100-40",
        "link": "ndr",
        "ranks": (1, 64),
        "devices_per_node": None,
        "compare": False,
        "as_json": False,
    }
    return Request(**values | changes)


def test_a_small_recipe_is_planned_without_its_data_and_leaves_nothing_behind(tmp_path: Path) -> None:
    recipe = RECIPES / "smoke.yaml"
    output = run_well(
        "plan", recipe, "data.url=nowhere", "--ranks", "1,8", "--gpus-per-node", "4", cwd=tmp_path
    )
    assert "plan for smoke" in output
    assert "on H100 80 GB (74.5 GiB), 4 per node, InfiniBand NDR" in output
    assert "memory of a rank at its peak, MiB: replicated" in output
    assert "an outer step: replicated (rematerialized, loop)" in output
    assert "an outer step: deepspeed_zero, stage 2" in output
    assert "sharded: not possible, since each task has a whole copy of all weights" in output
    assert "8 ranks: 4 of them get no tasks, since outer.tasks_per_step is 4" in output
    assert list(tmp_path.iterdir()) == []


def test_a_plan_as_json_has_every_number_and_nothing_beside_it(tmp_path: Path) -> None:
    finished = run("plan", RECIPES / "smoke.yaml", "--ranks", "2", "--json", cwd=tmp_path)
    assert finished.code == 0, finished.errors
    plan = json.loads(finished.output)
    assert plan["recipe"] == "smoke"
    assert plan["hardware"]["device"]["name"] == "H100 80 GB"
    (found,) = plan["plans"][0]["estimates"]
    assert (found["num_ranks"], found["tasks_per_rank"], found["fits"]) == (2, 2, True)
    memory = found["memory"]
    assert memory["total"] == pytest.approx(sum(value for name, value in memory.items() if name != "total"))
    # A ring all-reduce of two ranks sends the gradient once: as many bytes as the model has.
    assert found["wire_bytes"] == 4 * plan["num_parameters"]


def test_this_machine_is_measured_and_said_so(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "smoke.yaml").read_text() + "tracking: none\n")
    finished = run("plan", recipe, "--ranks", "1", "--hardware", "here", "--json", cwd=tmp_path)
    assert finished.code == 0, finished.errors
    assert "measuring this machine" in finished.errors
    device = json.loads(finished.output)["hardware"]["device"]
    assert device["flops_per_s"].keys() == {"float32"}
    for name in ("memory_bytes", "bandwidth", "operation_s", "process_bytes", "node_bandwidth"):
        assert device[name] > 0.0


def test_mistakes_are_told_before_anything_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "smoke.yaml")
    for words, message in (
        (["--hardware", "h1000"], "did you mean 'h100'?"),
        (["--link", "hdrr"], "did you mean 'hdr'?"),
        (["--ranks", "0"], "--ranks: 0; a plan is for 1 to 1024 ranks."),
        (["--gpus-per-node", "0"], "--gpus-per-node: 0; a node has at least 1"),
        (
            ["--compare"],
            "--compare: plans weights in shards too, and has no effect, since with adaptation.fast",
        ),
        (["outer.tasks_per_stepp=3"], "did you mean 'tasks_per_step'"),
    ):
        assert main(["plan", recipe, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    words = command("plan", RECIPES / "smoke.yaml", "--ranks", "1", "--json")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = subprocess.run(
            words, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writing)
    assert (finished.returncode, b"Traceback" in finished.stderr) == (0, False), finished.stderr


def test_an_interrupt_while_torch_is_imported_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    words = [sys.executable, "-m", "metaloom.planning", "recipe.yaml", "{}"]
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    finished = subprocess.run(
        words, cwd=tmp_path, env=environment() | {"PYTHONPATH": path}, stderr=subprocess.PIPE, timeout=60
    )
    assert (finished.returncode, finished.stderr) == (130, b"")


def test_this_machine_has_what_its_container_may_take_and_the_threads_of_the_recipes_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr("metaloom.choosing.CGROUP", tmp_path)
    monkeypatch.setattr("metaloom.planning.here._answer_of", lambda *_: "1000.0")
    monkeypatch.setattr("metaloom.planning.command.count", lambda *_, **__: some_facts())
    monkeypatch.setattr("metaloom.planning.command.calibrated", lambda recipe, facts, here: (here, ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = RECIPES / "smoke.yaml"
    path = tmp_path / "recipe.yaml"
    path.write_text(
        recipe.read_text().replace("num_processes: 2 ", "threads_per_process: 2\n  num_processes: 2 ")
    )
    num_threads = torch.get_num_threads()
    try:
        plan = make_plan(path, request(hardware="here", ranks=(2, 4)), say=lambda text: None)
    finally:
        torch.set_num_threads(num_threads)
    device = plan.hardware.device
    assert (device.name, device.memory_bytes) == ("2 cores of this machine, float32", 500_000.0)
    # A measured all-reduce is what collectives reach.
    assert plan.hardware.bandwidth_among(2) == 1000.0
    expected = (
        "4 ranks and more are planned on several machines like this one, 2 ranks each, over InfiniBand NDR"
    )
    assert any(text.startswith(expected) for text in remarks(plan))


def test_a_title_says_from_how_many_ranks_on_the_way_is_another() -> None:
    hardware = _hardware(1e12)
    found = estimate(some_facts(), hardware, Layout("replicated"), 1)
    ways = [
        dataclasses.replace(found, num_ranks=number, way=way)
        for number, way in ((1, "rematerialized"), (2, "rematerialized"), (4, "mixed_mode"))
    ]
    assert report._ways(ways[:2]) == "rematerialized"
    assert report._ways(ways) == "rematerialized; from 4 ranks on mixed_mode"


def test_a_measurement_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(words, 120.0)

    monkeypatch.setattr("metaloom.planning.here.subprocess.run", run)
    with pytest.raises(LaunchError, match=r"could not be measured \(process\): not done after 120 s. Name"):
        measured_device("float32", num_local_ranks=1, is_tracked=False)


def test_a_process_that_waits_for_one_that_has_failed_is_ended() -> None:
    context = multiprocessing.get_context("spawn")
    waiting = context.Process(target=time.sleep, args=(100.0,))
    failing = context.Process(target=sys.exit, args=(1,))
    waiting.start()
    failing.start()
    with pytest.raises(RuntimeError, match="a process of the all-reduce over loopback failed"):
        join_all([waiting, failing])
    assert waiting.exitcode == -signal.SIGTERM


def test_a_process_that_ends_between_two_questions_has_failed_all_the_same() -> None:
    class Ending:
        """Has ended, and is seen to have from the second question on."""

        def __init__(self) -> None:
            self.sentinel, self._other = os.pipe()
            os.close(self._other)  # the end of the pipe: as of a process that has ended
            self._codes = iter([None])

        @property
        def exitcode(self) -> int | None:
            return next(self._codes, 1)

    with pytest.raises(RuntimeError, match="a process of the all-reduce over loopback failed"):
        join_all([Ending()])  # type: ignore[list-item]


def test_what_does_not_fit_is_told_with_settings_that_were_tried(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LARGE)
    plan = make_plan(path, request(), say=lambda text: None)
    own = Layout("replicated")
    alone, many = plan.estimates[own]
    assert not alone.fits
    (remedy,) = plan.misfits[1]
    assert remedy.estimate.fits
    (setting,) = remedy.settings
    name, _, value = setting.partition("=")
    assert name == "outer.micro_batch"
    # The most that fit: one task more does not.
    more = load_recipe(path, [f"outer.micro_batch={int(value) + 1}"])
    assert more.outer.micro_batch == int(value) + 1
    assert not estimate(_with_micro_batch(plan.facts, int(value) + 1), plan.hardware, own, 1).fits
    text = "\n".join(remarks(plan))
    assert "1 rank: does not fit under replicated (" in text
    assert f"fits with {setting}: " in text
    assert many.fits
    assert "as it is, it fits from 64 ranks on, of those asked for" in text


def test_numbers_of_ranks_on_which_a_sharded_recipe_does_not_start_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        LARGE + "sharding: {kind: sharded, shard_size: 4}\nmemory: {recompute_blocks: true}\n"
        "launcher: {kind: local, num_processes: 4}\n"
    )
    facts = some_facts(compute="bfloat16")
    monkeypatch.setattr("metaloom.planning.command.count", lambda *_, **__: facts)
    plan = make_plan(path, request(ranks=(1, 2, 4, 6, 8)), say=lambda text: None)
    own = Layout("sharded", 4)
    assert {layout: [found.num_ranks for found in each] for layout, each in plan.estimates.items()} == {
        own: [4, 8],
        Layout("replicated"): [1, 2, 4, 6, 8],
        Layout("deepspeed_zero"): [1, 2, 4, 6, 8],
    }
    expected = "1, 2 and 6 ranks: not possible under sharded, shard_size 4, since sharding.shard_size must"
    assert any(text.startswith(expected) for text in remarks(plan))
    with pytest.raises(
        CapabilityError, match=r"shard_size is 4, and divides none of .* 1, 2, 6; ask for mul"
    ):
        make_plan(path, request(ranks=(1, 2, 6)), say=lambda text: None)


def test_a_layout_that_the_recipe_does_not_go_with_is_not_planned_and_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LARGE.replace("bfloat16", "float64"))
    monkeypatch.setattr("metaloom.planning.command.count", lambda *_, **__: some_facts(compute="float64"))
    plan = make_plan(path, request(), say=lambda text: None)
    (layout,) = plan.refused
    assert layout == Layout("deepspeed_zero")
    assert layout not in plan.estimates
    assert "precision.compute: float64; " in plan.refused[layout]


def test_a_setting_under_which_the_recipe_cannot_be_computed_is_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LARGE)
    asked: list[Recipe] = []

    def count(recipe: Recipe, *, with_shards: bool, on_gpu: bool) -> Facts:
        asked.append(recipe)
        if recipe.memory.recompute_blocks and not with_shards:
            raise CapabilityError("nothing can be recomputed")
        return some_facts(compute="bfloat16", own=Sizes(learned=1e15))

    monkeypatch.setattr("metaloom.planning.command.count", count)
    plan = make_plan(path, request(ranks=(1,)), say=lambda text: None)
    assert any(recipe.memory.recompute_blocks for recipe in asked)
    assert plan.misfits[1] == ()


def test_shards_fit_where_whole_weights_do_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    deep = LARGE.replace("num_layers: 2, width: 4096", "num_layers: 24, width: 8192")
    sparing = (
        deep.replace("unrolled", "rematerialized") + "memory: {recompute_blocks: true, snapshots: host}\n"
        "sharding: {kind: replicated, bucket_mib: 50}\n"
    )
    sparing = sparing.replace("tasks_per_step: 64", "tasks_per_step: 64, micro_batch: 1")
    path.write_text(sparing.replace("sequence_length: 1024", "sequence_length: 32"))
    plan = make_plan(path, request(ranks=(1, 8, 16)), say=lambda text: None)
    assert not any(found.fits for found in plan.estimates[Layout("replicated")])
    assert plan.misfits[8] == ()
    (elsewhere,) = plan.elsewhere
    assert elsewhere.layout.kind == "sharded"
    assert elsewhere.settings == ("sharding=sharded",)
    assert load_recipe(path, elsewhere.settings).sharding.kind == "sharded"
    fits = [found.fits for found in plan.estimates[elsewhere.layout]]
    assert fits == sorted(fits)
    assert elsewhere.estimate.num_ranks == next(
        found.num_ranks for found in plan.estimates[elsewhere.layout] if found.fits
    )
    text = "\n".join(remarks(plan))
    assert "none of those tried makes it fit on so many ranks, alone or together: outer.micro_batch=1" in text
    number = elsewhere.estimate.num_ranks
    assert f"sharded fits from {number} ranks on, of those asked for, with sharding=sharded" in text


def test_states_in_the_hosts_memory_need_a_host_beside_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        LARGE.replace("hypergradient: unrolled", "hypergradient: rematerialized")
        + "memory: {snapshots: host}\n"
    )
    here = _hardware(1e12)
    device = dataclasses.replace(here.device, has_host_memory=False, name="a core")
    monkeypatch.setattr("metaloom.planning.command.measured_device", lambda *_, **__: device)
    with pytest.raises(CapabilityError, match="snapshots: host, and a core has no memory but the host's"):
        make_plan(path, request(hardware="here"), say=lambda text: None)


def _hardware(memory_bytes: float) -> Hardware:
    return Hardware(
        dataclasses.replace(DEVICES["h100"], memory_bytes=memory_bytes, unusable=0.0), LINKS["ndr"], 8
    )


def _with_micro_batch(facts: Facts, micro_batch: int) -> Facts:
    return dataclasses.replace(facts, micro_batch=micro_batch)
