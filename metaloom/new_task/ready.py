"""A task whose support and query lie in one record, as ready episodes do."""

from __future__ import annotations

import json
from pathlib import Path

from metaloom.datasets import ClassTargets, Episode, Inputs, NumberTargets, Targets
from metaloom.datasets.decoders import DECODING_ERRORS
from metaloom.datasets.pack import Columns, Limits, Records
from metaloom.datasets.pack.plan import BadSample
from metaloom.datasets.pack.records import JSON_SUFFIXES, rows_of
from metaloom.datasets.ready_episodes import PARTS, ReadyParts
from metaloom.errors import StreamError
from metaloom.new_task.examples import planned
from metaloom.new_task.labels import require_ways
from metaloom.new_task.request import TaskFiles
from metaloom.recipe.tasks import TaskFacts

_ANY_NUMBER = 1 << 30


def is_ready(path: Path) -> bool:
    """Whether a file's first record has support and query."""
    if path.is_dir() or path.suffix.lower() not in JSON_SUFFIXES:
        return False
    first = next(rows_of(str(path), (), Limits().max_sample_bytes), None)
    return first is not None and first.record is not None and {*PARTS} <= {*first.record}


def read_ready(
    path: Path, files: TaskFiles, inputs: Inputs, facts: TaskFacts
) -> tuple[Episode, tuple[str, ...]]:
    """The episode, and the names of its classes by their numbers; none where it names none.

    Raises:
        StreamError: there is more than one record, it is broken, or does not fit the run's model.
    """
    columns = Columns(
        inputs=files.inputs[:1],
        targets=files.targets[:1],
        task="episodes",
        kind=files.kind,
        tokenizer=files.tokenizer,
    )
    plan = planned(Records((path,), columns), path)
    items = [item for split in plan.splits.values() for item in split.items]
    if len(items) + len(plan.broken) != 1:
        raise StreamError(f"{path} has {len(items)} tasks, and one is adapted to: give a file of one record.")
    try:
        members = plan.maker.content(items[0]).members
        read = ReadyParts(inputs, _targets(facts), _ANY_NUMBER, _ANY_NUMBER, is_ragged=True)(members)
    except (BadSample, *DECODING_ERRORS) as error:
        raise StreamError(f"{path}, line 1: {error}.") from error
    stated = json.loads(read["facts"].tobytes())
    names = tuple(stated.get("classes", ()))
    if facts.draws_labels and facts.num_outputs is not None:
        shown = names or tuple(map(str, sorted({*read["support/targets"].tolist()})))
        require_ways(shown, facts.num_outputs, is_fixed=not facts.has_own_ways)
    support, query = (
        {name: read[f"{part}/{name}"] for name in ("inputs", "targets")} for part in ("support", "query")
    )
    ways = stated.get("num_ways", facts.num_outputs)
    return Episode(number=0, task=files.name, support=support, query=query, num_ways=ways), names


def _targets(facts: TaskFacts) -> Targets | None:
    if facts.objective == "language_modelling":
        return None
    assert facts.num_outputs is not None, "classes and numbers are counted"
    if facts.objective == "regression":
        return NumberTargets(facts.num_outputs)
    return ClassTargets(facts.num_outputs)
