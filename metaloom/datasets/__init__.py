"""Episodes: built-in data sets, their shards and index, drawing, and read-ahead. Nothing here needs torch."""

from metaloom.datasets.affine import Affine
from metaloom.datasets.episodes import (
    ClassEpisodes,
    ClassSamples,
    DocumentEpisodes,
    DocumentSamples,
    Episode,
    EpisodeSource,
    Samples,
)
from metaloom.datasets.index import ClassEntry, Index, ShardEntry, SplitTable
from metaloom.datasets.make import DATASETS, MadeDataset, make_dataset
from metaloom.datasets.shards import Sample, ShardReader, SplitSamples, write_shards
from metaloom.datasets.stream import EpisodeStream, Share, share_of_rank, slice_for_rank

__all__ = [
    "DATASETS",
    "Affine",
    "ClassEntry",
    "ClassEpisodes",
    "ClassSamples",
    "DocumentEpisodes",
    "DocumentSamples",
    "Episode",
    "EpisodeSource",
    "EpisodeStream",
    "Index",
    "MadeDataset",
    "Sample",
    "Samples",
    "ShardEntry",
    "ShardReader",
    "Share",
    "SplitSamples",
    "SplitTable",
    "make_dataset",
    "share_of_rank",
    "slice_for_rank",
    "write_shards",
]
