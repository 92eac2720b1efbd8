"""The oldest release of the official client that is admitted does what the pinned one does."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.commands import REPOSITORY, environment

OLDEST = REPOSITORY / ".venv" / "oldest"  # where the Makefile puts it


def test_the_oldest_client_passes_the_tests_of_the_client() -> None:
    if not OLDEST.is_dir():
        pytest.skip(f"{OLDEST} is not there: `make test` puts the oldest client into it")
    (found,) = OLDEST.glob("kubernetes-*.dist-info")
    version = found.name.removesuffix(".dist-info").partition("-")[2]
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["kubernetes"] == [f"kubernetes>={version.partition('.')[0]}"]
    paths = f"{OLDEST}:{environment()['PYTHONPATH']}"
    version_words = "import kubernetes; print(kubernetes.__version__)"
    words = [sys.executable, "-c", version_words]
    variables = environment() | {"PYTHONPATH": paths}
    said = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == version
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/k8s/test_kube_client.py"]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout
