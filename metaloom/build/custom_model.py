"""A module of the recipe's user as a model."""

from __future__ import annotations

import fnmatch
import inspect

from torch import nn

from metaloom.build.imported import imported
from metaloom.errors import CapabilityError
from metaloom.models.as_function import AsFunction, items_of_lists, with_parts
from metaloom.recipe import CustomModel


def make_custom(section: CustomModel, num_outputs: int) -> AsFunction:
    """The module that `model.factory` makes, with what the recipe says of its parts.

    Raises:
        CapabilityError: it cannot be made, or has not these parts.
    """
    factory = imported(section.factory, key="model.factory")
    try:
        inspect.signature(factory).bind(num_outputs=num_outputs, **section.options)
    except (TypeError, ValueError) as error:
        raise CapabilityError(
            f"model.factory: {section.factory} cannot be called with num_outputs and model.options "
            f"({', '.join(section.options) or 'none'}): {error}."
        ) from error
    model = factory(num_outputs=num_outputs, **section.options)
    if not isinstance(model, nn.Module):
        raise CapabilityError(
            f"model.factory: {section.factory} returned a {type(model).__name__}; it has to return a "
            "torch.nn.Module."
        )
    names = [name for name, _ in model.named_modules()]
    for key in ("head", "embedding"):
        wanted = getattr(section, key)
        if wanted is not None and wanted not in names:
            there_are = ", ".join(name for name, _ in model.named_children())
            raise CapabilityError(
                f"model.{key}: {wanted!r} is no part of {section.factory}; at the top it has {there_are}."
            )
    blocks = items_of_lists(model) if section.blocks is None else _blocks(section.blocks, names)
    model.__class__ = with_parts(AsFunction, type(model))
    assert isinstance(model, AsFunction)
    model.block_names, model.head_name, model.embedding_name = blocks, section.head, section.embedding
    return model


def _blocks(patterns: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            there_are = ", ".join(name for name in names if name and "." not in name)
            raise CapabilityError(
                f"model.blocks: {pattern!r} matches no part of the model; at the top it has {there_are}."
            )
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in found:
        inside = next((other for other in found if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise CapabilityError(
                f"model.blocks: {inside} is inside {name}, and both match: narrow the patterns."
            )
    return tuple(found)
