"""Data sets packed from images, records, parquet files and folders of Hugging Face's `datasets`."""

from metaloom.datasets.pack.columns import Columns
from metaloom.datasets.pack.huggingface import HuggingFace
from metaloom.datasets.pack.images import ImageFolder
from metaloom.datasets.pack.packing import PackedDataset, SplitSummary, pack_dataset
from metaloom.datasets.pack.parquet import Parquet
from metaloom.datasets.pack.payloads import Limits
from metaloom.datasets.pack.plan import Broken, Source, parse_shares
from metaloom.datasets.pack.records import Records

__all__ = [
    "Broken",
    "Columns",
    "HuggingFace",
    "ImageFolder",
    "Limits",
    "PackedDataset",
    "Parquet",
    "Records",
    "Source",
    "SplitSummary",
    "pack_dataset",
    "parse_shares",
]
