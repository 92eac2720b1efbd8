"""Texts of a new task for a language model: cut to stretches, as those of documents are.

Shape letters: N stretches, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.decoders import DECODING_ERRORS
from metaloom.datasets.document_episodes import Tokens
from metaloom.datasets.pack import Columns, Limits, Records
from metaloom.datasets.pack.images import files_under
from metaloom.datasets.pack.payloads import encode_text, read_file
from metaloom.datasets.pack.plan import BadSample, Broken, list_broken
from metaloom.errors import StreamError
from metaloom.new_task.examples import has_records, planned, require_tokens
from metaloom.new_task.request import TaskFiles


def read_stretches(path: Path, files: TaskFiles, *, length: int, vocabulary: int) -> NDArray[np.int64]:
    """int64 `[N, L + 1]`: the texts of a file, or of a folder's files in the order of their names, each cut
    from its beginning; what is left over at the end of each is not read.

    Args:
        length: L.

    Raises:
        StreamError: there are none, or one is broken.
    """
    broken: list[Broken] = []
    texts = list(_texts(path, files, vocabulary, broken))
    if broken:
        many = "" if len(broken) == 1 else "s"
        raise StreamError(f"{path} has {len(broken)} broken text{many}:\n{list_broken(broken)}")
    if not texts:
        raise StreamError(f"{path} holds no text: name a text, a folder of texts, or records of such.")
    size = length + 1
    cut = [text[: len(text) // size * size].astype(np.int64).reshape(-1, size) for text in texts]
    if not any(len(stretches) for stretches in cut):
        longest = max(map(len, texts))
        raise StreamError(
            f"{path}: the longest text has {longest} tokens, and the run's sequences have {length} and the "
            f"token after: give texts of {size} or more."
        )
    return np.concatenate(cut)


def _texts(path: Path, files: TaskFiles, vocabulary: int, broken: list[Broken]) -> Iterator[NDArray[Any]]:
    if files.tokenizer is None and vocabulary != 256:
        require_tokens(files, vocabulary)
    if has_records(path):
        yield from _of_records(path, files, vocabulary, broken)
        return
    limits = Limits()
    for place in [path / name for name in files_under(path)] if path.is_dir() else [path]:
        try:
            payload = read_file(place, limits)
            try:
                text = payload.decode()
            except UnicodeDecodeError as error:
                raise BadSample("is no text in UTF-8") from error
            if text:
                yield encode_text(text, files.tokenizer)
        except BadSample as error:
            broken.append(Broken(str(place), str(error)))


def _of_records(
    path: Path, files: TaskFiles, vocabulary: int, broken: list[Broken]
) -> Iterator[NDArray[Any]]:
    columns = Columns(
        inputs=files.inputs, task="language-modelling", kind=files.kind, tokenizer=files.tokenizer
    )
    plan = planned(Records((path,), columns), path)
    broken += plan.broken
    decode = Tokens(vocabulary)
    for split in plan.splits.values():
        for item in split.items:
            try:
                yield decode(plan.maker.content(item).members)["tokens"]
            except (BadSample, *DECODING_ERRORS) as error:
                broken.append(Broken(plan.maker.place(item), str(error)))
