"""From a recipe to its sources of episodes and samples. Needs no torch, so that the command line can ask."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metaloom import datasets
from metaloom.computed import computed_digest, computed_episodes, computed_samples
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
    ShiftedTargets,
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
    GroupsData,
    ImageInputs,
    Loading,
    MultiTaskAlgorithm,
    NumberTargets,
    Recipe,
    SyntheticData,
    TextInputs,
    TokenTargets,
)
from metaloom.recipe.tasks import (
    DataSet,
    InputSection,
    data_sets,
    data_urls,
    data_weights,
    groups_by_recipe,
    num_rehearsed,
    num_rehearsed_outside,
    vocabulary,
)

NUM_RETENTION_SAMPLES = 4
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Data:
    """The data sets of a recipe, opened.

    Attributes:
        indices: by the path of their URL in the recipe; one URL is opened once.
        computed: the identities of synthetic data sets, by their path in the recipe.
    """

    indices: Mapping[str, Index]
    computed: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The identity of all data together: of one data set, its own."""
        digests = [*(index.digest for index in self.indices.values()), *self.computed.values()]
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
    computed = {
        path: computed_digest(section)
        for path, section in data_sets(recipe).items()
        if isinstance(section, SyntheticData)
    }
    return Data({path: by_url[url] for path, url in data_urls(recipe).items()}, computed)


def data_names(recipe: Recipe, data: Data) -> list[str]:
    """What the data sets of the tasks are called."""
    return [
        section.task.kind if isinstance(section, SyntheticData) else data.indices[f"{path}.url"].dataset
        for path, section in data_sets(recipe).items()
    ]


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
    sources: dict[str, EpisodeSource] = {}
    for split in SPLITS:
        sources[split] = episode_source(
            recipe, data, split, seed=recipe.seed, num_steps=recipe.adaptation.num_steps
        )
        # What is wrong with all samples of a data set shows here, and not when the job has started.
        for path, section in data_sets(recipe).items():
            found = data.indices.get(f"{path}.url")
            episode = _tasks_of(recipe, section, found, split, seed=recipe.seed).episode(0)
            if recipe.outer.combiner.weighs_groups and recipe.data is section and episode.group is None:
                assert found is not None, "a rule of the recipe refuses data that are not read"
                raise StreamError(
                    f"outer.combiner.kind: {recipe.outer.combiner.kind}; weighs groups of tasks, and "
                    f"episodes of split {split!r} of {found.dataset} at {found.url} state no group: "
                    "pack them with one, or take another combiner."
                )
    _require_groups(recipe, sources)
    if recipe.adaptation.rehearsal is not None:
        _rehearsal_samples(recipe, data, seed=recipe.seed).batch(0, 1)
    if recipe.pretrain is not None:
        pretraining_samples(recipe, data).batch(0, 1)


def episode_source(recipe: Recipe, data: Data, split: str, *, seed: int, num_steps: int) -> EpisodeSource:
    """The episodes of one split, with what they rehearse.

    Args:
        num_steps: inner steps, for which there will be enough rehearsal data.
    """
    sources = [
        _tasks_of(recipe, section, data.indices.get(f"{path}.url"), split, seed=seed)
        for path, section in data_sets(recipe).items()
    ]
    weights = data_weights(recipe)
    source = sources[0]
    if len(sources) > 1:
        source = Mixture(sources, weights, seed=seed, split=split, names=_part_names(recipe, data))
    return with_rehearsal(recipe, data, source, split, seed=seed, num_steps=num_steps)


def with_rehearsal(
    recipe: Recipe, data: Data, source: EpisodeSource, split: str, *, seed: int, num_steps: int
) -> EpisodeSource:
    """Episodes of a source with what they rehearse, if anything; outside of training also with what retention
    is measured on.

    Args:
        num_steps: as in `episode_source`.
    """
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


def _require_groups(recipe: Recipe, sources: Mapping[str, EpisodeSource]) -> None:
    """Checks that what knows groups by name can learn from all of them, and a model meets no others.

    Args:
        sources: by split.

    Raises:
        StreamError: it cannot, or does.
    """
    model = recipe.algorithm if isinstance(recipe.algorithm, MultiTaskAlgorithm) else None
    loss = recipe.adaptation.loss
    named: dict[str, tuple[str, ...]] = {}
    if "group_weights" in loss.learned:
        named["adaptation.loss.groups"] = loss.groups or groups_by_recipe(recipe)
    if model is not None:
        named["algorithm.groups"] = model.groups or groups_by_recipe(recipe)
    if not named:
        return
    found: dict[str, frozenset[str]] = {}
    for split, source in sources.items():
        groups = source.groups
        if groups is None:
            raise StreamError(
                f"{', '.join(named)}: groups are to be known by name, and ready episodes of split {split!r} "
                "state theirs in their json, episode by episode; pack them with a column for it (metaloom "
                "data pack --group COLUMN)."
            )
        found[split] = groups
    trained = found["train"]
    for path, names in named.items():
        if trained != set(names):
            raise StreamError(
                f"{path}: {', '.join(names)}; are to be the groups of the training tasks, and these are "
                f"{', '.join(sorted(trained)) or 'none'}; give those."
            )
    for split in SPLITS[1:] if model is not None else ():
        others = sorted(found[split] - trained)
        if others:
            raise StreamError(
                f"algorithm.kind: multi_task; has parts for each group, and of the groups of split {split!r} "
                f"{', '.join(others)} are in no training task; take other data, or algorithm.kind = erm."
            )


def _part_names(recipe: Recipe, data: Data) -> list[str]:
    """What the parts of a mixture are called: their data sets; where one is there twice, its place too."""
    names = []
    for path, section in data_sets(recipe).items():
        index = data.indices.get(f"{path}.url")
        names.append(section.kind if index is None else index.dataset)
    return [name if names.count(name) == 1 else f"{name} {row}" for row, name in enumerate(names)]


def ordinary_samples(recipe: Recipe, data: Data, splits: Sequence[str], *, purpose: str) -> Samples:
    """Ordinary training batches from the same data that episodes are drawn from.

    Args:
        splits: of documents; other data have classes, groups or episodes, of which the training split alone
            is used.
        purpose: other purposes get other draws: a baseline must not see pre-training's batches again.
    """
    seed = _seed(recipe, purpose)
    samples = [
        _samples_of(recipe, section, data.indices.get(f"{path}.url"), splits, seed=seed)
        for path, section in data_sets(recipe).items()
    ]
    if len(samples) == 1:
        return samples[0]
    return MixedSamples(samples, data_weights(recipe), seed=seed, purpose=purpose)


def _seed(recipe: Recipe, purpose: str) -> int:
    return recipe.seed + zlib.crc32(purpose.encode())


def pretraining_samples(recipe: Recipe, data: Data) -> Samples:
    """The recipe's ordinary training batches before meta-training."""
    pretrain, purpose = recipe.pretrain, "pretrain"
    assert pretrain is not None, "the recipe has no pre-training"
    if pretrain.sequence_length is None:
        return ordinary_samples(recipe, data, pretrain.splits, purpose=purpose)
    return DocumentSamples(
        data.indices["data.url"],
        pretrain.splits,
        sequence_length=pretrain.sequence_length,
        vocabulary=vocabulary(recipe),
        seed=_seed(recipe, purpose),
        key="pretrain.sequence_length",
    )


def _tasks_of(
    recipe: Recipe, section: DataSet, index: Index | None, split: str, *, seed: int
) -> EpisodeSource:
    if isinstance(section, SyntheticData):
        return _augmented(computed_episodes(section, split, seed=seed), section.task_noise, split, seed=seed)
    assert index is not None, "other data have a URL"
    match section:
        case ClassesData():
            window = section.window
            return ClassEpisodes(
                index,
                split,
                ways=_ways(section),
                inputs=inputs_of(recipe, section.inputs),
                labels=section.labels,
                window=None if window is None else Window(window.num_classes, window.num_episodes),
                affine=_affine(section.affine),
                query_affine=_affine(section.query_affine) if split == "train" else None,
                seed=seed,
            )
        case GroupsData():
            groups = GroupEpisodes(
                index,
                split,
                inputs=inputs_of(recipe, section.inputs),
                targets=_targets(section.targets),
                num_support=section.num_support,
                num_query=None if section.query_is_support else section.num_query,
                seed=seed,
                by_size=section.drawn_by == "sample" and split == "train",
            )
            return _augmented(groups, _task_noise(section.targets), split, seed=seed)
        case DocumentsData():
            return DocumentEpisodes(
                index,
                split,
                num_support=section.num_support,
                num_query=section.num_query,
                sequence_length=section.sequence_length,
                vocabulary=vocabulary(recipe),
                seed=seed,
            )
        case EpisodesData():
            ready = _ready(recipe, section, index, split, seed=seed)
            return _augmented(ready, _task_noise(section.targets), split, seed=seed)


def _task_noise(targets: ClassTargets | NumberTargets | TokenTargets) -> float | None:
    return targets.task_noise if isinstance(targets, NumberTargets) else None


def _augmented(source: EpisodeSource, task_noise: float | None, split: str, *, seed: int) -> EpisodeSource:
    """Training tasks under what the recipe asks for of their targets; others as they are."""
    if task_noise is None or split != "train":
        return source
    return ShiftedTargets(source, std=task_noise, seed=seed, split=split)


def _ready(recipe: Recipe, section: EpisodesData, index: Index, split: str, *, seed: int) -> ReadyEpisodes:
    targets = section.targets
    return ReadyEpisodes(
        index,
        split,
        inputs=inputs_of(recipe, section.inputs),
        targets=None if isinstance(targets, TokenTargets) else _targets(targets),
        num_support=section.num_support,
        num_query=section.num_query,
        is_ragged=section.ragged,
        seed=seed,
    )


def _samples_of(
    recipe: Recipe, section: DataSet, index: Index | None, splits: Sequence[str], *, seed: int
) -> Samples:
    if isinstance(section, SyntheticData):
        return computed_samples(section, seed=seed)
    assert index is not None, "other data have a URL"
    match section:
        case ClassesData():
            return ClassSamples(
                index,
                "train",
                seed=seed,
                inputs=inputs_of(recipe, section.inputs),
                affine=_affine(section.affine),
            )
        case GroupsData():
            inputs, targets = inputs_of(recipe, section.inputs), _targets(section.targets)
            return GroupSamples(index, "train", inputs=inputs, targets=targets, seed=seed)
        case DocumentsData():
            return DocumentSamples(
                index,
                splits,
                sequence_length=section.sequence_length,
                vocabulary=vocabulary(recipe),
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
            vocabulary=vocabulary(recipe),
            seed=seed,
        )
    index = data.indices["adaptation.rehearsal.data.url"]
    if not isinstance(section, ClassesRehearsal):
        return DocumentSamples(
            index,
            [section.split],
            sequence_length=section.sequence_length,
            vocabulary=vocabulary(recipe),
            seed=seed,
        )
    samples = ClassSamples(index, section.split, seed=seed, inputs=inputs_of(recipe, section.inputs))
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


def inputs_of(recipe: Recipe, section: InputSection) -> datasets.Inputs:
    """How what a model is shown is read of a sample."""
    match section:
        case ImageInputs(size=size, channels=channels):
            return datasets.ImageInputs(size, channels)
        case ArrayInputs(shape=shape):
            return datasets.ArrayInputs(shape)
        case TextInputs(length=length):
            return datasets.TextInputs(length, vocabulary(recipe))


def _targets(section: ClassTargets | NumberTargets) -> datasets.Targets:
    if isinstance(section, ClassTargets):
        return datasets.ClassTargets(section.num_classes)
    return datasets.NumberTargets(section.num_targets)


def _affine(section: AffineSection | None) -> Affine | None:
    return None if section is None else Affine(**section.model_dump())


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "metaloom" / "blocks")
