"""The page on data holds: its code runs, its rules are the program's."""

import re
from pathlib import Path

import pytest

from metaloom.datasets import glyphs, stdlib_code

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_limits_on_the_page_are_those_in_force() -> None:
    assert f"smallest\nof these is below {glyphs.TWIN_LIMIT}:" in PAGE
    assert f"different\nsplits are twins already below {glyphs.TWIN_LIMIT_ACROSS_SPLITS}." in PAGE
    assert f"at a font size of {glyphs.FONT_SIZE_PX} pixels" in PAGE
    assert f"at least {stdlib_code.MIN_BYTES} bytes" in PAGE
    for split, share in stdlib_code.SHARES.items():
        assert f"| {split} | {share:.0%} |".replace("%", " %") in PAGE
