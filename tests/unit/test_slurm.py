"""The batch script, which runs here with stand-ins for Slurm's commands and for metaloom's."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metaloom.errors import LaunchError
from metaloom.launchers.base import Submission
from metaloom.launchers.slurm import Slurm
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES, REPOSITORY

GOLDEN = REPOSITORY / "tests" / "data" / "slurm-job.sh"

# Starts the command once on each node, side by side; its code is the highest of theirs. A SIGTERM makes it
# kill them, as the real one does.
SRUN = """#!/bin/bash
echo "$*" >"$CALLS/srun"
count=1
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && count=${1#*=}; shift; done
pids=()
for ((index = 0; index < count; index++)); do
  SLURM_PROCID=$index SLURM_NODEID=$index "$@" & pids+=($!)
done
trap 'kill -KILL "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do wait "$pid" || { ended=$?; ((ended > code)) && code=$ended; }; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") [[ $3 == "node[1-3]" ]] || exit 1; printf 'node%d\\n' 1 2 3 ;;
  "show job") echo "JobId=$4 JobName=one JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
  requeue*) echo "$2" >>"$CALLS/requeued"; exit "${REQUEUE_CODE:-0}" ;;
  *) exit 64 ;;
esac
"""
METALOOM = """#!/bin/bash
printf '%s\\n' "$@" >"$CALLS/words-$SLURM_PROCID"
cp "$4" "$CALLS/recipe-$SLURM_PROCID"
echo "$GREETING" >"$CALLS/greeting"
if [[ -n ${CODE-} ]]; then exit "$CODE"; fi
trap 'exit 75' TERM
echo $$ >"$CALLS/pid-$SLURM_PROCID.partial"
mv "$CALLS/pid-$SLURM_PROCID.partial" "$CALLS/pid-$SLURM_PROCID"
while :; do sleep 0.02; done
"""
SBATCH = """#!/bin/bash
cat >"$CALLS/script"
echo "$*" >"$CALLS/sbatch"
if [[ -n ${REFUSAL-} ]]; then echo "sbatch: error: $REFUSAL" >&2; exit 1; fi
echo "4711;cluster"
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPES / "smoke.yaml", ["launcher.stop_within_s=20"])


@pytest.fixture
def submission(recipe: Recipe, tmp_path: Path) -> Submission:
    return Submission(
        recipe=recipe,
        source="recipes/smoke.yaml",
        name="one",
        folder=str(tmp_path),
        nodes=3,
        gpus_per_node=2,
        environment={"GREETING": "it's; $HOME `here`"},
    )


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-ins in the place of the commands; returns the folder where they leave what they saw."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH), ("metaloom", METALOOM)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    folder = tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "metaloom"))
    (tmp_path / "runs").mkdir()
    return folder


def start(script: str, **variables: str) -> subprocess.Popen[str]:
    """The script as Slurm starts it."""
    given = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-3]"} | variables
    process = subprocess.Popen(
        ["bash"],
        env=os.environ | given,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(script)
    process.stdin.close()
    process.stdin = None
    return process


def run(script: str, **variables: str) -> tuple[int, str]:
    process = start(script, **variables)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_the_script_of_a_job_is_as_it_was_reviewed(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/metaloom/bin/python")
    monkeypatch.setattr("metaloom.launchers.slurm.recipe_text", lambda given: "name: smoke\n...: ...\n")
    whole = dataclasses.replace(
        submission,
        folder="/shared/home/ada",
        run="runs/one",
        memory_per_node="64Gi",
        time_limit_s=90000,
        queue="gpu",
    )
    launcher = Slurm(account="lab", qos="low", constraint="a100&ib", sbatch=("--exclude=node7",))
    assert launcher.plan(whole) == GOLDEN.read_text()


def test_the_script_is_sound_bash(submission: Submission) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=Slurm().plan(submission), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_node_runs_the_same_command_by_the_recipe_as_it_was_when_submitted(
    submission: Submission, calls: Path, tmp_path: Path
) -> None:
    code, output = run(Slurm().plan(submission), CODE="0")
    assert (code, output.splitlines()[-1]) == (0, "metaloom: done")
    words = [(calls / f"words-{index}").read_text().splitlines() for index in range(3)]
    assert words[0] == words[1] == words[2]
    assert words[0] == [
        *("-m", "metaloom.cli", "train", f"{tmp_path}/runs/one-4711.yaml", "--run", f"{tmp_path}/runs/one"),
        "launcher.num_processes=2",
        "launcher.hosts.endpoint=node1:24711",
        "launcher.hosts.num_hosts=3",
    ]
    assert load_recipe(calls / "recipe-2") == submission.recipe
    # What the command is given holds together.
    assert load_recipe(calls / "recipe-2", words[0][-3:]).launcher.hosts is not None
    assert (calls / "greeting").read_text() == "it's; $HOME `here`\n"
    assert "--kill-on-bad-exit=0 --wait=0" in (calls / "srun").read_text()
    assert not (calls / "requeued").exists()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == []


def test_a_job_that_was_stopped_and_saved_goes_back_into_the_queue_however_often(
    submission: Submission, calls: Path
) -> None:
    script = Slurm(max_faults=0).plan(submission)
    for count in range(1, 4):
        code, output = run(script, CODE="75", SLURM_RESTART_COUNT=str(count))
        assert code == 75
        assert f"start {count + 1} of job 4711" in output
        assert (calls / "requeued").read_text().splitlines() == ["4711"] * count
        assert "the job is back in the queue and will go on from its last checkpoint" in output


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_a_mistake_is_not_tried_again(submission: Submission, calls: Path, code: int) -> None:
    ended, output = run(Slurm().plan(submission), CODE=str(code))
    assert ended == code
    assert output.splitlines()[-1] == f"metaloom: exit code {code}: trying again would not help, see above"
    assert not (calls / "requeued").exists()


@pytest.mark.parametrize("code", ["1", "137"])
def test_a_fault_is_tried_again_so_often_and_preemptions_do_not_count(
    submission: Submission, calls: Path, code: str
) -> None:
    script = Slurm(max_faults=2).plan(submission)
    for given, last in (
        (code, f"exit code {code}, fault 1 of at most 2"),
        ("75", "stopped and saved"),
        (code, f"exit code {code}, fault 2 of at most 2"),
        (code, f"exit code {code}, fault 3 of the job: given up"),
    ):
        ended, output = run(script, CODE=given)
        assert ended == int(given)
        assert f"metaloom: {last}\n" in output
    assert (calls / "requeued").read_text().splitlines() == ["4711"] * 3


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "TIMEOUT"])
def test_a_job_that_slurm_has_ended_itself_is_left_to_it(
    submission: Submission, calls: Path, state: str
) -> None:
    code, output = run(Slurm().plan(submission), CODE="75", JOB_STATE=state)
    assert code == 75
    assert "Slurm has ended the job, so it is not put back into the queue from here" in output
    assert not (calls / "requeued").exists()


def test_a_requeue_that_is_refused_is_told(submission: Submission, calls: Path) -> None:
    code, output = run(Slurm().plan(submission), CODE="75", REQUEUE_CODE="1")
    assert code == 75
    assert "the job could not be put back into the queue: submit it again with --resume" in output


def test_signals_to_the_tasks_and_to_the_shell_save_and_requeue(submission: Submission, calls: Path) -> None:
    process = start(Slurm().plan(submission))
    pids = [calls / f"pid-{index}" for index in range(3)]
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # As Slurm does it: to the shell, and to each task, not to srun.
    process.send_signal(signal.SIGTERM)
    for path in pids:
        os.kill(int(path.read_text()), signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped and saved" in output
    assert (calls / "requeued").read_text() == "4711\n"


def test_submitting_gives_the_script_to_sbatch_and_tells_the_next_commands(
    submission: Submission, calls: Path, tmp_path: Path
) -> None:
    asked = dataclasses.replace(submission, run="deep/er/run")
    submitted = Slurm().submit(asked)
    assert (calls / "sbatch").read_text() == "--parsable\n"
    assert (calls / "script").read_text() == Slurm().plan(asked)
    assert (tmp_path / "deep" / "er").is_dir()
    assert submitted.name == "4711"
    assert submitted.lines[0] == (
        f"submitted one as Slurm job 4711; the run's folder is {tmp_path}/deep/er/run"
    )
    told = [" ".join(line.split()[:4]) for line in submitted.lines[1:]]
    assert told == [
        "squeue --job 4711 where",
        "scontrol show job 4711",
        f"tail -F {tmp_path}/deep/er/one-4711.log",
        "scancel 4711 save and",
    ]


def test_what_sbatch_says_is_passed_on(
    submission: Submission, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSAL", "invalid partition specified: gpus")
    with pytest.raises(LaunchError, match=r"^sbatch refused the job: invalid partition specified: gpus$"):
        Slurm().submit(submission)


def test_without_slurm_nothing_is_submitted(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"sbatch is not on the PATH here: submit from a login node"):
        Slurm().submit(submission)
    assert [need.is_there for need in Slurm.needs()] == [False]


def test_a_run_goes_on_only_where_it_is_meant_to(submission: Submission, calls: Path, tmp_path: Path) -> None:
    resumed = dataclasses.replace(submission, is_resumed=True)
    with pytest.raises(
        LaunchError, match=r"--resume: no run has started in .*/runs/one\. Leave --resume out"
    ):
        Slurm().submit(resumed)
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"/runs/one already holds a run\. Go on with it by --resume"):
        Slurm().submit(submission)
    assert Slurm().submit(resumed).name == "4711"


def test_all_that_is_wrong_is_told_at_once(submission: Submission) -> None:
    wrong = dataclasses.replace(
        submission,
        name="a/b",
        folder="/home/ada/my jobs",
        nodes=0,
        memory_per_node="4 gigs",
        time_limit_s=100,
        queue="big gpu",
    )
    launcher = Slurm(account="the lab", sbatch=("exclude",), max_faults=-1)
    with pytest.raises(LaunchError) as raised:
        launcher.plan(wrong)
    assert str(raised.value).splitlines() == [
        "10 problems:",
        "  --nodes is 0; it must be at least 1.",
        "  --account: 'the lab' cannot stand in a batch script; leave out blanks and quotes.",
        "  --queue: 'big gpu' is no name of a partition.",
        "  --sbatch: 'exclude' is no option of sbatch; write it as --exclude=node3.",
        "  the folder: Slurm cannot take a path with blanks, quotes or other special characters: "
        "'/home/ada/my jobs'. Use another one.",
        "  --run: Slurm cannot take a path with blanks, quotes or other special characters: "
        "'/home/ada/my jobs/runs/a/b'. Use another one.",
        "  --name: 'a/b' is no name of a Slurm job and its files.",
        "  --max-faults is -1; it must be at least 0.",
        "  --memory-per-node: '4 gigs' is no amount of memory; write it as 64Gi or 500M.",
        "  --time-limit is 100 s, but a job is asked to stop up to 115 s before its time limit "
        "(launcher.stop_within_s and what Slurm takes): it would never get anywhere.",
    ]


def test_a_time_to_stop_that_slurm_cannot_grant_is_refused(submission: Submission) -> None:
    launcher = submission.recipe.launcher.model_copy(update={"stop_within_s": 7e4})
    slow = dataclasses.replace(submission, recipe=submission.recipe.model_copy(update={"launcher": launcher}))
    with pytest.raises(LaunchError, match=r"launcher\.stop_within_s is 70000; .* must be at most 65500"):
        Slurm().plan(slow)


def test_processors_are_asked_for_each_thread_and_reader_where_nothing_else_is_said(
    submission: Submission,
) -> None:
    assert "#SBATCH --cpus-per-task=4\n" in Slurm().plan(submission)
    assert "#SBATCH --cpus-per-task=9\n" in Slurm().plan(dataclasses.replace(submission, cpus_per_node=9))


def test_a_secret_does_not_come_into_the_script(submission: Submission, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    key.touch()
    variables = {"HF_TOKEN": "planted", "TRACKING": "https://me:planted@host", "MY_CREDENTIALS": str(key)}
    with pytest.raises(LaunchError) as raised:
        Slurm().plan(dataclasses.replace(submission, environment=variables))
    lines = str(raised.value).splitlines()
    assert lines[0] == "2 problems:"
    assert lines[1] == (
        "  --env: HF_TOKEN reads like a secret, and the batch script, which Slurm keeps and shows, would "
        "hold its value. Set it in the environment of this command, and leave --env HF_TOKEN out: sbatch "
        "passes the environment on, unless its option --export says otherwise."
    )
    assert lines[2].startswith("  --env: TRACKING reads like a secret")
    assert "planted" not in str(raised.value)


def test_the_environment_of_the_command_reaches_sbatch(
    submission: Submission, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "sbatch").write_text(
        '#!/bin/bash\ncat >/dev/null; echo "$HF_TOKEN" >"$CALLS/token"; echo 1\n'
    )
    monkeypatch.setenv("HF_TOKEN", "planted")
    Slurm().submit(submission)
    assert (calls / "token").read_text() == "planted\n"
