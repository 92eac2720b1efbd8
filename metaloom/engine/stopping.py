"""Where a job may be broken off."""

from __future__ import annotations


class StopPoints:
    """Places in a job at which it may be stopped: here at none.

    Whoever stops a job overrides these, and raises what is to pass through the engine. Nothing that outlasts
    an outer step has changed before `meet`: a step that is broken off has not happened.
    """

    def between_passes(self) -> None:
        """Called before each inner step, forwards and backwards, and before each micro-batch. In lockstep all
        ranks call it as often."""

    def pass_point(self) -> None:
        """Called where all ranks come by, in the same order."""

    def meet(self) -> None:
        """Called when this rank has done its share of a work, before ranks meet over it. Every rank calls it;
        out of lockstep none comes back before all have."""
