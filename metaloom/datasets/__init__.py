"""Episodes: data sets, their shards and index, drawing, and read-ahead. Nothing here needs torch."""

from metaloom.datasets.affine import Affine
from metaloom.datasets.broken import BrokenSample, SampleError
from metaloom.datasets.class_episodes import ClassEpisodes, ClassSamples, VariableWays, Ways
from metaloom.datasets.decoders import (
    ArrayInputs,
    ClassTargets,
    ImageInputs,
    Inputs,
    NumberTargets,
    Targets,
    TextInputs,
)
from metaloom.datasets.document_episodes import DocumentEpisodes, DocumentSamples
from metaloom.datasets.episodes import Batch, Episode, EpisodeSource, Rehearsed, Samples
from metaloom.datasets.group_episodes import GroupEpisodes, GroupSamples
from metaloom.datasets.index import Index, ShardEntry, SplitTable
from metaloom.datasets.make import DATASETS, MadeDataset, make_dataset
from metaloom.datasets.mixture import MixedSamples, Mixture
from metaloom.datasets.order import Window
from metaloom.datasets.read_ahead import ReadAhead, drawn_ahead
from metaloom.datasets.reader import SampleReader
from metaloom.datasets.ready_episodes import ReadyEpisodes, ReadySamples
from metaloom.datasets.shards import Sample, SplitSamples, write_shards
from metaloom.datasets.storage import Storage, StorageSettings
from metaloom.datasets.stream import EpisodeStream, Share, share_of_rank, slice_for_rank
from metaloom.datasets.streams import NUM_STREAMS, virtual_stream
from metaloom.datasets.target_noise import ShiftedTargets
from metaloom.datasets.verify import verify_sizes

__all__ = [
    "DATASETS",
    "NUM_STREAMS",
    "Affine",
    "ArrayInputs",
    "Batch",
    "BrokenSample",
    "ClassEpisodes",
    "ClassSamples",
    "ClassTargets",
    "DocumentEpisodes",
    "DocumentSamples",
    "Episode",
    "EpisodeSource",
    "EpisodeStream",
    "GroupEpisodes",
    "GroupSamples",
    "ImageInputs",
    "Index",
    "Inputs",
    "MadeDataset",
    "MixedSamples",
    "Mixture",
    "NumberTargets",
    "ReadAhead",
    "ReadyEpisodes",
    "ReadySamples",
    "Rehearsed",
    "Sample",
    "SampleError",
    "SampleReader",
    "Samples",
    "ShardEntry",
    "Share",
    "ShiftedTargets",
    "SplitSamples",
    "SplitTable",
    "Storage",
    "StorageSettings",
    "Targets",
    "TextInputs",
    "VariableWays",
    "Ways",
    "Window",
    "drawn_ahead",
    "make_dataset",
    "share_of_rank",
    "slice_for_rank",
    "verify_sizes",
    "virtual_stream",
    "write_shards",
]
