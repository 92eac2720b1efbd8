"""What the engine asks of a model that was made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

PREPROCESSING_FILE = "preprocessor_config.json"  # what a folder of transformers says of its images


class AsFunction(nn.Module):
    """A model that is called with one tensor, and tells where it can be taken apart.

    Attributes:
        block_names: the modules that its layers are, none inside another.
        head_name: the last module, which gives the outputs; None where none can be told from the rest.
        embedding_name: the module that turns tokens into vectors; None where it reads no texts.
        language_head_name: the last module for next tokens, of a classifier that has such a one too: it is
            then called with the name of an output beside its inputs, `classification` or
            `language_modelling`.
        config: what `config.json` says of it.
    """

    block_names: tuple[str, ...]
    head_name: str | None
    embedding_name: str | None
    language_head_name: str | None = None
    config: Any

    def own_names(self, stored: Iterable[str]) -> dict[str, str]:
        """What weights are called here, by what they are called in a folder of the same network, with or
        without a head.

        Raises:
            ValueError: a weight is there in another layout than here.
        """
        raise NotImplementedError


def with_parts(kind: type[AsFunction], own: type[nn.Module]) -> type[AsFunction]:
    """A class of the same name, which computes as `kind` and has all else of its own."""
    return type(own.__name__, (kind, own), {"__module__": own.__module__})


def items_of_lists(model: nn.Module) -> tuple[str, ...]:
    """The items of the lists of modules that are inside no other list; of an item that is not called itself,
    such as a list, what is in it."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return tuple(item for name in outer for item in _called(lists[name], name))


def _called(module: nn.Module, name: str) -> list[str]:
    """The modules in one that have a `forward`, none inside another."""
    found = []
    for own, child in module.named_children():
        full = f"{name}.{own}"
        found += _called(child, full) if type(child).forward is nn.Module.forward else [full]
    return found
