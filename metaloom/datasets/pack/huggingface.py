"""Folders that `datasets` of Hugging Face has written by `save_to_disk`, read with pyarrow alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.directory import SPLIT_WORDS
from metaloom.datasets.pack.arrow import ArrowFile, class_names_of, features_in, plan_rows, schema_of
from metaloom.datasets.pack.columns import Columns
from metaloom.datasets.pack.plan import Plan, Source, require_split_name
from metaloom.datasets.pack.records import NamedFile
from metaloom.errors import StreamError

_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


@dataclass(frozen=True)
class HuggingFace(Source):
    """Rows of a `Dataset` or `DatasetDict` on disk; classes have the names of their `ClassLabel`."""

    folder: Path
    columns: Columns
    root: Path | None = None

    def plan(self, directory: Path) -> Plan:
        names: dict[str, tuple[str, ...]] = {}
        files = []
        for split, folder in self._folders():
            found, paths = _class_names(folder), _data_files(folder)
            for column in names.keys() & found.keys():
                if names[column] != found[column]:
                    raise StreamError(f"{folder}: column {column!r} has other classes than in other splits.")
            names |= found
            for number, path in enumerate(paths):
                key = f"{split}/{number:05d}"
                shown = str(path.relative_to(self.folder))
                files.append(ArrowFile(NamedFile(str(path), key, self._split_of(split)), shown))
        return plan_rows(
            files, self.columns, class_names=names, root=self.root or self.folder, kind="huggingface"
        )

    def _split_of(self, name: str) -> str:
        """Of rows that neither a column nor shares deal to splits."""
        if self.columns.says_split:
            return "train"
        return SPLIT_WORDS.get(name) or require_split_name(name, str(self.folder))

    def _folders(self) -> list[tuple[str, Path]]:
        """(name of the split, folder of its files)."""
        if (self.folder / _SPLITS).is_file():
            names = _read(self.folder / _SPLITS).get("splits")
            if not isinstance(names, list) or not all(_is_name(name) for name in names):
                raise StreamError(f"{self.folder / _SPLITS} has no list of splits.")
            return [(name, self.folder / name) for name in names]
        if (self.folder / _STATE).is_file():
            return [(str(_read(self.folder / _STATE).get("_split") or "train"), self.folder)]
        raise StreamError(
            f"{self.folder} has neither {_SPLITS} nor {_STATE}, so save_to_disk of the library datasets did "
            f"not write it. Parquet files are packed by `metaloom data pack parquet`."
        )


def _class_names(folder: Path) -> dict[str, tuple[str, ...]]:
    if (folder / _INFO).is_file():
        return class_names_of(_read(folder / _INFO).get("features"))
    return class_names_of(features_in(schema_of(str(_data_files(folder)[0]))))


def _data_files(folder: Path) -> list[Path]:
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        raise StreamError(
            f"{folder} selects its rows by an index, as old releases of datasets wrote; load it, call "
            f"flatten_indices() and save it again."
        )
    entries = state.get("_data_files")
    names = [entry.get("filename") for entry in entries] if isinstance(entries, list) else []
    if not names or not all(_is_name(name) for name in names):
        raise StreamError(f"{folder / _STATE} names no data files of this folder.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise StreamError(f"{folder} lacks {', '.join(missing)}, which its {_STATE} names.")
    return [folder / name for name in names]


def _is_name(name: Any) -> bool:
    """Whether it names something in a folder itself."""
    return isinstance(name, str) and bool(name) and "/" not in name and "\\" not in name and name[0] != "."


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StreamError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise StreamError(f"{path} is a JSON {type(found).__name__}, not an object.")
    return found
