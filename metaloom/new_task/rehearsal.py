"""What a new task rehearses, where the recipe rehearses. Needs no torch."""

from __future__ import annotations

import dataclasses

from metaloom.datasets import Episode, EpisodeSource
from metaloom.errors import StreamError
from metaloom.recipe import Recipe
from metaloom.sources import open_data, with_rehearsal


class _One(EpisodeSource):
    """A source of one episode."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def episode(self, number: int) -> Episode:
        return dataclasses.replace(self._episode, number=number)


def without_rehearsal(recipe: Recipe) -> Recipe:
    """The recipe, whose inner loss is then that of the support data alone."""
    alone = recipe.adaptation.model_copy(update={"rehearsal": None})
    return recipe.model_copy(update={"adaptation": alone})


def rehearsing(recipe: Recipe, episode: Episode, *, num_steps: int) -> Episode:
    """The episode with rehearsal data of the run's for its inner steps, and to measure retention on; as it is
    where the recipe rehearses nothing.

    Raises:
        StreamError: the data cannot be read.
    """
    if recipe.adaptation.rehearsal is None:
        return episode
    try:
        data = open_data(recipe)
        try:
            source = with_rehearsal(
                recipe, data, _One(episode), "new task", seed=recipe.seed, num_steps=num_steps
            )
            return source.episode(0)
        finally:
            data.close()
    except StreamError as error:
        raise StreamError(
            f"what adaptation.rehearsal mixes into the inner loss cannot be read: {error} To adapt without "
            "it, give --no-rehearsal."
        ) from error
