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
from metaloom.datasets.read_ahead import ReadAhead, drawn_ahead
from metaloom.datasets.shards import Sample, ShardReader, SplitSamples, write_shards
from metaloom.datasets.stream import EpisodeStream, Share, share_of_rank, slice_for_rank
from metaloom.datasets.streams import NUM_STREAMS, virtual_stream

__all__ = [
    "DATASETS",
    "NUM_STREAMS",
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
    "ReadAhead",
    "Sample",
    "Samples",
    "ShardEntry",
    "ShardReader",
    "Share",
    "SplitSamples",
    "SplitTable",
    "drawn_ahead",
    "make_dataset",
    "share_of_rank",
    "slice_for_rank",
    "virtual_stream",
    "write_shards",
]
