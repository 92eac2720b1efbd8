"""A model without fast weights: what it makes of examples before its head.

Shape letters: T tasks, N examples, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Structure, nothing_attached, run_model
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision
from metaloom.engine.recomputation import recomputed
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The part of a model before its head, shared by all tasks; each task's examples go through it together.

    Attributes:
        model: any module with a head: see `Structure.head`.
        structure: where it can be taken apart.
        head: which of its outputs is left out; None where it has one.
        precision: number format.
        recompute_blocks: keep the inputs of blocks alone, and compute each again when it is differentiated.
        chunk: examples of a task that are computed at a time, without a graph, and again with one when their
            features are differentiated: memory of one chunk in place of all examples, for one more forward
            pass. None for all at once, with a graph. The result is the same, since examples that see each
            other, through batch statistics, are refused.

    Raises:
        CapabilityError: the model has no head that can be told from the rest; or it has layers whose batch
            statistics chunks would change.
    """

    model: nn.Module
    structure: Structure
    head: str | None
    precision: Precision
    recompute_blocks: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.structure.head_of(self.head) is None:
            raise CapabilityError(
                "features are what a model's head is given, and this model has no head that can be told from "
                "the rest: name it in Structure.head."
            )
        if self.chunk is not None:
            for name, module in self.model.named_modules():
                if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                    raise CapabilityError(_batch_statistics(self.chunk, f"its layer {name!r}"))

    def meta_parameters(self) -> dict[str, Tensor]:
        """Fresh copies of the weights before the head, `backbone.<name>`."""
        heads = self.structure.head
        names = [heads] if isinstance(heads, str) else list((heads or {}).values())
        weights = dict(self.model.named_parameters())
        tied = {id(value) for name, value in weights.items() if not _is_of(name, names)}
        return {
            BACKBONE + name: value.detach().clone()
            for name, value in weights.items()
            if not _is_of(name, names) or id(value) in tied
        }

    def features(self, meta: Mapping[str, Tensor], inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """What the head is given, `[T, N, ..., D]`, of examples `[T, N, ...]`. Batch statistics are those of
        a task's examples.

        Args:
            meta: `backbone.<name>`; what it lacks stays at the model's own values.
            weights: `[T, N]`, 0 for padding; None where there is none.

        Raises:
            CapabilityError: with `chunk`, the model calls batch norm itself.
        """
        substituted = {
            name.removeprefix(BACKBONE): value for name, value in meta.items() if name.startswith(BACKBONE)
        }
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            recompute_blocks=self.recompute_blocks,
            holds_back_head=True,
            head=self.head,
            weights=weights if self.chunk is None else None,  # for batch statistics alone
        )
        of_tasks = self._in_chunks if self.chunk is not None else self._at_once
        return torch.stack(
            [of_tasks(substituted, inputs[task], forward_pass.of_task(task)) for task in range(len(inputs))]
        )

    def _at_once(
        self, substituted: Mapping[str, Tensor], inputs: Tensor, forward_pass: ForwardPass
    ) -> Tensor:
        """The features of examples `[N, ...]`."""
        return run_model(
            self.model,
            self.structure,
            substituted,
            inputs,
            forward_pass,
            attachments={},
            attach=nothing_attached,
        )[0]

    def _in_chunks(
        self, substituted: Mapping[str, Tensor], inputs: Tensor, forward_pass: ForwardPass
    ) -> Tensor:
        """The same, `chunk` examples at a time."""
        assert self.chunk is not None

        def compute(examples: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            with _RefuseBatchStatistics(len(examples)):
                return (self._at_once(dict(zip(substituted, values, strict=True)), examples, forward_pass),)

        # As for two derivatives: the first pass then leaves no graph, not even an empty one.
        pieces = [
            recomputed(compute, (examples, *substituted.values()), derivative="reverse")[0]
            for examples in torch.split(inputs, self.chunk)
        ]
        return torch.cat(pieces)


class _RefuseBatchStatistics(TorchFunctionMode):
    """Refuses batch norm by the statistics of the examples at hand: layers of torch are found before, calls
    by a model's own forward pass here.

    Args:
        chunk: how many examples are at hand.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self._chunk = chunk

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise CapabilityError(_batch_statistics(self._chunk, "torch.nn.functional.batch_norm"))
        return func(*args, **kwargs)


def _batch_statistics(chunk: int, what: str) -> str:
    return (
        f"features are computed {chunk} examples at a time, and this model normalises by the statistics of "
        f"all of a task's examples ({what}), which chunks would change: set algorithm.feature_chunk to null, "
        "or take a norm that looks at one example (group or layer norm)."
    )


def _is_of(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
