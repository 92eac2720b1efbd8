"""Which parameters of a model are fast, by what they are there."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.norms import NORMS, is_own_norm
from metaloom.errors import CapabilityError

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def head_parameters(model: nn.Module, structure: Structure, output: str | None) -> list[str]:
    """The parameters of the module that gives an output, the last on the way to it.

    What is fast in ANIL (Raghu et al. 2020, "Rapid Learning or Feature Reuse?", section 4).

    Raises:
        CapabilityError: the model has no such module; or a weight of it is another layer's too.
    """
    head = structure.head_of(output)
    if head is None:
        raise CapabilityError("this model has no head that can be told from the rest.")
    own = [name for name, _ in model.get_submodule(head).named_parameters(prefix=head)]
    for name, names in uses_of(model).items():
        shared = [other for other in names if other in own]
        if shared and len(names) > 1:
            raise CapabilityError(
                f"the head's weight {shared[0]} is also {name if name != shared[0] else names[1]}, so that "
                "the head cannot be apart from the rest: set model.tied_embeddings to false."
            )
    return own


def norm_and_bias_parameters(model: nn.Module, *, norms: bool, biases: bool) -> list[str]:
    """The weights and biases of norms, and the biases of linear layers and convolutions.

    Mudrakarta et al. 2019, "K for the Price of 1", section 3 (norms); Ben Zaken et al. 2022, "BitFit",
    section 3 (biases, of norms too).

    Args:
        norms: whether to take the weights and biases of norms.
        biases: whether to take the biases of linear layers and convolutions.
    """
    kinds = (*(NORMS if norms else ()), *((nn.Linear, *CONVOLUTIONS) if biases else ()))
    return [
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules()
        if type(module) in kinds or (norms and is_own_norm(module)) or (biases and is_transposed(module))
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or type(module) in NORMS or is_own_norm(module)
    ]


def matching_parameters(model: nn.Module, patterns: Collection[str]) -> list[str]:
    """The parameters whose names match a pattern of `fnmatch` (`*`, `?`, `[...]`), in the model's order.

    Raises:
        CapabilityError: a pattern matches none; names those that there are.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise CapabilityError(
                f"adaptation.fast.parameters: {pattern!r} matches no parameter; this model has "
                f"{', '.join(names)}."
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers by name, with the numbers of their inputs and outputs: those of torch, and those that
    are transposed."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = (layer.in_features, layer.out_features)
        elif is_transposed(layer):
            num_inputs, num_outputs = layer.get_parameter("weight").shape
            found[name] = (num_inputs, num_outputs)
    return found


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a linear layer with its weight as `[inputs, outputs]`: `Conv1D` of transformers."""
    weight: Any = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def matching_layers(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"], structure: Structure
) -> dict[str, nn.Module]:
    """The linear layers that are meant, by name, in the model's order.

    Args:
        targets: ends of names, patterns of `fnmatch` of whole names, or all but the output head.

    Raises:
        CapabilityError: a target matches none; names those that there are.
    """
    names = list(linear_layers(model))
    if targets == "all-linear":
        # The output head is as wide as the vocabulary: an adapter there costs more than all others.
        # Of several that of the language, and a decoder's of transformers for classes.
        several = structure.head if isinstance(structure.head, Mapping) else None
        heads = (structure.head,) if several is None else (several.get("language_modelling"), "score")
        chosen = {name for name in names if name not in heads and name.rpartition(".")[2] != "head"}
    else:
        chosen = set()
        for target in targets:
            matches = {name for name in names if _is_meant(name, target)}
            if not matches:
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise CapabilityError(
                    f"adaptation.fast.targets: {target!r} matches no linear layer; this model has {endings}."
                )
            chosen |= matches
    return {name: model.get_submodule(name) for name in names if name in chosen}


def parameters_of(model: nn.Module, modules: Sequence[str], *, besides: Collection[str]) -> list[str]:
    """The parameters of modules, which are named as `matching_layers` has it.

    Args:
        besides: names of layers that are adapted otherwise.

    Raises:
        CapabilityError: a name matches no module that has parameters, or one of `besides`.
    """
    found: dict[str, None] = {}
    for wanted in modules:
        named = [
            (name, [*module.named_parameters(prefix=name)])
            for name, module in model.named_modules()
            if _is_meant(name, wanted)
        ]
        parameters = [parameter for _, own in named for parameter, _ in own]
        if not parameters:
            there_are = ", ".join(dict(model.named_children()))
            raise CapabilityError(
                f"adaptation.fast.modules_to_save: {wanted!r} matches no module with parameters; give the "
                f"end of a module's name: at the top this model has {there_are}."
            )
        for name in parameters:
            layer = name.rpartition(".")[0]
            if layer in besides:
                raise CapabilityError(
                    f"adaptation.fast.modules_to_save: {wanted!r} has {layer} in it, which adaptation.fast."
                    "targets gives a low-rank adapter: choose it in one of them."
                )
            found[name] = None
    return list(found)


def _is_meant(name: str, wanted: str) -> bool:
    if any(character in wanted for character in "*?["):
        return fnmatch.fnmatchcase(name, wanted)
    return name == wanted or name.endswith(f".{wanted}")


def fast_head(
    model: nn.Module, structure: Structure, output: str | None, fast: Collection[str]
) -> tuple[str, ...]:
    """`head_parameters`, all of which have to be among the fast ones.

    Raises:
        CapabilityError: one is not.
    """
    names = head_parameters(model, structure, output)
    missing = [name for name in names if name not in fast]
    if missing:
        raise CapabilityError(
            f"adaptation.head is about the head's own weights, and {', '.join(missing)} is not fast: choose "
            "it in adaptation.fast, or leave adaptation.head out."
        )
    return tuple(names)


def uses_of(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {same[0]: same for same in names.values()}
