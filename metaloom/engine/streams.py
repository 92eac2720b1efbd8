"""A task's inputs as a stream: what comes next is predicted by what was seen, without labels, before it.

Shape letters: T tasks, N examples of a stream, P places in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.evaluation import Curve
from metaloom.engine.learner import TaskBatch


def stream_positions(num_examples: int) -> tuple[int, ...]:
    """1, 2, 4 ... below N: after so many inputs a method adapts anew."""
    return tuple(2**power for power in range(num_examples.bit_length()) if 2**power < num_examples)


@dataclasses.dataclass(frozen=True)
class StreamCurve:
    """A `Curve` over places in a stream instead of adaptation steps.

    The stream comes in batches that double: after n = 1, 2, 4 ... examples a task adapts to all n as its
    support set, and the examples n .. 2n - 1 are its queries. So each example but the first is predicted
    once, by inputs before it alone, and a stream costs as much as two passes over it. For methods that do not
    read the targets of support data, and whose predictions do not depend on the other queries.

    Attributes:
        curve: how a task is adapted to and measured.
        has_queries: whether a task's queries follow its support examples in the stream; otherwise they are
            the same examples, and the stream is the support set.
    """

    curve: Curve
    has_queries: bool

    def __call__(self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        """Loss and scores after adaptation, `[T, P]` each, for the P places of `stream_positions(N)`."""
        examples = dict(batch.support)
        if self.has_queries:
            examples = {
                name: torch.cat([value, batch.query[name]], dim=1) for name, value in examples.items()
            }
        points: dict[str, list[Tensor]] = {}
        for seen in stream_positions(examples["targets"].shape[1]):
            at = dataclasses.replace(
                batch,
                support={name: value[:, :seen] for name, value in examples.items()},
                query={name: value[:, seen : 2 * seen] for name, value in examples.items()},
                retention=None,
            )
            for name, values in self.curve(meta, at, num_steps=num_steps).items():
                points.setdefault(name, []).append(values[:, -1])
        return {name: torch.stack(values, dim=1) for name, values in points.items()}
