"""Training under DeepSpeed's ZeRO is that of `replicated`, on any number of ranks and from any checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from metaloom.engine.sharding.deepspeed_config import DECIDED, LARGEST_BUCKET, ZERO, deepspeed_config
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero, ZeroSettings
from metaloom.errors import CapabilityError, LaunchError
from tests.multirank.processes import run_ranks
from tests.multirank.zero_problems import (
    ADAM,
    BAD_STEPS,
    CONFIGURATIONS,
    EXTRA,
    NUM_STEPS,
    SAVED_AT,
    SETTINGS,
    SHAPES,
    DeepSpeedImported,
    Findings,
    Training,
    train,
    train_and_ask,
)

ON_CPU = {"DS_ACCELERATOR": "cpu"}
Results = dict[tuple[int, Training], list[dict[str, Any]]]


BY = ("replicated", "2 ranks", "4 ranks")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Folders for the first part of trainings, by optimizer and by who trained it."""
    root = tmp_path_factory.mktemp("begun")
    return {optimizer: {by: root / optimizer / by for by in BY} for optimizer in SETTINGS}


@pytest.fixture(scope="module")
def on_ranks(begun: dict[str, dict[str, Path]]) -> tuple[Results, Findings]:
    """What every rank returned, by number of ranks and training; and findings of a single one."""

    def first(by: str, name: str) -> list[Training]:
        return [Training(key, name, last=SAVED_AT, saved=begun[key][by]) for key in SETTINGS]

    def second(by: str, name: str) -> list[Training]:
        return [Training(key, name, first=SAVED_AT, loaded=begun[key][by]) for key in SETTINGS]

    for training in first("replicated", "replicated"):
        train(training)
    adam = [Training("adam", name) for name in CONFIGURATIONS]
    sgd = [Training("sgd", "stage 2"), Training("sgd", "stage 1, offloaded")]
    plan = [
        (4, [*adam, *sgd, *first("4 ranks", "stage 2")]),
        (2, [adam[0], adam[-1], *first("2 ranks", "stage 1, offloaded"), *second("4 ranks", "stage 1")]),
        (1, [adam[1], *second("4 ranks", "stage 2, offloaded"), *second("2 ranks", "stage 1")]),
        (4, [*second("2 ranks", "stage 2"), *second("replicated", "stage 1, offloaded")]),
    ]
    results: Results = {}
    findings: list[Findings] = []
    for num_ranks, trainings in plan:
        returned = run_ranks(
            num_ranks, train_and_ask, trainings, DeepSpeedImported(), timeout_s=600.0, environment=ON_CPU
        )
        for position, training in enumerate(trainings):
            results[num_ranks, training] = [done[position] for done, _ in returned]
        findings += [found for _, found in returned if found is not None]
    (found,) = findings
    return results, found


@pytest.fixture(scope="module")
def results(on_ranks: tuple[Results, Findings]) -> Results:
    return on_ranks[0]


@pytest.fixture(scope="module")
def findings(on_ranks: tuple[Results, Findings]) -> Findings:
    return on_ranks[1]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """The whole trainings on one rank, replicated."""
    return {optimizer: train(Training(optimizer, "replicated")) for optimizer in SETTINGS}


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any], *, first: int = 0) -> None:
    # float32, with sums over tasks in another order and another order of operations in a fused optimizer;
    # losses and weights are of the size of 1 to 50.
    assert len(actual["curve"]) == NUM_STEPS - first
    for ours, theirs in zip(actual["curve"], expected["curve"][first:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)
    for part in ("tensors", "average"):
        assert actual[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(actual[part][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_trainings_compared_clip_skip_a_step_and_average(expected: dict[str, dict[str, Any]]) -> None:
    curve = expected["adam"]["curve"]
    assert [record["skipped"] for record in curve] == [float(step in BAD_STEPS) for step in range(NUM_STEPS)]
    assert all(math.isnan(curve[step]["gradient_norm"]) for step in BAD_STEPS)
    assert ADAM.clip_norm is not None
    assert all(
        record["gradient_norm"] > ADAM.clip_norm for step, record in enumerate(curve) if step not in BAD_STEPS
    )
    weight = "init.weight"
    assert not torch.allclose(
        expected["adam"]["average"][weight], expected["adam"]["tensors"][f"meta/{weight}"]
    )


@pytest.mark.parametrize(("num_ranks", "num_trainings"), [(1, 1), (2, 2), (4, len(CONFIGURATIONS) + 2)])
def test_every_stage_gives_the_curve_and_the_states_of_replicated(
    num_ranks: int, num_trainings: int, results: Results, expected: dict[str, dict[str, Any]]
) -> None:
    compared = 0
    for (ranks, training), on_ranks in results.items():
        if ranks == num_ranks and (training.first, training.last) == (0, NUM_STEPS):
            for result in on_ranks:
                assert_same(result, expected[training.optimizer])
                assert result["curve"][0] == on_ranks[0]["curve"][0]
            compared += 1
    assert compared == num_trainings


def test_a_run_begun_on_some_ranks_or_replicated_goes_on_with_the_same_curve_on_others(
    results: Results, expected: dict[str, dict[str, Any]]
) -> None:
    moves = set()
    for (num_ranks, training), on_ranks in results.items():
        if training.loaded is not None:
            for result in on_ranks:
                assert_same(result, expected[training.optimizer], first=SAVED_AT)
            moves.add((training.optimizer, training.loaded.name, num_ranks))
    pairs = [("4 ranks", 2), ("4 ranks", 1), ("2 ranks", 1), ("2 ranks", 4), ("replicated", 4)]
    assert moves == {(optimizer, begun, ranks) for optimizer in SETTINGS for begun, ranks in pairs}


def test_replicated_goes_on_from_what_deepspeed_has_begun(
    results: Results, begun: dict[str, dict[str, Path]], expected: dict[str, dict[str, Any]]
) -> None:
    assert results
    for optimizer, folders in begun.items():
        rest = Training(optimizer, "replicated", first=SAVED_AT, loaded=folders["4 ranks"])
        assert_same(train(rest), expected[optimizer], first=SAVED_AT)


def test_each_rank_keeps_its_share_of_gradients_and_states_alone(results: Results) -> None:
    for name in ("stage 1", "stage 2"):
        on_ranks = results[4, Training("adam", name)]
        for parameter, shape in SHAPES.items():
            assert sum(rank["share"][parameter] for rank in on_ranks) == math.prod(shape)
        num_elements = sum(math.prod(shape) for shape in SHAPES.values())
        for rank in on_ranks:
            # Three groups of the same rates, each padded to a multiple of twice the ranks.
            assert num_elements / 4 <= rank["first_moments"] <= num_elements / 4 + 3 * 2
            assert sum(rank["share"].values()) <= rank["first_moments"]
            assert f"ZeRO {name} over 4 ranks (CPU), optimizer states in shares" in rank["description"]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_deepspeed_reads_is_what_the_recipe_says(stage: int, findings: Findings) -> None:
    expected = {
        "gradient_clipping": 0.0,  # 1.0 where nothing is said
        "gradient_allreduce_op": "sum",  # else the mean over ranks
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "train_batch_size": 1,
        "grad_accum_dtype": "fp32",
        "torch_autocast_enabled": False,
        "zero_enabled": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "optimizer_name": None,
        "scheduler_name": None,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
        "disable_allgather": False,
        "load_universal_checkpoint": False,
        "data_efficiency_enabled": False,
    }
    assert {key: findings.read[stage][key] for key in expected} == expected
    num_elements = sum(math.prod(shape) for shape in SHAPES.values())
    section = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": True,
        "reduce_bucket_size": num_elements,  # 5e8 where nothing is said, all of it allocated
        "allgather_bucket_size": num_elements,
        "compute_grad_norm": True,
        "ignore_unused_parameters": False,
        "round_robin_gradients": False,
        "parameter_alignment": False,
    }
    assert {key: findings.zero[stage][key] for key in section} == section
    assert findings.zero[stage]["offload_optimizer"]["device"] == "none"


def test_every_key_of_the_zero_section_is_written_or_decided(findings: Findings) -> None:
    config = deepspeed_config(stage=2, offload_optimizer=True, pin_memory=True, num_elements=10, extra={})
    decided = {key.removeprefix(f"{ZERO}.") for key in DECIDED if key.startswith(f"{ZERO}.")}
    # Neither is read in stages 1 and 2; a key of this name and its older one.
    unread = {"allgather_partitions", "stage3_gather_fp16_weights_on_model_save"}
    assert findings.zero_keys == set(config[ZERO]) | (decided & findings.zero_keys) | unread
    # A bare `cpu_offload` and the like are older names, which DeepSpeed still reads.
    assert decided <= findings.zero_keys


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "unknown",
            "sharding.extra.wal_clock_breakdown: has no effect, since DeepSpeed does not know it, or",
        ),
        (
            "as it is",
            "sharding.extra.wall_clock_breakdown: has no effect, since DeepSpeed does not know it, or",
        ),
        ("unknown in ZeRO", "sharding.extra: DeepSpeed refuses it: 1 validation error"),
        ("of the wrong type", "sharding.extra: DeepSpeed refuses it: 1 validation error"),
        ("removed", "sharding.extra: DeepSpeed refuses it: Elastic training has been removed"),
        ("decided", "sharding.extra.gradient_clipping: is refused, since outer.clip_norm says how long"),
    ],
)
def test_an_extra_key_without_effect_is_refused(extra: str, message: str, findings: Findings) -> None:
    assert findings.refusals[extra].startswith(f"CapabilityError: {message}")


def test_extra_keys_with_an_effect_are_passed_through(findings: Findings) -> None:
    assert findings.refusals["good"] == ""
    config = deepspeed_config(
        stage=1, offload_optimizer=False, pin_memory=False, num_elements=10**9, extra=EXTRA["good"]
    )
    assert config["comms_logger"] == {"enabled": True}
    assert config[ZERO]["overlap_comm"] is True
    assert config[ZERO]["stage"] == 1
    assert config[ZERO]["reduce_bucket_size"] == LARGEST_BUCKET
    few = deepspeed_config(stage=1, offload_optimizer=False, pin_memory=False, num_elements=7, extra={})
    assert few[ZERO]["allgather_bucket_size"] == 8  # DeepSpeed takes none that is odd


def test_float64_is_refused(findings: Findings) -> None:
    assert findings.floats == (
        "CapabilityError: init.weight is float64; DeepSpeed keeps float32 alone. Set precision.compute to "
        "float32, bfloat16 or float16, or sharding.kind to replicated."
    )


def test_a_device_on_which_deepspeed_does_not_compute_is_refused(findings: Findings) -> None:
    assert findings.device == (
        "LaunchError: DeepSpeed computes on cpu, this rank on cuda. Set the environment variable "
        "DS_ACCELERATOR to cuda before deepspeed is imported."
    )


def test_a_step_that_deepspeed_passes_over_by_itself_ends_the_run(findings: Findings) -> None:
    assert findings.disagreement == (
        "MetaloomError: DeepSpeed passed over a meta-gradient whose norm is finite. Go on with "
        "sharding.kind: replicated."
    )


def test_stage_3_is_refused_with_the_backend_that_can() -> None:
    with pytest.raises(
        CapabilityError, match=r"stage: 3; .* stages 1 and 2\..* sharding\.kind: sharded does"
    ):
        DeepSpeedZero(ZeroSettings(3), torch.device("cpu"))


def test_the_place_of_the_states_is_told(findings: Findings) -> None:
    assert findings.offloaded.endswith(
        "ZeRO stage 1 over 1 rank (CPU), optimizer states in shares, in the host's memory"
    )


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        CapabilityError, match=r"not installed. Install it with `pip install 'metaloom\[deepspeed\]'`"
    ):
        DeepSpeedZero(ZeroSettings(2), torch.device("cpu"))


def test_a_missing_process_group_is_told() -> None:
    with pytest.raises(LaunchError, match="DeepSpeed needs a process group, also for one rank"):
        DeepSpeedZero(ZeroSettings(2), torch.device("cpu"))
