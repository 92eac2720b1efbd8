"""Where a job may be broken off."""

from __future__ import annotations

import contextlib


class StopPoints:
    """Places in a job at which it may be stopped: here at none.

    Whoever stops a job overrides these, and raises what is to pass through the engine. Nothing that outlasts
    an outer step has changed before `meet`: a step that is broken off has not happened.
    """

    def between_passes(self) -> None:
        """Called before each inner step, forwards and backwards, and before each micro-batch. In lockstep all
        ranks call it as often."""

    def meet(self) -> None:
        """Called when this rank has done its share of a work, before ranks meet over it. Every rank calls it,
        and none comes back before all have."""

    def waiting(self) -> contextlib.AbstractContextManager[object]:
        """In this context this rank waits for something from outside, and needs no other rank to go on."""
        return contextlib.nullcontext()
