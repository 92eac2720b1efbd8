"""From a recipe to its sources of episodes and samples. Needs no torch, so that the command line can ask."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from metaloom.datasets import (
    Affine,
    ClassEpisodes,
    ClassSamples,
    DocumentEpisodes,
    DocumentSamples,
    EpisodeSource,
    Index,
    Samples,
)
from metaloom.errors import StreamError
from metaloom.recipe import GlyphsData, Recipe, StdlibData

NUM_RETENTION_SEQUENCES = 4
SPLITS = ("train", "validation", "test")


def require_episodes(recipe: Recipe, index: Index) -> None:
    """Checks that every split can give the episodes that the recipe asks for.

    Raises:
        StreamError: the data is another set, or has too few classes or too short documents.
    """
    if index.dataset != recipe.data.kind:
        raise StreamError(
            f"data.url: {recipe.data.url} holds the data set {index.dataset!r}, and data.kind is "
            f"{recipe.data.kind!r}; name the folder of the other one."
        )
    for split in SPLITS:
        episode_source(recipe, index, split, seed=recipe.seed, num_steps=recipe.adaptation.num_steps)


def episode_source(recipe: Recipe, index: Index, split: str, *, seed: int, num_steps: int) -> EpisodeSource:
    """The episodes of one split.

    Args:
        num_steps: inner steps, for which there will be enough rehearsal data.
    """
    data = recipe.data
    if isinstance(data, GlyphsData):
        return ClassEpisodes(
            index,
            split,
            n_way=data.n_way,
            n_shot=data.n_shot,
            n_query=data.n_query,
            seed=seed,
            affine=_affine(data),
        )
    retained = 0 if split == "train" else NUM_RETENTION_SEQUENCES
    return DocumentEpisodes(
        index,
        split,
        num_support=data.num_support,
        num_query=data.num_query,
        sequence_length=data.sequence_length,
        num_rehearsal=num_rehearsed(recipe, num_steps) + retained,
        seed=seed,
    )


def ordinary_samples(recipe: Recipe, index: Index, splits: Sequence[str], *, purpose: str) -> Samples:
    """Ordinary training batches from the same data that episodes are drawn from.

    Args:
        splits: of documents; images have classes, of which the training split alone is used.
        purpose: other purposes get other draws: a baseline must not see pre-training's batches again.
    """
    data = recipe.data
    seed = recipe.seed + zlib.crc32(purpose.encode())
    if isinstance(data, StdlibData):
        return DocumentSamples(index, splits, sequence_length=data.sequence_length, seed=seed)
    return ClassSamples(index, "train", seed=seed, affine=_affine(data))


def num_rehearsed(recipe: Recipe, num_steps: int) -> int:
    """Sequences that one task rehearses in `num_steps` inner steps."""
    rehearsal = recipe.adaptation.rehearsal
    return 0 if rehearsal is None else rehearsal.num_sequences * num_steps


def _affine(data: GlyphsData) -> Affine | None:
    return None if data.affine is None else Affine(**data.affine.model_dump())
