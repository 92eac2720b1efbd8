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
        config: what `config.json` says of it.
    """

    block_names: tuple[str, ...]
    head_name: str | None
    embedding_name: str | None
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
    """The items of the lists of modules that are inside no other list."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return tuple(f"{name}.{index}" for name in outer for index in range(len(lists[name])))
