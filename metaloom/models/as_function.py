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
        head_name: the last module, which gives the outputs.
        embedding_name: the module that turns tokens into vectors; None where it reads no texts.
        config: what `config.json` says of it.
    """

    block_names: tuple[str, ...]
    head_name: str
    embedding_name: str | None
    config: Any

    def own_names(self, stored: Iterable[str]) -> dict[str, str]:
        """What weights are called here, by what they are called in a folder of the same network, with or
        without a head.

        Raises:
            ValueError: a weight is there in another layout than here.
        """
        raise NotImplementedError
