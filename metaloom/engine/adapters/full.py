"""Whole-model adaptation: every weight is fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call, vmap

from metaloom.engine.adapters.base import INIT, Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import (
    Attach,
    Readout,
    Structure,
    nothing_attached,
    run_model,
    stacked,
)
from metaloom.engine.adapters.norms import PerStepNorms, Site, collecting, normalising, rows_of, sites
from metaloom.engine.adapters.selection import fast_head
from metaloom.engine.capabilities import PER_STEP
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.errors import CapabilityError


class FullAdapter(Adapter):
    """All parameters of a model are fast weights: each task holds a full copy of them. (Weights that norms
    have for each inner step are not: tasks share them.)

    Args:
        model: any module; batch statistics are then per task.
        structure: where it can be taken apart.
        tasks: `loop`, one task after the other: the way for large tasks, and the one that recomputes blocks
            and applies the head in chunks; `vmap`, all tasks in one vectorised pass: the way for many small
            ones, on a GPU above all (on a CPU per-task convolutions, grouped under vmap, are slower and take
            several times the memory).
        norms: what norms have for each inner step; None where they are as all other layers.

    Raises:
        CapabilityError: the model has no norms of the kind that `norms` is about; or statistics are to be
            counted inside vmap.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        structure: Structure | None = None,
        tasks: Literal["loop", "vmap"] = "loop",
        norms: PerStepNorms | None = None,
    ) -> None:
        self._model = model
        self._structure = structure or Structure()
        self._tasks = tasks
        self._norms = norms
        per_step = [] if norms is None else norms.parameters_of(model)
        values = {name: value.detach() for name, value in model.named_parameters()}
        self._initial = {name: value for name, value in values.items() if name not in per_step}
        self._rows: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        if norms is not None:
            num_rows = norms.num_steps + 1
            self._rows = {name: values[name].expand(num_rows, *values[name].shape) for name in per_step}
            self._statistics = norms.initial_statistics(model)
        if self._statistics and tasks == "vmap":
            raise CapabilityError(
                "adaptation.norms.statistics: per_step; is not counted inside vmap: set "
                "adaptation.fast.tasks to loop, or it to batch."
            )

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        if backbone:
            raise CapabilityError("every weight is fast, so there is no backbone for tasks to share.")
        if not init:
            return {}
        meta = {INIT + name: value.clone() for name, value in self._initial.items()}
        return meta | {PER_STEP + name: value.clone() for name, value in self._rows.items()}

    def tracked(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._statistics.items()}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        shared = self._shared(meta, forward_pass.step)
        if self._tasks == "vmap":
            return Readout(self._vectorized(fast, shared, inputs, forward_pass))
        # Unbound once: each task's slice taken by index would have a gradient of the size of all tasks.
        weights = {name: value.unbind() for name, value in fast.items()}
        runs = []
        for task in range(inputs.shape[0]):
            of_task = forward_pass.of_task(task)
            attachments, attach = self._statistics_of(meta, of_task, task)
            runs.append(
                run_model(
                    self._model,
                    self._structure,
                    shared | {name: value[task] for name, value in weights.items()},
                    inputs[task],
                    of_task,
                    attachments=attachments,
                    attach=attach,
                )
            )
        return stacked(runs)

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        return fast_head(self._model, self._structure, output, self._initial)

    def _shared(self, meta: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weights of norms at an inner step, where they have some per step."""
        if self._norms is None:
            return {}
        row = self._norms.row(step)
        return {name: meta.get(PER_STEP + name, value)[row] for name, value in self._rows.items()}

    def _statistics_of(
        self, meta: Mapping[str, Tensor], of_task: ForwardPass, task: int
    ) -> tuple[dict[str, Tensor], Attach]:
        """What is attached to batch norms in the pass of one task, and how."""
        if self._norms is None or not self._statistics:
            return {}, nothing_attached
        row = self._norms.row(of_task.step)
        tracked = {name: meta[name] for name in self._statistics if name in meta}
        if tracked:
            return rows_of(tracked, row), normalising(self._model)
        if of_task.met is None:
            return {}, nothing_attached
        weights = None if of_task.weights is None else of_task.weights[0]
        site = Site(row, task, of_task.objective)
        return sites(self._model), collecting(self._model, of_task.met, site, weights)

    def _vectorized(
        self,
        fast: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Tensor:
        if forward_pass.recompute_blocks or forward_pass.holds_back_head:
            raise CapabilityError(
                "inside vmap nothing can be recomputed: set adaptation.fast.tasks to loop, or "
                "memory.recompute_blocks to false and memory.head_chunk to null."
            )

        self._structure.head_of(forward_pass.head)  # refuses one that there is not
        others = dict(self._model.named_buffers()) | dict(shared)
        interception = Interception(forward_pass, is_vectorized=True)

        def one_task(weights: dict[str, Tensor], examples: Tensor, example_weights: Tensor | None) -> Tensor:
            interception.weights = None if example_weights is None else example_weights[None]
            arguments = forward_pass.arguments(examples)
            logits: Tensor = functional_call(self._model, weights | others, arguments, strict=True)
            return logits

        in_dims = (0, 0, None if forward_pass.weights is None else 0)
        with interception, forward_pass.precision.autocast(forward_pass.device):
            return vmap(one_task, in_dims)(dict(fast), inputs, forward_pass.weights)
