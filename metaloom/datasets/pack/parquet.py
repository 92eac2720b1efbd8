"""Parquet files: their columns are written to Arrow files once, so that any row can be read alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaloom.datasets.directory import SPOOL_NAME
from metaloom.datasets.pack import columns as of_columns
from metaloom.datasets.pack.arrow import ArrowFile, class_names_of, features_in, plan_rows
from metaloom.datasets.pack.columns import Columns
from metaloom.datasets.pack.plan import Plan, Source
from metaloom.datasets.pack.records import NamedFile, named_files
from metaloom.errors import StreamError

SUFFIXES = (".parquet",)
_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Parquet(Source):
    """Rows of parquet files.

    The columns that are needed lie in the data set's directory as Arrow files until it is packed: without
    compression, so they may take more room than the files.

    Args:
        paths: files, and folders of files.
        root: the folder below which files lie that rows name; None is that of the first path.
    """

    paths: tuple[Path, ...]
    columns: Columns
    root: Path | None = None

    def plan(self, directory: Path) -> Plan:
        files = named_files(self.paths, SUFFIXES, tells_split=not self.columns.says_split)
        names: dict[str, tuple[str, ...]] = {}
        spooled = []
        for number, file in enumerate(files):
            spool = directory / SPOOL_NAME.format(number=number)
            found = _class_names(_spool(Path(file.path), spool, self.columns))
            for column in names.keys() & found.keys():
                if names[column] != found[column]:
                    raise StreamError(
                        f"{file.path}: column {column!r} has other classes than in the files before it; give "
                        f"files that were written together."
                    )
            names |= found
            named = NamedFile(str(spool), file.key, file.split)
            spooled.append(ArrowFile(named, Path(file.path).name))
        root = self.root or (self.paths[0] if self.paths[0].is_dir() else self.paths[0].parent)
        return plan_rows(spooled, self.columns, class_names=names, root=root, kind="parquet")


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    return class_names_of(features_in(schema))


def _spool(path: Path, spool: Path, columns: Columns) -> Any:
    """The schema of a parquet file, whose columns are now an Arrow stream file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            of_columns.require_columns(columns, schema.names, path.name)
            wanted = list(schema.names if columns.task == "episodes" else columns.needed)
            narrow = pyarrow.schema([schema.field(name) for name in wanted])
            with pyarrow.OSFile(str(spool), "wb") as sink, pyarrow.ipc.new_stream(sink, narrow) as stream:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=wanted):
                    stream.write_batch(batch.select(wanted).cast(narrow))
            return schema
    except pyarrow.ArrowException as error:
        raise StreamError(f"{path} is no whole parquet file: {error}.") from error
    except OSError as error:
        raise StreamError(
            f"{path} cannot be read, or its columns not written to {spool}: {error}."
        ) from error
