"""Contenders: how each library computes a workload's hypergradient.

A module is imported in the process that measures it, and only there. It has a function
`prepare(problem, variant) -> Prepared`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Contender:
    """A library, and the way in which it differentiates.

    Attributes:
        module: the module of this package that knows the library.
        variant: which of the library's ways.
        distribution: the installed distribution whose release is reported.
        requires: what must be importable for it.
        exact: whether its hypergradient is that of the unrolled inner loop.
    """

    module: str
    variant: str
    distribution: str
    requires: tuple[str, ...]
    exact: bool = True

    @property
    def is_peer(self) -> bool:
        """Whether it is another library than metaloom."""
        return self.distribution != "metaloom"


def _metaloom(variant: str, *, exact: bool = True) -> Contender:
    return Contender("metaloom_", variant, "metaloom", ("metaloom",), exact)


def _jax(variant: str) -> Contender:
    return Contender("jax_", variant, "jax", ("jax",))


CONTENDERS: dict[str, Contender] = {
    "metaloom/unrolled": _metaloom("unrolled"),
    "metaloom/rematerialized": _metaloom("rematerialized"),
    "metaloom/mixed_mode": _metaloom("mixed_mode"),
    "metaloom/auto": _metaloom("auto"),
    "metaloom/rematerialized, blocks": _metaloom("rematerialized, blocks"),
    "metaloom/mixed_mode, blocks": _metaloom("mixed_mode, blocks"),
    "metaloom/rematerialized, binomial": _metaloom("rematerialized, binomial"),
    "metaloom/auto, task after task": _metaloom("auto, task after task"),
    "metaloom/rematerialized, task after task": _metaloom("rematerialized, task after task"),
    "metaloom/first_order": _metaloom("first_order", exact=False),
    "learn2learn": Contender("learn2learn_", "unrolled", "learn2learn", ("learn2learn",)),
    "higher": Contender("higher_", "unrolled", "higher", ("higher",)),
    "torchopt": Contender("torchopt_", "unrolled", "torchopt", ("torchopt",)),
    "betty": Contender("betty_", "unrolled", "betty-ml", ("betty", "functorch")),
    "jax/reverse": _jax("reverse"),
    "jax/reverse_checkpoint": _jax("reverse_checkpoint"),
    "jax/mixed_mode": _jax("mixed_mode"),
}
