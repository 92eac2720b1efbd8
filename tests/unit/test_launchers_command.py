"""What all launchers have in common, the one that runs here, and the command that lists them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaloom.errors import LaunchError
from metaloom.launchers.base import (
    Launcher,
    Submission,
    host_overrides,
    host_problems,
    parse_environment,
    parse_time_limit,
    size_problems,
)
from metaloom.launchers.deepspeed import DeepSpeed
from metaloom.launchers.local import Local
from metaloom.launchers.slurm import Slurm
from metaloom.launchers.table import LAUNCHERS, add_launcher_options, chosen_launcher, launcher_class
from metaloom.launchers_command import add_launchers_command
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES, REPOSITORY


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPES / "smoke.yaml", ["launcher.num_processes=3"])


@pytest.fixture
def submission(recipe: Recipe, tmp_path: Path) -> Submission:
    return Submission(
        recipe=recipe, source="recipes/smoke.yaml", name="one", folder=str(tmp_path), overrides=("seed=1",)
    )


def listed(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    parser = argparse.ArgumentParser()
    add_launchers_command(parser.add_subparsers())
    arguments = parser.parse_args(["launchers", *words])
    assert arguments.run_command(arguments) == 0
    return capsys.readouterr().out


def test_launchers_are_listed_with_what_each_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    lines = listed(capsys=capsys).splitlines()
    assert lines[1].split() == ["launcher", "where", "a", "job", "runs", "needs", "there"]
    rows = {line.split()[0]: line for line in lines[3:] if not line.startswith(" ")}
    assert list(rows) == ["local", "slurm", "deepspeed", "kubernetes"]
    cells = {name: [cell.strip() for cell in line.split("  ") if cell.strip()] for name, line in rows.items()}
    assert cells["local"][1:] == ["this machine, while the command runs", "the package torch", "yes"]
    assert cells["slurm"][2:] == [
        "the command sbatch",
        "no: submit from a login node of the cluster, or load its Slurm module",
    ]
    assert cells["deepspeed"][3].startswith("no: install OpenSSH's client; every host")


def test_launchers_are_listed_for_programs_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    rows = {row["name"]: row for row in json.loads(listed("--json", capsys=capsys))}
    assert rows.keys() == LAUNCHERS.keys()
    assert rows["slurm"]["needs"] == [
        {
            "what": "the command sbatch",
            "is_there": False,
            "advice": "submit from a login node of the cluster, or load its Slurm module",
        }
    ]
    assert all(row["summary"] and row["needs"] for row in rows.values())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_known_by_its_name(name: str) -> None:
    launcher = launcher_class(name)
    assert issubclass(launcher, Launcher)
    assert launcher.name == name


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(
        LaunchError, match=r"there is no 'pbs'; there are local, slurm, deepspeed, kubernetes"
    ):
        launcher_class("pbs")


def test_options_of_another_launcher_are_refused() -> None:
    parser = argparse.ArgumentParser()
    added = add_launcher_options(parser)
    given = parser.parse_args(["--account", "lab", "--sbatch=--exclude=node3", "--max-faults", "0"])
    assert chosen_launcher("slurm", given, added) == Slurm(
        account="lab", sbatch=("--exclude=node3",), max_faults=0
    )
    with pytest.raises(
        LaunchError, match=r"^--account is an option of the launcher slurm, not of local; --sb"
    ):
        chosen_launcher("local", given, added)
    nothing = parser.parse_args([])
    assert chosen_launcher("slurm", nothing, added) == Slurm()
    assert chosen_launcher("local", nothing, added) == Local()


@pytest.mark.parametrize(
    ("text", "limit_s"),
    [
        ("45s", 45),
        ("90m", 5400),
        ("90 min", 5400),
        ("12h", 43200),
        ("2d", 172800),
        ("12:30", 45000),
        ("12:30:05", 45005),
        ("1-00:00:00", 86400),
    ],
)
def test_time_limits_are_read(text: str, limit_s: int) -> None:
    assert parse_time_limit(text) == limit_s


@pytest.mark.parametrize("text", ["", "soon", "90", "0h", "1:75", "1:00:99", "-5m", "1.5h", "1-2-3:00"])
def test_what_is_no_time_limit_is_told(text: str) -> None:
    with pytest.raises(
        LaunchError, match=r"is no time limit; write 90m, 12h or 2d, or hours, minutes and sec"
    ):
        parse_time_limit(text)


def test_variables_are_set_or_passed_on() -> None:
    assert parse_environment(["A=1=2", "B", "C="], {"B": "two"}) == {"A": "1=2", "B": "two", "C": ""}
    with pytest.raises(LaunchError) as raised:
        parse_environment(["1A=1", "ABSENT", "=3"], {})
    assert str(raised.value).splitlines() == [
        "3 problems:",
        "  --env: '1A' is no name of a variable; write NAME=VALUE, or NAME.",
        "  --env ABSENT: it is not set here; set it, or write ABSENT=VALUE.",
        "  --env: '' is no name of a variable; write NAME=VALUE, or NAME.",
    ]


def test_ranks_are_those_asked_for_or_one_per_gpu_or_the_recipes(submission: Submission) -> None:
    assert submission.num_ranks == 3
    assert dataclasses.replace(submission, gpus_per_node=0).num_ranks == 3
    assert dataclasses.replace(submission, gpus_per_node=8).num_ranks == 8
    assert dataclasses.replace(submission, gpus_per_node=8, ranks_per_node=16).num_ranks == 16


def test_numbers_that_cannot_be_are_told(submission: Submission) -> None:
    wrong = dataclasses.replace(submission, nodes=0, gpus_per_node=-1, ranks_per_node=0, cpus_per_node=0)
    assert size_problems(wrong) == [
        "--nodes is 0; it must be at least 1.",
        "--gpus-per-node is -1; it must be at least 0.",
        "--ranks-per-node is 0; it must be at least 1.",
        "--cpus-per-node is 0; it must be at least 1.",
    ]


def test_what_a_recipe_says_of_hosts_stays_and_has_to_fit(submission: Submission) -> None:
    overrides = host_overrides(endpoint="a:29400", num_hosts=4, num_ranks=2)
    own = ["launcher.hosts={endpoint: 'x:1', num_hosts: 2, min_hosts: 3, silence_s: 30}", *overrides]
    launcher = load_recipe(RECIPES / "smoke.yaml", own).launcher
    assert launcher.hosts is not None
    assert launcher.hosts.model_dump() == {
        "endpoint": "a:29400",
        "num_hosts": 4,
        "min_hosts": 3,
        "wait_s": 600.0,
        "silence_s": 30.0,
        "own_folders": False,
    }
    asked = dataclasses.replace(
        submission, recipe=submission.recipe.model_copy(update={"launcher": launcher})
    )
    assert host_problems(asked, 4) == []
    assert host_problems(asked, 2) == ["launcher.hosts.min_hosts is 3, but the job has 2 hosts."]


def test_the_local_plan_is_the_command(submission: Submission, tmp_path: Path) -> None:
    asked = dataclasses.replace(submission, gpus_per_node=2, environment={"A": "b c"})
    assert Local().plan(asked) == (
        f"env 'A=b c' metaloom train recipes/smoke.yaml --run {tmp_path}/runs/one seed=1 "
        "launcher.num_processes=2\n"
    )
    resumed = dataclasses.replace(submission, is_resumed=True, run="/runs/two")
    assert Local().plan(resumed) == (
        "metaloom train recipes/smoke.yaml --resume /runs/two seed=1 launcher.num_processes=3\n"
    )
    insisted = dataclasses.replace(resumed, is_insisted=True)
    assert "--resume /runs/two --insist seed=1 " in Local().plan(insisted)


@pytest.mark.parametrize("launcher", [Slurm(), DeepSpeed(Path("hosts"))])
def test_what_a_user_insists_on_reaches_every_host(
    launcher: Launcher, submission: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=3\n")
    asked = dataclasses.replace(submission, is_resumed=True)
    assert "--insist" not in launcher.plan(asked)
    assert " --insist " in launcher.plan(dataclasses.replace(asked, is_insisted=True))


def test_options_without_effect_here_are_refused(submission: Submission) -> None:
    asked = dataclasses.replace(submission, nodes=2, queue="q", time_limit_s=60)
    with pytest.raises(LaunchError) as raised:
        Local().plan(asked)
    assert str(raised.value).splitlines() == [
        "3 problems:",
        "  --nodes has no effect with the launcher local: give the command on each host, with "
        "launcher.hosts; or use another launcher.",
        "  --time-limit has no effect with the launcher local: stop the command, by Ctrl-C or SIGTERM, and "
        "go on with --resume.",
        "  --queue has no effect with the launcher local: nothing waits.",
    ]


PROGRAM = """
import sys
from metaloom.launchers.base import Submission
from metaloom.launchers.deepspeed import DeepSpeed
from metaloom.launchers.local import Local
from metaloom.recipe import load_recipe
stand_in, folder, recipe = sys.argv[1:]
sys.executable = stand_in
print("before")
Local().submit(Submission(load_recipe(recipe), recipe, "one", folder, environment={"GREETING": "hello"}))
"""


def test_submitting_here_becomes_the_command(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$$ $GREETING $*"\nexit 75\n')
    stand_in.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(stand_in), str(tmp_path), str(RECIPES / "smoke.yaml")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert output.splitlines() == [
        "before",
        f"{process.pid} hello -m metaloom.cli train {RECIPES}/smoke.yaml --run {tmp_path}/runs/one "
        "launcher.num_processes=2",
    ]


def test_an_interpreter_that_is_gone_is_told(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LaunchError, match=r"/nowhere/python cannot be started: No such file or directory"):
        Local().submit(submission)
