"""A folder that `mlflow.pyfunc.load_model` loads: data of our own, and the module that reads them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import metaloom

# What the predictions depend on; its own requirements come with metaloom.
_PINNED = ("torch", "numpy", "safetensors", "mlflow")


def write_model(
    folder: Path,
    data: Path,
    *,
    loader: str,
    example: NDArray[Any],
    outputs: NDArray[Any],
    facts: Mapping[str, str],
) -> None:
    """Writes the model: `MLmodel` with its signature, an input example, pinned requirements, and the data.

    Args:
        folder: is there, and empty.
        data: a folder, which is copied.
        loader: the module whose `_load_pyfunc` reads the data.
        example: inputs `[N, ...]`; N may be another, and so may be the length of tokens.
        outputs: what the model says of them, `[N, ...]`.
        facts: kept in `MLmodel` as the model's metadata.
    """
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import Schema, TensorSpec

    is_tokens = example.dtype.kind == "i"

    def spec(array: NDArray[Any]) -> TensorSpec:
        free = 2 if is_tokens and array.ndim > (1 if array is example else 2) else 1
        return TensorSpec(array.dtype, (*(-1,) * free, *array.shape[free:]))

    signature = ModelSignature(inputs=Schema([spec(example)]), outputs=Schema([spec(outputs)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        save_model(
            path=str(folder),
            loader_module=loader,
            data_path=str(data),
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
            metadata=dict(facts),
        )


def requirements() -> Sequence[str]:
    """What a machine that serves the model installs, in the versions that are here."""
    # Behind a plus is where torch's build is from, which no index of packages knows.
    versions = {name: metadata.version(name).partition("+")[0] for name in _PINNED}
    return [f"{name}=={version}" for name, version in ({"metaloom": metaloom.__version__} | versions).items()]
