"""What a recipe names by its place in a module of its user's."""

from __future__ import annotations

import importlib
from typing import Any

from metaloom.errors import CapabilityError


def imported(path: str, *, key: str) -> Any:
    """A function or class.

    Args:
        path: `module:name`.
        key: of the recipe, that names it.

    Raises:
        CapabilityError: there is none.
    """
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise CapabilityError(
            f"{key}: {path} cannot be imported: {error}. The module is looked for in the working folder and "
            "among what is installed."
        ) from error
