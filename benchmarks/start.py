"""How long commands take that start no training, and whether they import torch: prints a table.

    python -m benchmarks.start               five runs of each command; a minute where nothing else runs
    python -m benchmarks.start --runs 11

Each command is a process of its own. `wall` and `cpu` are medians of the runs, in seconds: from its start to
its end, and of all its threads. Other work of the machine makes the first longer, and the second hardly. Runs
alternate between the commands, so that it hits all alike; one run before them, which is not counted, reads
the files and writes the bytecode. `python -c pass` is what an interpreter takes alone.

`jobs list` asks an API server of this machine which has no jobs and answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RECIPE = "recipes/smoke.yaml"
PLACES = ("data.url=s3://bucket/data", "checkpoint.url=s3://bucket/run", "tracking.uri=http://mlflow:5000")
SUBMIT = (
    "submit",
    RECIPE,
    "--dry-run",
    "--image",
    "registry/metaloom:1",
    "--name",
    "one",
    "--nodes",
    "2",
    *PLACES,
)
COMMANDS: Mapping[str, Sequence[str]] = {
    "metaloom --help": ("--help",),
    "metaloom submit --dry-run, job": (*SUBMIT, "--backend", "job"),
    "metaloom submit --dry-run, jobset": (*SUBMIT, "--backend", "jobset"),
    "metaloom submit --dry-run, pytorchjob": (*SUBMIT, "--backend", "pytorchjob"),
    "metaloom submit --dry-run, trainjob": (*SUBMIT, "--backend", "trainjob"),
    "metaloom jobs list": ("jobs", "list"),
}
METALOOM = (sys.executable, "-m", "metaloom.cli")
# A command that says at its end what it has imported.
TELLING = """
import sys
from metaloom.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


class Empty(BaseHTTPRequestHandler):
    """An API server that has nothing of anything."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = json.dumps({"items": [], "resources": [], "metadata": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every command and prints a row for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each command (default: 5)")
    num_runs = parser.parse_args(argv).runs
    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="metaloom-start-") as folder:
        config = Path(folder) / "kubeconfig"
        config.write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{server.server_address[1]}")))
        environment = os.environ | {"KUBECONFIG": str(config)}
        rows: dict[str, Sequence[str]] = {"python -c pass": (sys.executable, "-c", "pass")}
        rows |= {name: (*METALOOM, *words) for name, words in COMMANDS.items()}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(num_runs + 1):
            for name, command in rows.items():
                runs[name].append(seconds(command, environment))
        print(f"{'command':<40}{'wall':>9}{'cpu':>9}  torch")
        for name in rows:
            wall_s, cpu_s = (statistics.median(times) for times in zip(*runs[name][1:], strict=True))
            torch = "-" if name not in COMMANDS else imports_torch(COMMANDS[name], environment)
            print(f"{name:<40}{wall_s:>7.2f} s{cpu_s:>7.2f} s  {torch}", flush=True)
    server.shutdown()


def kubeconfig(url: str) -> dict[str, object]:
    """Of one cluster, at an address."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {"server": url}}],
        "users": [{"name": "dev", "user": {"token": "none"}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "dev", "namespace": "team"}}],
    }


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """The wall-clock time of a command and its processor time.

    Raises:
        RuntimeError: it does not end well.
    """
    begin_s = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begin_s
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.decode()}")
    return wall_s, usage.ru_utime + usage.ru_stime


def imports_torch(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Whether a command of metaloom imports torch, in a word."""
    command = (sys.executable, "-c", TELLING, *words)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return "imported" if done.stderr.splitlines()[-1] == "True" else "not imported"


if __name__ == "__main__":
    main()
