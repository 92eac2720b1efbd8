"""The stdlib data set: which modules, how they are split."""

from pathlib import Path

import pytest

from metaloom.datasets import stdlib_code
from metaloom.errors import StreamError

Splits = dict[str, list[stdlib_code.Module]]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return stdlib_code.make_stdlib()


def test_a_top_level_package_is_in_one_split(splits: Splits) -> None:
    owner: dict[str, str] = {}
    for split, modules in splits.items():
        for module in modules:
            assert owner.setdefault(module.package, split) == split


def test_shares_of_bytes_are_close_and_held_out_splits_have_many_modules(splits: Splits) -> None:
    total = sum(len(m.text) for modules in splits.values() for m in modules)
    for split, share in stdlib_code.SHARES.items():
        assert sum(len(m.text) for m in splits[split]) / total == pytest.approx(share, abs=0.06)
    assert len(splits["test"]) >= 40
    assert len(splits["validation"]) >= 25


def test_modules_are_long_enough_normalised_and_no_tests_or_tables(splits: Splits) -> None:
    for modules in splits.values():
        for module in modules:
            assert len(module.text) >= stdlib_code.MIN_BYTES
            assert b"\r" not in module.text
            module.text.decode()
            assert not {"test", "tests", "idle_test", "site-packages"} & set(module.path.split("/"))
            assert module.package not in ("encodings", "pydoc_data", "turtledemo", "ensurepip", "test")


def test_the_split_is_the_same_each_time_and_for_any_order_of_files(splits: Splits) -> None:
    assert stdlib_code.make_stdlib() == splits
    modules = [m for members in splits.values() for m in members]
    shuffled = stdlib_code.split_modules(sorted(modules, key=lambda m: m.text))
    assert shuffled == splits
    assert stdlib_code.corpus_digest(shuffled) == stdlib_code.corpus_digest(splits)


def test_latin_1_source_and_crlf_become_utf_8_and_lf(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\r\n" + "x = 'é'\r\n" * 600
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "decoder.py").write_bytes(text.encode("latin-1"))
    (tmp_path / "not_stdlib.py").write_text("x" * 5000)
    (module,) = stdlib_code.find_modules(tmp_path)
    assert (module.path, module.name, module.package) == ("json/decoder", "json.decoder", "json")
    assert module.text == text.replace("\r\n", "\n").encode()


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"has no source text of the standard library\. Use a Python"):
        stdlib_code.find_modules(tmp_path)


def test_a_module_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_bytes(b"x = '\xff\xfe'\n" * 1000)
    with pytest.raises(StreamError, match=r"json\.py cannot be read as text"):
        stdlib_code.find_modules(tmp_path)
