"""Some of a model's own parameters are fast, and tasks share the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from metaloom.engine.adapters.base import INIT, Adapter, Learned, broadcast_init, learned_backbone
from metaloom.engine.adapters.model import Readout, Shards, Structure, nothing_attached, run_model, stacked
from metaloom.engine.adapters.selection import fast_head
from metaloom.engine.adapters.together import (
    backbone_parameters,
    backbone_weights,
    require_layers_that_run_together,
    run_together,
    whole_parameters,
)
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError


class PartAdapter(Adapter):
    """Chosen parameters of a model are fast weights, under their own names; all others are a shared backbone.

    With `together`, activations stay `[T * N, ...]` and the backbone runs its ordinary kernels once for all
    tasks. The fast weights stand in the model in place of its own, with a leading task dim, and the layers
    that have them compute with it (`kernels.per_task`): `y = W_t x + b_t` for a linear layer, `normed * w_t +
    b_t` behind the model's norm, and likewise convolutions and embeddings. Batch norm takes the statistics of
    each task apart.

    Args:
        model: its examples have to stay in the first dim.
        names: of the fast parameters.
        tasks: `together`, or `loop`, one task after the other: for parameters of other layers too.
        structure: where the model can be taken apart.
        shards: the model's weights, where this rank holds shards of them; those of `model` are not read then,
            and may be on the meta device. Every rank must make the adapter.

    Raises:
        CapabilityError: there is no fast parameter; or one is not for one pass of all tasks to adapt.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: Sequence[str],
        tasks: Literal["together", "loop"] = "together",
        structure: Structure | None = None,
        shards: Shards | None = None,
    ) -> None:
        if not names:
            raise CapabilityError(
                "adaptation.fast chooses no parameter of this model, so nothing would adapt."
            )
        if tasks == "together":
            require_layers_that_run_together(model, names)
        self._model = model
        self._structure = structure or Structure()
        self._tasks = tasks
        self._shards = shards
        self._initial = whole_parameters(model, shards, list(names))

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        meta = {INIT + name: value.clone() for name, value in self._initial.items()} if init else {}
        if backbone:
            values = backbone_parameters(self._model, self._shards)
            shared = {name: value for name, value in values.items() if name not in self._initial}
            meta |= learned_backbone(shared, backbone)
        return meta

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        if self._tasks == "together":
            return run_together(
                self._model,
                self._structure,
                meta,
                inputs,
                forward_pass,
                attachments={},
                attach=nothing_attached,
                shards=self._shards,
                own_weights=fast,
            )
        backbone = backbone_weights(meta, self._shards)
        weights = {name: value.unbind() for name, value in fast.items()}
        return stacked(
            [
                run_model(
                    self._model,
                    self._structure,
                    backbone | {name: value[task] for name, value in weights.items()},
                    inputs[task],
                    forward_pass.of_task(task),
                    attachments={},
                    attach=nothing_attached,
                    shards=self._shards,
                    whole=weights,
                )
                for task in range(inputs.shape[0])
            ]
        )

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        return fast_head(self._model, self._structure, output, self._initial)
