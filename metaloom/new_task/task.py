"""A new task as an episode. Needs no torch, so that the command line can see that it can be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaloom.datasets import Episode, Inputs, TextInputs
from metaloom.datasets.document_episodes import next_token
from metaloom.datasets.episodes import Arrays
from metaloom.datasets.ready_episodes import shared_example
from metaloom.errors import StreamError
from metaloom.new_task.examples import Example, read_examples
from metaloom.new_task.holding_out import count_held_out, held_out
from metaloom.new_task.labels import class_names, class_numbers, require_known
from metaloom.new_task.parts import parts_of
from metaloom.new_task.ready import is_ready, read_ready
from metaloom.new_task.request import TaskFiles
from metaloom.new_task.texts import read_stretches
from metaloom.recipe import Recipe
from metaloom.recipe.tasks import TaskFacts, task_facts
from metaloom.sources import inputs_of


@dataclasses.dataclass(frozen=True, eq=False)
class NewTask:
    """A task that a run has not seen.

    Attributes:
        episode: its data.
        classes: the names of its classes by their numbers; none where there are none.
        notes: what a person should know of how it was read.
    """

    episode: Episode
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_task(recipe: Recipe, files: TaskFiles) -> NewTask:
    """The task of some files, read as the run's own data are.

    Raises:
        StreamError: there are no examples, some are broken, or they do not fit the run's model.
    """
    facts = task_facts(recipe)
    inputs = inputs_of(recipe, facts.inputs)
    support, query = parts_of(Path(files.task), None if files.query is None else Path(files.query))
    if is_ready(support):
        if query is not None:
            raise StreamError(f"{support} has a query part already: leave --query out.")
        return NewTask(*read_ready(support, files, inputs, facts), ())
    if facts.objective == "language_modelling":
        assert isinstance(inputs, TextInputs), "a rule of the recipe has seen to it"
        return _of_texts(support, query, files, inputs)
    num_targets = facts.num_outputs if facts.objective == "regression" else None
    if num_targets is not None and num_targets != len(files.targets):
        raise StreamError(
            f"--target names {len(files.targets)} columns, and the run predicts {num_targets} numbers: name "
            "one column for each."
        )
    of_support, notes = read_examples(support, files, inputs, num_targets)
    of_query: list[Example] = []
    if query is not None:
        of_query, more = read_examples(query, files, inputs, num_targets)
        notes += more
    task = _of_examples(of_support, of_query, files, facts, inputs, seed=recipe.seed)
    return dataclasses.replace(task, notes=(*notes, *task.notes))


def _of_examples(
    support: list[Example],
    query: list[Example],
    files: TaskFiles,
    facts: TaskFacts,
    inputs: Inputs,
    *,
    seed: int,
) -> NewTask:
    notes = []
    names: tuple[str, ...] = ()
    if facts.objective == "classification":
        names = class_names([example.label for example in support], facts)
        require_known([example.label for example in query], names, facts)
    if not query:
        contents = [example.inputs.tobytes() for example in support]
        kept, apart = held_out([example.label for example in support], contents, seed=seed)
        support, query = [support[place] for place in kept], [support[place] for place in apart]
        notes.append(f"held out to be judged on: {len(query)} of {len(kept) + len(apart)} examples")
    _require_apart(support, query)
    num_cut = sum(example.is_cut for example in (*support, *query))
    if num_cut:
        assert isinstance(inputs, TextInputs), "texts alone are cut"
        notes.append(
            f"{num_cut} of {len(support) + len(query)} texts are longer than the {inputs.length} tokens that "
            "the run's model is shown, and were cut there, as those of training were"
        )
    episode = Episode(
        number=0,
        task=files.name,
        support=_arrays(support, inputs, names),
        query=_arrays(query, inputs, names),
        num_ways=len(names) or facts.num_outputs,
    )
    return NewTask(episode, names, tuple(notes))


def _arrays(examples: Sequence[Example], inputs: Inputs, names: Sequence[str]) -> Arrays:
    targets = [example.target for example in examples if example.target is not None]
    return {
        "inputs": inputs.batch([example.inputs for example in examples]),
        "targets": np.stack(targets)
        if targets
        else class_numbers([example.label for example in examples], names),
    }


def _require_apart(support: Sequence[Example], query: Sequence[Example]) -> None:
    twins = shared_example((example.inputs for example in support), (example.inputs for example in query))
    if twins is not None:
        raise StreamError(
            f"{query[twins[0]].place} of the query shows what {support[twins[1]].place} of the support does, "
            "and nothing may be judged on what it was adapted to: remove one of them."
        )


def _of_texts(support: Path, query: Path | None, files: TaskFiles, inputs: TextInputs) -> NewTask:
    length, vocabulary = inputs.length, inputs.vocabulary
    shown = read_stretches(support, files, length=length, vocabulary=vocabulary)
    notes = []
    if query is not None:
        asked = read_stretches(query, files, length=length, vocabulary=vocabulary)
    else:
        if len(shown) < 2:
            raise StreamError(
                f"{support} has one sequence of {length} tokens and the one after, and none can be held out "
                f"to be judged on: give {2 * (length + 1)} tokens or more, or a query part (--query PATH)."
            )
        number = count_held_out(len(shown))
        shown, asked = shown[:-number], shown[-number:]
        notes.append(
            f"held out to be judged on: the last {number} of {len(shown) + number} sequences of {length} "
            "tokens"
        )
    episode = Episode(number=0, task=files.name, support=next_token(shown), query=next_token(asked))
    return NewTask(episode, (), tuple(notes))
