"""Meta-augmentation of regression tasks.

Shape letters: N examples, P numbers of a target.
"""

from __future__ import annotations

import dataclasses

from metaloom.datasets.draws import generator
from metaloom.datasets.episodes import Arrays, Episode, EpisodeSource


class ShiftedTargets(EpisodeSource):
    """Episodes of another source whose targets are all shifted by the same random numbers, `y + eps`, support
    and query alike (Rajendran et al. 2020, "Meta-Learning Requires Meta-Augmentation": augmentation that
    raises the conditional entropy of targets given inputs).

    A model that does not look at the support can then no longer know a task's targets by its inputs. What it
    is for is training: tasks that are only measured stay as they are.

    Args:
        source: of float targets `[N, P]`.
        std: standard deviation of each of the P numbers, drawn for each task.
        seed: of the draws.
        split: which keeps the draws of splits apart.
    """

    def __init__(self, source: EpisodeSource, *, std: float, seed: int, split: str) -> None:
        self._source, self._std = source, std
        self._seed, self._split = seed, split

    @property
    def groups(self) -> frozenset[str] | None:
        return self._source.groups

    def episode(self, number: int) -> Episode:
        episode = self._source.episode(number)
        rng = generator("target noise", self._seed, self._split, number)
        targets = episode.support["targets"]
        shift = (self._std * rng.standard_normal(targets.shape[1:])).astype(targets.dtype)

        def shifted(part: Arrays) -> Arrays:
            return part | {"targets": part["targets"] + shift}

        return dataclasses.replace(episode, support=shifted(episode.support), query=shifted(episode.query))
