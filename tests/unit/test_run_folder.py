"""The folder of a run, as the commands of several hosts meet in it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metaloom.run_folder import RunFolder


def test_two_hosts_may_make_it_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def create_often(_: int) -> None:
        for _ in range(200):
            folder.create()

    with ThreadPoolExecutor(4) as hosts:
        list(hosts.map(create_often, range(4)))
    assert list(folder.path.iterdir()) == []
