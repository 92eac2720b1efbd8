"""What a contender is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.workloads import Array


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A problem in a library's own form, ready to be measured.

    Attributes:
        forward: one forward pass, which loads kernels and allocates what stays.
        hypergradient: the gradient of the query losses, summed over tasks, by the names of metaloom's
            meta-parameters (`init.<fast weight>`, `backbone.<parameter>`) and in the shapes of torch's.
        compile_s: what compiling took, where there is a compiler.
    """

    forward: Callable[[], object]
    hypergradient: Callable[[], dict[str, Array]]
    compile_s: float = 0.0
