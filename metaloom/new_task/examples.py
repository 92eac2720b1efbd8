"""Labelled examples of images in folders and of records, read as the run's own data are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.decoders import (
    DECODING_ERRORS,
    ArrayInputs,
    ImageInputs,
    Inputs,
    NumberTargets,
    TextInputs,
    read_npy,
)
from metaloom.datasets.pack import Columns, ImageFolder, Records, Source
from metaloom.datasets.pack.images import files_under
from metaloom.datasets.pack.payloads import npy_bytes
from metaloom.datasets.pack.plan import BadSample, Broken, Item, Plan, SampleMaker, list_broken
from metaloom.datasets.pack.records import SUFFIXES
from metaloom.errors import StreamError
from metaloom.new_task.request import TaskFiles

_ANY_LENGTH = 1 << 30


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One labelled example.

    Attributes:
        place: where a person finds it.
        inputs: what a model is shown.
        label: the name of its class; empty for a regression.
        target: the numbers of a regression; None for a class.
        is_cut: whether it is a text that was longer than the run's are.
    """

    place: str
    inputs: NDArray[Any]
    label: str = ""
    target: NDArray[Any] | None = None
    is_cut: bool = False


def read_examples(
    path: Path, files: TaskFiles, inputs: Inputs, num_targets: int | None
) -> tuple[list[Example], list[str]]:
    """The examples of a folder or of files of records, and what a person should know of it.

    Args:
        files: what the columns of records are for.
        inputs: how the run reads what a model is shown.
        num_targets: numbers of a regression's target; None for classes.

    Raises:
        StreamError: there are none, or some are broken; names them.
    """
    plan = planned(_source(path, files, inputs, num_targets), path)
    found: list[Example] = []
    broken = list(plan.broken)
    for item in (item for split in plan.splits.values() for item in split.items):
        try:
            found.append(_example(item, plan.maker, inputs, num_targets))
        except (BadSample, *DECODING_ERRORS) as error:
            broken.append(Broken(plan.maker.place(item), str(error)))
    if broken:
        many = "" if len(broken) == 1 else "s"
        raise StreamError(f"{path} has {len(broken)} broken example{many}:\n{list_broken(broken)}")
    # What is said of options that packing alone has is of no use here.
    return found, [note for note in plan.notes if "--" not in note]


def planned(source: Source, path: Path) -> Plan:
    """What a source holds.

    Raises:
        StreamError: there is nothing to read, or not what the columns of records are said to hold.
    """
    try:
        return source.plan(path)
    except StreamError as error:
        if not isinstance(source, Records):
            raise
        raise StreamError(f"{error} (--input and --target name the columns.)") from error


def has_records(path: Path) -> bool:
    """Whether a file is one of records, or a folder holds such."""
    if path.is_dir():
        return any(Path(name).suffix.lower() in SUFFIXES for name in files_under(path))
    return path.suffix.lower() in SUFFIXES


def _source(path: Path, files: TaskFiles, inputs: Inputs, num_targets: int | None) -> Source:
    size = inputs.size if isinstance(inputs, ImageInputs) else None
    if not has_records(path):
        has_folders = size is not None and num_targets is None
        if path.is_dir() and has_folders:
            return ImageFolder(path, folders="class", image_size=size)
        folders = "a folder with a sub-folder of images for each class, or " if has_folders else ""
        raise StreamError(
            f"{path} is no task of this run: its examples are {folders}records in files "
            f"{', '.join(SUFFIXES)}."
        )
    if isinstance(inputs, TextInputs) and inputs.vocabulary != 256 and files.tokenizer is None:
        require_tokens(files, inputs.vocabulary)
    usual = {ImageInputs: "image", TextInputs: "text", ArrayInputs: None}
    columns = Columns(
        inputs=files.inputs,
        targets=files.targets,
        task="classification" if num_targets is None else "regression",
        kind=files.kind or usual[type(inputs)],
        tokenizer=files.tokenizer,
        image_size=size,
    )
    return Records((path,), columns)


def require_tokens(files: TaskFiles, vocabulary: int) -> None:
    """Passes where records hold tokens.

    Raises:
        StreamError: they hold texts, and the run's texts are no bytes.
    """
    if files.kind != "tokens":
        raise StreamError(
            f"the run's texts are tokens of a vocabulary of {vocabulary}: give the tokenizer that made them "
            "(--tokenizer FILE), or records with tokens (--input-kind tokens)."
        )


def _example(item: Item, maker: SampleMaker, inputs: Inputs, num_targets: int | None) -> Example:
    members = maker.content(item).members
    array, is_cut = _shown(members, inputs)
    target = None if num_targets is None else NumberTargets(num_targets).decode(members)
    return Example(maker.place(item), array, item.label, target, is_cut)


def _shown(members: Mapping[str, bytes], inputs: Inputs) -> tuple[NDArray[Any], bool]:
    """What a model is shown of a sample, and whether it was cut."""
    if isinstance(inputs, TextInputs):
        tokens = dataclasses.replace(inputs, length=_ANY_LENGTH).decode(members)
        return tokens[: inputs.length], len(tokens) > inputs.length
    if isinstance(inputs, ArrayInputs) and inputs.shape == (1,) and "npy" in members:
        # A number of a record stands for an array of one.
        members = {"npy": npy_bytes(np.atleast_1d(read_npy(members["npy"])))}
    return inputs.decode(members), False
