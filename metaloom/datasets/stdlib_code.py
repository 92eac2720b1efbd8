"""The data set `stdlib`: the source text of the running Python's standard library, a module a task."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.shards import Sample, SplitSamples
from metaloom.errors import StreamError

RULES = 1  # of this module; raise it when the same Python would give other data
MIN_BYTES = 4096

# The share of bytes, and of modules, that each split is to have. A top-level package is never split.
SHARES = {"train": 0.62, "validation": 0.10, "test": 0.15, "rehearsal": 0.13}

# Left out: tests and demonstrations, and modules that are generated or are tables rather than code.
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_EXCLUDED = frozenset(
    {
        "antigravity",
        "encodings",  # code pages
        "ensurepip",  # bundled wheels
        "html/entities",
        "idlelib/idle_test",
        "pydoc_data",
        "stringprep",
        "test",
        "this",
        "turtledemo",
    }
)


@dataclass(frozen=True)
class Module:
    """One module: its path without suffix (`asyncio/events`), its text in UTF-8 with \\n line ends."""

    path: str
    text: bytes

    @property
    def name(self) -> str:
        """As it is imported: `asyncio.events`."""
        return self.path.removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """The top-level name, by which modules are split."""
        return self.path.split("/")[0]


def find_modules(root: str | Path | None = None) -> list[Module]:
    """The modules of the standard library that are tasks, sorted by path.

    A module counts if its top-level name is in `sys.stdlib_module_names`, if it is not excluded (tests,
    demonstrations, code pages, generated tables), and if its text has at least 4096 bytes.

    Args:
        root: the folder of the library; None is that of the running Python.

    Raises:
        StreamError: there is no source text there.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    modules = []
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).with_suffix("").as_posix()
        if not _is_task(path):
            continue
        try:
            raw = file.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            text = raw.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            raise StreamError(f"stdlib cannot be made: {file} cannot be read as text: {error}") from error
        payload = text.replace("\r\n", "\n").replace("\r", "\n").encode()
        if len(payload) >= MIN_BYTES:
            modules.append(Module(path, payload))
    if not modules:
        raise StreamError(
            f"stdlib cannot be made: {folder} has no source text of the standard library. Use a Python that "
            f"was installed with its .py files."
        )
    return sorted(modules, key=lambda module: module.path)


def split_modules(modules: Sequence[Module]) -> dict[str, list[Module]]:
    """The modules of each split, sorted by path; all modules of one top-level name are in one split.

    Packages are taken by size (powers of two, larger ones first), then by the sha256 of their names; each
    goes to the split that lacks most, bytes and modules counting alike. So the few large packages train,
    the shares come out close, and who is where depends on the corpus alone.
    """
    packages: dict[str, list[Module]] = {}
    for module in modules:
        packages.setdefault(module.package, []).append(module)
    size = {package: sum(len(m.text) for m in members) for package, members in packages.items()}
    order = sorted(
        packages,
        key=lambda package: (-size[package].bit_length(), hashlib.sha256(package.encode()).hexdigest()),
    )
    total = sum(size.values())
    lacking = {split: 2 * share for split, share in SHARES.items()}  # of all bytes, and of all modules
    splits: dict[str, list[Module]] = {split: [] for split in SHARES}
    for package in order:
        members = packages[package]
        split = max(SHARES, key=lambda name: lacking[name])
        lacking[split] -= size[package] / total + len(members) / len(modules)
        splits[split] += members
    return {split: sorted(members, key=lambda m: m.path) for split, members in splits.items()}


def make_stdlib(*, max_modules_per_split: int | None = None) -> dict[str, list[Module]]:
    """The modules of each split.

    Args:
        max_modules_per_split: keeps so many modules of each split, those whose paths have the smallest
            sha256; None keeps all.
    """
    splits = split_modules(find_modules())
    if max_modules_per_split is None:
        return splits
    return {
        split: sorted(sorted(members, key=_path_digest)[:max_modules_per_split], key=lambda m: m.path)
        for split, members in splits.items()
    }


def corpus_digest(splits: dict[str, list[Module]]) -> str:
    """sha256 over paths and texts of all modules."""
    digest = hashlib.sha256()
    for members in splits.values():
        for module in members:
            digest.update(f"{module.path} {hashlib.sha256(module.text).hexdigest()}\n".encode())
    return digest.hexdigest()


def split_samples(splits: dict[str, list[Module]]) -> dict[str, SplitSamples]:
    """What to write: a sample for each module, its text and its particulars."""
    return {split: SplitSamples(_samples(members)) for split, members in splits.items()}


def source(splits: dict[str, list[Module]], *, max_modules_per_split: int | None = None) -> dict[str, Any]:
    """What decides the data: rules, versions and options."""
    return {
        "rules": RULES,
        "python": platform.python_version(),
        "corpus_sha256": corpus_digest(splits),
        "max_modules_per_split": max_modules_per_split,
    }


def _samples(modules: Sequence[Module]) -> Iterator[Sample]:
    for module in modules:
        particulars = {
            "module": module.name,
            "package": module.package,
            "bytes": len(module.text),
            "lines": module.text.count(b"\n"),
            "sha256": hashlib.sha256(module.text).hexdigest(),
        }
        members = {"json": json.dumps(particulars).encode(), "txt": module.text}
        yield Sample(module.path, members, {"size": len(module.text)})


def _is_task(path: str) -> bool:
    parts = path.split("/")
    return (
        parts[0] in sys.stdlib_module_names
        and not parts[0].startswith("_sysconfigdata")
        and not _TEST_FOLDERS.intersection(parts)
        and not any("/".join(parts[:depth]) in _EXCLUDED for depth in range(1, len(parts) + 1))
    )


def _path_digest(module: Module) -> str:
    return hashlib.sha256(module.path.encode()).hexdigest()
