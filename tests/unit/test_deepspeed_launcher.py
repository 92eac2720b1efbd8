"""The launcher over a hostfile, with a stand-in for ssh that runs the far end on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metaloom.errors import LaunchError
from metaloom.launchers.base import Submission
from metaloom.launchers.deepspeed import DeepSpeed
from metaloom.launchers.hostfile import excluded, included, read_hostfile
from metaloom.recipe import Recipe, load_recipe
from tests.commands import RECIPES, REPOSITORY

# Notes its words, and runs the command here; a host named `unknown` or `broken` cannot be reached.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do options+=("$1"); [[ $1 == -o ]] && shift; shift; done
host=$1; shift
case $host in
  unknown) echo "ssh: Could not resolve hostname unknown" >&2; exit 255 ;;
  broken) echo "no such python" >&2; exit 127 ;;
esac
echo "Welcome to $host"
export STAND_IN_HOST=$host
echo "$*" >"$CALLS/ssh-$host"
# A child, as the far end is of sshd: killing this cuts the connection.
exec 3<&0
bash -c "$*" <&3 &
child=$!
echo $$ >"$CALLS/client-$host"
exec 3<&-
if [[ -n ${CUT_OFF-} ]]; then trap 'exit 255' TERM; fi
wait "$child"
"""
METALOOM = """#!/bin/bash
host=$STAND_IN_HOST
cp "$4" "$CALLS/recipe-$host"
printf '%s\\n' "${@:5}" >"$CALLS/words-$host"
echo "${CUDA_VISIBLE_DEVICES-all} $GREETING" >"$CALLS/variables-$host"
echo "says $host"
echo "warns $host" >&2
if [[ -n ${CODE-} ]]; then exit "$CODE"; fi
count=0
stop() {
  echo "$1" >>"$CALLS/got-$host"
  ((++count == ${STOP_AFTER:-1})) && exit "$2"
}
trap 'stop INT 130' INT
trap 'stop HUP 75' HUP
trap "stop TERM ${TERM_CODE:-75}" TERM
echo $$ >"$CALLS/pid-$host"
while :; do sleep 0.02; done
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPES / "smoke.yaml")


@pytest.fixture
def submission(recipe: Recipe, tmp_path: Path) -> Submission:
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\nc slots=4\n")
    return Submission(
        recipe=recipe,
        source="recipes/smoke.yaml",
        name="one",
        folder=str(tmp_path),
        environment={"GREETING": "it's; $HOME"},
    )


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-ins in their places; returns the folder where they leave what they saw."""
    for name, text in (("ssh", SSH), ("metaloom", METALOOM)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    folder = tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stand_in = [str(tmp_path / "bin" / "metaloom"), "-m", "metaloom.cli"]
    monkeypatch.setattr("metaloom.launchers.deepspeed.metaloom_command", lambda: stand_in)
    return folder


HOSTS = DeepSpeed(hostfile=Path("hosts"))

# The launcher in a process of its own, which signals can be sent to.
PROGRAM = """
import sys
from pathlib import Path
import metaloom.launchers.deepspeed as module
from metaloom.errors import LaunchError
from metaloom.launchers.base import Submission
from metaloom.recipe import load_recipe
folder, recipe = sys.argv[1:]
module.metaloom_command = lambda: [f"{folder}/bin/metaloom", "-m", "metaloom.cli"]
submission = Submission(recipe=load_recipe(recipe), source=recipe, name="one", folder=folder)
try:
    submitted = module.DeepSpeed(hostfile=Path("hosts")).submit(submission)
except LaunchError as error:
    print(error)
    sys.exit(5)
print(*submitted.lines, sep="\\n")
sys.exit(submitted.exit_code)
"""


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job whose commands on the three hosts wait for a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(RECIPES / "smoke.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: all((folder / "calls" / f"pid-{host}").exists() for host in "abc"))
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_every_host_runs_the_same_command_and_its_output_has_its_name(
    submission: Submission,
    calls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CODE", "0")
    submitted = HOSTS.submit(submission)
    assert submitted.exit_code == 0
    assert submitted.lines == (f"one done; the run's folder is {tmp_path}/runs/one",)
    for host in "abc":
        assert (calls / f"words-{host}").read_text().splitlines() == [
            "--run",
            f"{tmp_path}/runs/one",
            "launcher.num_processes=4",
            "launcher.hosts.endpoint=a:29400",
            "launcher.hosts.num_hosts=3",
        ]
        assert load_recipe(calls / f"recipe-{host}") == submission.recipe
        assert (calls / f"variables-{host}").read_text() == "all it's; $HOME\n"
        # Nothing that others on these machines should not read is in a command line.
        assert "GREETING" not in (calls / f"ssh-{host}").read_text()
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == [f"[{host}] says {host}" for host in "abc"]
    assert sorted(shown.err.splitlines()) == [f"[{host}] warns {host}" for host in "abc"]


def test_the_code_of_the_job_is_passed_on(
    submission: Submission, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "2")
    submitted = HOSTS.submit(submission)
    assert submitted.exit_code == 2
    assert submitted.lines[0].startswith("one ended with code 2, see above")


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGINT, "INT", 130), (signal.SIGTERM, "TERM", 75), (signal.SIGHUP, "HUP", 75)],
)
def test_a_signal_reaches_the_command_of_every_host_once(
    submission: Submission, calls: Path, tmp_path: Path, number: int, name: str, code: int
) -> None:
    with running(tmp_path) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == code
    assert [(calls / f"got-{host}").read_text() for host in "abc"] == [f"{name}\n"] * 3
    if code == 75:
        assert "one stopped and saved: give the command again with --resume to go on" in output


def test_a_second_signal_is_passed_on_too(
    submission: Submission, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AFTER", "2")
    monkeypatch.setenv("TERM_CODE", "143")
    with running(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: all((calls / f"got-{host}").exists() for host in "abc"))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 143
    assert [(calls / f"got-{host}").read_text() for host in "abc"] == ["TERM\nTERM\n"] * 3


def test_a_launcher_that_is_killed_leaves_nothing_behind(
    submission: Submission, calls: Path, tmp_path: Path
) -> None:
    with running(tmp_path) as process:
        pids = [int((calls / f"pid-{host}").read_text()) for host in "abc"]
        process.kill()
        process.wait()
        wait_for(lambda: all(map(has_ended, pids)))
        assert [(calls / f"got-{host}").read_text() for host in "abc"] == ["TERM\n"] * 3


def test_a_host_that_is_cut_off_saves_and_the_others_are_stopped_where_they_are_too_few(
    submission: Submission, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUT_OFF", "1")
    with running(tmp_path) as process:
        # What ssh ends with when its connection breaks off.
        os.kill(int((calls / "client-b").read_text()), signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75
        assert "b: the connection to it broke off; the others save and end\n" in output
        wait_for(lambda: (calls / "got-b").exists())
    assert [(calls / f"got-{host}").read_text() for host in "abc"] == ["TERM\n"] * 3


def test_the_job_does_not_outlive_the_connection_to_its_first_host(
    submission: Submission, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUT_OFF", "1")
    with running(tmp_path) as process:
        os.kill(int((calls / "client-a").read_text()), signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 5
        assert "a: the connection to it broke off, and the job cannot go on without the first host" in output


def test_nothing_starts_where_a_host_cannot_be_reached_and_all_of_them_are_named(
    submission: Submission, calls: Path, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nunknown slots=2\nbroken slots=2\n")
    with pytest.raises(LaunchError) as raised:
        HOSTS.submit(submission)
    assert str(raised.value).splitlines() == [
        "2 problems:",
        "  unknown: cannot be reached by ssh: ssh: Could not resolve hostname unknown. "
        "`ssh unknown true` has to work here without a question: set up a key, and accept the host's key "
        "once.",
        "  broken: metaloom does not start there: no such python. The hosts need "
        f"{sys.executable} with the same metaloom, and this folder, at the same paths.",
    ]
    assert not list(calls.glob("words-*"))


def test_chosen_slots_are_what_ranks_see(
    submission: Submission, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "0")
    DeepSpeed(Path("hosts"), include="c:1,3@a:0,2").submit(submission)
    assert (calls / "variables-a").read_text().startswith("0,2 ")
    assert (calls / "variables-c").read_text().startswith("1,3 ")
    assert not (calls / "variables-b").exists()
    assert "launcher.num_processes=2\nlauncher.hosts.endpoint=a:29400" in (calls / "words-c").read_text()


def test_the_plan_shows_ssh_and_the_command_of_every_host(submission: Submission, tmp_path: Path) -> None:
    lines = DeepSpeed(Path("hosts"), port=30000).plan(dataclasses.replace(submission, nodes=2)).splitlines()
    assert lines[0].startswith("ssh -T -o BatchMode=yes -o ConnectTimeout=30 ")
    assert shlex.split(lines[0])[-2:] == [
        "a",
        f"cd {tmp_path} && exec {sys.executable} -m metaloom.launchers.far_end",
    ]
    assert shlex.split(lines[2])[-2] == "b"
    assert lines[1] == lines[3]
    assert shlex.split(lines[1]) == [
        *("env", "GREETING=it's; $HOME", sys.executable, "-m", "metaloom.cli", "train", "recipes/smoke.yaml"),
        *("--run", f"{tmp_path}/runs/one", "launcher.num_processes=4"),
        *("launcher.hosts.endpoint=a:30000", "launcher.hosts.num_hosts=2"),
    ]


def test_a_secret_is_passed_on_by_its_name_and_shown_nowhere(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dataclasses.replace(submission, environment={"HF_TOKEN": "planted"})
    with pytest.raises(LaunchError) as raised:
        HOSTS.plan(given)
    assert str(raised.value) == (
        "--env: HF_TOKEN reads like a secret, and while this command runs, everyone on this machine can read "
        "its words: set it in the environment here, and give --env HF_TOKEN without the value."
    )
    monkeypatch.setenv("HF_TOKEN", "planted")
    assert "HF_TOKEN=***" in shlex.split(HOSTS.plan(given).splitlines()[1])
    assert "planted" not in HOSTS.plan(given)


def test_options_are_checked_all_at_once(submission: Submission) -> None:
    wrong = dataclasses.replace(
        submission, ranks_per_node=2, time_limit_s=60, memory_per_node="4Gi", nodes=2, queue="q"
    )
    with pytest.raises(LaunchError) as raised:
        DeepSpeed(include="a", port=80).plan(wrong)
    assert str(raised.value).splitlines() == [
        "7 problems:",
        "  --ranks-per-node has no effect with the launcher deepspeed: the slots of the hostfile say how "
        "many.",
        "  --memory-per-node has no effect with the launcher deepspeed: nothing is reserved on the hosts.",
        "  --time-limit has no effect with the launcher deepspeed: stop the command, by Ctrl-C or SIGTERM, "
        "and give it again with --resume.",
        "  --queue has no effect with the launcher deepspeed: nothing waits.",
        "  --hostfile is not given: it names the hosts, on lines of the form HOST slots=N.",
        "  --nodes and --gpus-per-node have no effect beside --include or --exclude.",
        "  --port is 80; it must be from 1024 to 65535.",
    ]
    with pytest.raises(LaunchError, match=r"--include and --exclude exclude each other"):
        DeepSpeed(Path("hosts"), include="a", exclude="b").plan(submission)


def test_more_than_the_hostfile_has_is_refused(submission: Submission, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--nodes is 4, but the hostfile has 3\."):
        HOSTS.plan(dataclasses.replace(submission, nodes=4))
    with pytest.raises(
        LaunchError, match=r"--gpus-per-node is 5, but there are fewer slots: a 4, b 4, c 4\."
    ):
        HOSTS.plan(dataclasses.replace(submission, gpus_per_node=5))
    with pytest.raises(LaunchError, match=r"--gpus-per-node is 0; with a hostfile it is the slots to take"):
        HOSTS.plan(dataclasses.replace(submission, gpus_per_node=0))
    (tmp_path / "hosts").write_text("a slots=4\nb slots=8\n")
    with pytest.raises(
        LaunchError, match=r"different numbers of slots: a 4, b 8\. All hosts of a job run as"
    ):
        HOSTS.plan(submission)
    assert "launcher.num_processes=3" in HOSTS.plan(dataclasses.replace(submission, gpus_per_node=3))


def test_a_run_that_has_started_goes_on_only_with_resume(submission: Submission, tmp_path: Path) -> None:
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"already holds a run\. Go on with it by --resume"):
        HOSTS.submit(submission)


def test_without_ssh_nothing_is_started(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"ssh is not on the PATH here: install OpenSSH's client"):
        HOSTS.submit(submission)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the lab's\n\n  worker-1   slots=4 # new\nworker-0 slots=2\n10.0.0.7\tslots=1\n")
    assert read_hostfile(path) == {"worker-1": [0, 1, 2, 3], "worker-0": [0, 1], "10.0.0.7": [0]}


def test_every_wrong_line_of_a_hostfile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=4\nb slot=4\na slots=2\nc slots=0\nada@d slots=1\n-oProxyCommand=x slots=1\ne\n")
    with pytest.raises(LaunchError) as raised:
        read_hostfile(path)
    lines = [line.replace(str(path), "hosts") for line in str(raised.value).splitlines()]
    assert lines == [
        "6 problems:",
        "  --hostfile hosts, line 2: 'b slot=4' is not of the form HOST slots=N.",
        "  --hostfile hosts, line 3: a is in line 1 already.",
        "  --hostfile hosts, line 4: slots=0; a host has 1 to 1024 slots, one for each rank.",
        "  --hostfile hosts, line 5: 'ada@d' is no name or IPv4 address of a host; a user name or port "
        "belongs into ~/.ssh/config.",
        "  --hostfile hosts, line 6: '-oProxyCommand=x' is no name or IPv4 address of a host; a user "
        "name or port belongs into ~/.ssh/config.",
        "  --hostfile hosts, line 7: 'e' is not of the form HOST slots=N.",
    ]
    path.write_text("# nothing\n")
    with pytest.raises(LaunchError, match=r"it names no host; write a line HOST slots=N for each"):
        read_hostfile(path)
    with pytest.raises(LaunchError, match=r"absent: it cannot be read: No such file or directory"):
        read_hostfile(tmp_path / "absent")


def test_hosts_and_slots_are_chosen_as_by_deepspeed() -> None:
    slots = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}
    assert included(slots, "worker-1:0,2@worker-0") == {"worker-0": [0, 1, 2, 3], "worker-1": [0, 2]}
    assert included(slots, "worker-1:3@worker-1:1") == {"worker-1": [1, 3]}
    assert excluded(slots, "worker-1:0") == {"worker-0": [0, 1, 2, 3], "worker-1": [1, 2, 3]}
    assert excluded(slots, "worker-0") == {"worker-1": [0, 1, 2, 3]}
    with pytest.raises(LaunchError) as raised:
        included(slots, "worker-2@db@worker-0:4,1@worker-1:a")
    assert str(raised.value).splitlines() == [
        "4 problems:",
        "  --include: the hostfile has no 'worker-2'; did you mean worker-1?",
        "  --include: the hostfile has no 'db'; it has worker-0, worker-1.",
        "  --include: worker-0 has slots 0 to 3, not 4.",
        "  --include: 'worker-1:a' is not of the form HOST:SLOT,SLOT.",
    ]
    with pytest.raises(LaunchError, match=r"--exclude worker-0@worker-1: no host is left\."):
        excluded(slots, "worker-0@worker-1")


def test_what_the_hosts_print_is_let_go_where_the_launcher_is_gone(tmp_path: Path) -> None:
    # The far end alone, whose readers are gone before its command prints and ends.
    request = {
        "words": [
            "/bin/sh",
            "-c",
            f"sleep 0.3; echo late; echo late >&2; echo saved >{tmp_path}/saved",
            None,
        ],
        "recipe": "",
        "environment": {},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "metaloom.launchers.far_end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"metaloom: ready for its part of a job\n"
        process.stdout.close()
        process.stderr.close()
        assert process.wait(30) == 0
    assert (tmp_path / "saved").read_text() == "saved\n"
