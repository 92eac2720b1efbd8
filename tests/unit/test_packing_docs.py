"""The page on packing holds: its commands and its code run, on data as it describes them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from metaloom.cli import main
from metaloom.datasets.pack import Limits
from metaloom.datasets.pack.parallel import CHUNK
from tests.packed import image_bytes, write_tree

PAGE = (Path(__file__).parents[2] / "docs" / "packing.md").read_text(encoding="utf-8")
DATA = Path(__file__).parents[1] / "data"
COMMANDS = re.findall(r"^    metaloom (.*)$", PAGE, flags=re.MULTILINE)


def write_sources(folder: Path) -> None:
    """What the commands of the page pack."""
    birds = ("wren", "jay", "robin", "owl", "swan", "emu")
    files = {
        f"birds/{name}/{n}.png": image_bytes((40 * row, n, 7))
        for row, name in enumerate(birds)
        for n in range(3)
    }
    files |= {f"domains/{domain}/dog/{n}.png": image_bytes(n) for n, domain in enumerate(("photo", "sketch"))}
    labels = ("good", "bad", "fine", "poor")
    rows = "".join(f"text {n},{labels[n % 4]},u{n % 3}\n" for n in range(12))
    files["reviews.csv"] = b"text,label,user\n" + rows.encode()
    files["books.jsonl"] = "".join(json.dumps({"text": f"book {n}"}) + "\n" for n in range(8)).encode()
    example, other = ({"input": [1.0, row], "target": 3} for row in (2.0, 3.0))
    files["tasks.jsonl"] = json.dumps({"support": [example], "query": [other]}).encode()
    write_tree(folder, files)
    shutil.copy(DATA / "hf-texts.parquet", folder / "reviews.parquet")
    shutil.copytree(DATA / "hf-texts", folder / "saved")


def test_the_commands_and_the_code_on_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    assert len(COMMANDS) == 9
    for words in COMMANDS:
        assert main(shlex.split(words)) == 0, words
    assert Path("episode.png").stat().st_size > 500
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_limits_on_the_page_are_those_in_force() -> None:
    limits = Limits()
    assert f"`--max-pixels` ({limits.max_pixels // 10**6} million)" in PAGE
    assert f"`--max-sample-bytes` ({limits.max_sample_bytes >> 20} MiB)" in PAGE
    assert f"three chunks of {CHUNK} samples a process" in PAGE
