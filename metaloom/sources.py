"""From a recipe to its sources of episodes and samples. Needs no torch, so that the command line can ask."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaloom import datasets
from metaloom.datasets import (
    Affine,
    ClassEpisodes,
    ClassSamples,
    DocumentEpisodes,
    DocumentSamples,
    EpisodeSource,
    GroupEpisodes,
    GroupSamples,
    Index,
    MixedSamples,
    Mixture,
    ReadyEpisodes,
    ReadySamples,
    Rehearsed,
    Samples,
    StorageSettings,
    VariableWays,
    Ways,
    Window,
    verify_sizes,
)
from metaloom.errors import StreamError
from metaloom.recipe import Affine as AffineSection
from metaloom.recipe import (
    ArrayInputs,
    ClassesData,
    ClassesRehearsal,
    ClassTargets,
    DocumentsData,
    EpisodesData,
    GPTModel,
    GroupsData,
    ImageInputs,
    Loading,
    NumberTargets,
    Recipe,
    TextInputs,
    TokenTargets,
)
from metaloom.recipe.tasks import (
    DataSet,
    InputSection,
    data_sets,
    data_urls,
    data_weights,
    num_rehearsed,
    num_rehearsed_outside,
)

NUM_RETENTION_SAMPLES = 4
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Data:
    """The data sets of a recipe, opened.

    Attributes:
        indices: by the path of their URL in the recipe; one URL is opened once.
    """

    indices: Mapping[str, Index]

    @property
    def digest(self) -> str:
        """The identity of all data together: of one data set, its own."""
        digests = [index.digest for index in self.indices.values()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def close(self) -> None:
        """Closes connections and files."""
        for index in self.indices.values():
            index.close()


def open_data(recipe: Recipe) -> Data:
    """Opens every data set of a recipe.

    Raises:
        StreamError: an index is missing, damaged, or cannot be read.
    """
    settings = storage_settings(recipe.loading)
    by_url: dict[str, Index] = {}
    for url in data_urls(recipe).values():
        if url not in by_url:
            by_url[url] = Index.load(url, settings)
    return Data({path: by_url[url] for path, url in data_urls(recipe).items()})


def storage_settings(loading: Loading) -> StorageSettings:
    """How files are read."""
    return StorageSettings(
        cache_folder=(loading.cache_folder or _user_cache()) if loading.cache_gib > 0 else None,
        cache_limit_bytes=max(1, int(loading.cache_gib * 2**30)),
        num_connections=loading.num_connections,
        num_attempts=loading.num_attempts,
        timeout_s=loading.timeout_s,
    )


def require_episodes(recipe: Recipe, data: Data) -> None:
    """Checks that every shard is there and whole in size, and that every split can give the episodes that
    the recipe asks for.

    Raises:
        StreamError: something is missing, truncated or too small; or data are of another layout.
    """
    for index in {index.url: index for index in data.indices.values()}.values():
        verify_sizes(index)
    for split in SPLITS:
        episode_source(recipe, data, split, seed=recipe.seed, num_steps=recipe.adaptation.num_steps)
        # What is wrong with all samples of a data set shows here, and not when the job has started.
        for path, section in data_sets(recipe).items():
            index = data.indices[f"{path}.url"]
            episode = _tasks_of(recipe, section, index, split, seed=recipe.seed).episode(0)
            if recipe.outer.combiner.weighs_groups and recipe.data is section and episode.group is None:
                raise StreamError(
                    f"outer.combiner.kind: {recipe.outer.combiner.kind}; weighs groups of tasks, and "
                    f"episodes of split {split!r} of {index.dataset} at {index.url} state no group: "
                    "pack them with one, or take another combiner."
                )
    if recipe.adaptation.rehearsal is not None:
        _rehearsal_samples(recipe, data, seed=recipe.seed).batch(0, 1)
    if recipe.pretrain is not None:
        ordinary_samples(recipe, data, recipe.pretrain.splits, purpose="pretrain").batch(0, 1)


def episode_source(recipe: Recipe, data: Data, split: str, *, seed: int, num_steps: int) -> EpisodeSource:
    """The episodes of one split, with what they rehearse.

    Args:
        num_steps: inner steps, for which there will be enough rehearsal data.
    """
    sources = [
        _tasks_of(recipe, section, data.indices[f"{path}.url"], split, seed=seed)
        for path, section in data_sets(recipe).items()
    ]
    weights = data_weights(recipe)
    source = sources[0]
    if len(sources) > 1:
        source = Mixture(sources, weights, seed=seed, split=split, names=_part_names(recipe, data))
    if recipe.adaptation.rehearsal is None:
        return source
    retained = 0 if split == "train" else NUM_RETENTION_SAMPLES
    return Rehearsed(
        source,
        _rehearsal_samples(recipe, data, seed=seed),
        num_inner=num_rehearsed(recipe, num_steps) + retained,
        num_outer=num_rehearsed_outside(recipe),
        seed=seed,
        split=split,
    )


def _part_names(recipe: Recipe, data: Data) -> list[str]:
    """What the parts of a mixture are called: their data sets; where one is there twice, its place too."""
    names = [data.indices[f"{path}.url"].dataset for path in data_sets(recipe)]
    return [name if names.count(name) == 1 else f"{name} {row}" for row, name in enumerate(names)]


def ordinary_samples(recipe: Recipe, data: Data, splits: Sequence[str], *, purpose: str) -> Samples:
    """Ordinary training batches from the same data that episodes are drawn from.

    Args:
        splits: of documents; other data have classes, groups or episodes, of which the training split alone
            is used.
        purpose: other purposes get other draws: a baseline must not see pre-training's batches again.
    """
    seed = recipe.seed + zlib.crc32(purpose.encode())
    samples = [
        _samples_of(recipe, section, data.indices[f"{path}.url"], splits, seed=seed)
        for path, section in data_sets(recipe).items()
    ]
    if len(samples) == 1:
        return samples[0]
    return MixedSamples(samples, data_weights(recipe), seed=seed, purpose=purpose)


def _tasks_of(recipe: Recipe, section: DataSet, index: Index, split: str, *, seed: int) -> EpisodeSource:
    match section:
        case ClassesData():
            window = section.window
            return ClassEpisodes(
                index,
                split,
                ways=_ways(section),
                inputs=_inputs(recipe, section.inputs),
                labels=section.labels,
                window=None if window is None else Window(window.num_classes, window.num_episodes),
                affine=_affine(section.affine),
                query_affine=_affine(section.query_affine) if split == "train" else None,
                seed=seed,
            )
        case GroupsData():
            return GroupEpisodes(
                index,
                split,
                inputs=_inputs(recipe, section.inputs),
                targets=_targets(section.targets),
                num_support=section.num_support,
                num_query=section.num_query,
                seed=seed,
            )
        case DocumentsData():
            return DocumentEpisodes(
                index,
                split,
                num_support=section.num_support,
                num_query=section.num_query,
                sequence_length=section.sequence_length,
                vocabulary=_vocabulary(recipe),
                seed=seed,
            )
        case EpisodesData():
            return _ready(recipe, section, index, split, seed=seed)


def _ready(recipe: Recipe, section: EpisodesData, index: Index, split: str, *, seed: int) -> ReadyEpisodes:
    targets = section.targets
    return ReadyEpisodes(
        index,
        split,
        inputs=_inputs(recipe, section.inputs),
        targets=None if isinstance(targets, TokenTargets) else _targets(targets),
        num_support=section.num_support,
        num_query=section.num_query,
        is_ragged=section.ragged,
        seed=seed,
    )


def _samples_of(
    recipe: Recipe, section: DataSet, index: Index, splits: Sequence[str], *, seed: int
) -> Samples:
    match section:
        case ClassesData():
            return ClassSamples(
                index,
                "train",
                seed=seed,
                inputs=_inputs(recipe, section.inputs),
                affine=_affine(section.affine),
            )
        case GroupsData():
            inputs, targets = _inputs(recipe, section.inputs), _targets(section.targets)
            return GroupSamples(index, "train", inputs=inputs, targets=targets, seed=seed)
        case DocumentsData():
            return DocumentSamples(
                index,
                splits,
                sequence_length=section.sequence_length,
                vocabulary=_vocabulary(recipe),
                seed=seed,
            )
        case EpisodesData(targets=targets):
            num_classes = targets.num_classes if isinstance(targets, ClassTargets) else None
            source = _ready(recipe, section, index, "train", seed=seed)
            return ReadySamples(source, split="train", seed=seed, num_classes=num_classes)


def _rehearsal_samples(recipe: Recipe, data: Data, *, seed: int) -> Samples:
    rehearsal = recipe.adaptation.rehearsal
    assert rehearsal is not None
    section = rehearsal.data
    if section is None:
        assert isinstance(recipe.data, DocumentsData), "a rule of the recipe has seen to it"
        return DocumentSamples(
            data.indices["data.url"],
            ["rehearsal"],
            sequence_length=recipe.data.sequence_length,
            vocabulary=_vocabulary(recipe),
            seed=seed,
        )
    index = data.indices["adaptation.rehearsal.data.url"]
    if not isinstance(section, ClassesRehearsal):
        return DocumentSamples(
            index,
            [section.split],
            sequence_length=section.sequence_length,
            vocabulary=_vocabulary(recipe),
            seed=seed,
        )
    samples = ClassSamples(index, section.split, seed=seed, inputs=_inputs(recipe, section.inputs))
    if samples.num_classes != section.num_classes:
        raise StreamError(
            f"adaptation.rehearsal.data.num_classes is {section.num_classes}, and split {section.split!r} of "
            f"{index.dataset} at {index.url} has {samples.num_classes} classes; set it to that."
        )
    return samples


def _ways(section: ClassesData) -> Ways | VariableWays:
    if section.variable is not None:
        return VariableWays(**section.variable.model_dump())
    assert section.n_way is not None
    assert section.n_shot is not None
    assert section.n_query is not None
    return Ways(section.n_way, section.n_shot, section.n_query)


def _inputs(recipe: Recipe, section: InputSection) -> datasets.Inputs:
    match section:
        case ImageInputs(size=size, channels=channels):
            return datasets.ImageInputs(size, channels)
        case ArrayInputs(shape=shape):
            return datasets.ArrayInputs(shape)
        case TextInputs(length=length):
            return datasets.TextInputs(length, _vocabulary(recipe))


def _targets(section: ClassTargets | NumberTargets) -> datasets.Targets:
    if isinstance(section, ClassTargets):
        return datasets.ClassTargets(section.num_classes)
    return datasets.NumberTargets(section.num_targets)


def _vocabulary(recipe: Recipe) -> int:
    assert isinstance(recipe.model, GPTModel), "a rule of the recipe has seen to it"
    return recipe.model.vocabulary


def _affine(section: AffineSection | None) -> Affine | None:
    return None if section is None else Affine(**section.model_dump())


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "metaloom" / "blocks")
