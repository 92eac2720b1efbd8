"""One forward pass of a shared backbone for all tasks.

Shape letters: T tasks, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Attach, Readout, Shards, Structure, Tensors, run_model
from metaloom.engine.adapters.norms import NORMS, is_own_norm
from metaloom.engine.adapters.selection import CONVOLUTIONS, is_transposed, uses_of
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError

# What one pass can hold a copy per task of. By the exact type: a subclass may compute with it otherwise.
TOGETHER: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    **dict.fromkeys(NORMS, ("weight", "bias")),
    **dict.fromkeys(CONVOLUTIONS, ("weight", "bias")),
    nn.Embedding: ("weight",),
}


def run_together(
    model: nn.Module,
    structure: Structure,
    meta: Tensors,
    inputs: Tensor,
    forward_pass: ForwardPass,
    *,
    attachments: Tensors,
    attach: Attach,
    shards: Shards | None,
    own_weights: Tensors | None = None,
) -> Readout:
    """The features of T tasks from one pass of the model over `[T * N, ...]`.

    Args:
        meta: meta-parameters; the backbone's among them are the model's weights.
        inputs: `[T, N, ...]`.
        attachments: tensors that hooks add to layers: see `run_model`.
        own_weights: parameters of which each task has its own, `[T, ...]`, by their names in the model.
    """
    num_tasks, num_examples = inputs.shape[:2]
    features, head, tensors = run_model(
        model,
        structure,
        backbone_weights(meta, shards) | dict(own_weights or {}),
        inputs.flatten(0, 1),
        forward_pass.together(num_tasks),
        attachments=attachments,
        attach=attach,
        shards=shards,
        whole=() if own_weights is None else own_weights,
    )
    return Readout(features.view(num_tasks, num_examples, *features.shape[1:]), head, tensors)


def backbone_weights(meta: Tensors, shards: Shards | None) -> dict[str, Tensor]:
    """The weights that tasks share, by their names in the model: those that are learned, and all that this
    rank has shards of."""
    backbone = {} if shards is None else dict(shards.values)
    return backbone | {
        # A view is no leaf: see `kernels.wanted`.
        name.removeprefix(BACKBONE): value.view_as(value)
        for name, value in meta.items()
        if name.startswith(BACKBONE)
    }


def backbone_parameters(model: nn.Module, shards: Shards | None) -> dict[str, Tensor]:
    """What this rank holds of each of a model's parameters."""
    values: Mapping[str, Tensor] = dict(model.named_parameters()) if shards is None else shards.values
    return {name: value.detach() for name, value in values.items()}


def whole_parameters(model: nn.Module, shards: Shards | None, names: list[str]) -> dict[str, Tensor]:
    """Some of a model's parameters, whole. With shards every rank must call."""
    held = backbone_parameters(model, shards)
    chosen = {name: held[name] for name in names}
    if shards is None:
        return chosen
    with torch.no_grad():
        return {name: value.clone() for name, value in shards.whole(chosen).items()}


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether it is `Conv1D` of transformers: another of that name may compute otherwise."""
    return is_transposed(module) and type(module).__module__.startswith("transformers.")


def require_layers_that_run_together(model: nn.Module, names: Sequence[str]) -> None:
    """Passes where one pass of all tasks can hold a copy per task of these parameters.

    Raises:
        CapabilityError: it cannot.
    """
    modules = dict(model.named_modules())
    uses = uses_of(model)
    for name in names:
        owner, _, parameter = name.rpartition(".")
        module = modules[owner]
        if len(uses[name]) > 1:
            raise CapabilityError(
                f"adaptation.fast: {name} is one weight of several layers ({', '.join(uses[name])}), of "
                "which one pass of all tasks cannot hold a copy per task: untie them "
                "(model.tied_embeddings: false), or set adaptation.fast to part with tasks: loop."
            )
        if (
            parameter not in TOGETHER.get(type(module), ())
            and not _is_of_transformers(module)
            and not is_own_norm(module)
        ):
            raise CapabilityError(
                f"adaptation.fast: {name} belongs to a {type(module).__name__}, and one pass of all tasks "
                "holds a copy per task of what linear layers, norms, convolutions and embeddings have: "
                "choose among these, or set adaptation.fast to part with tasks: loop."
            )
