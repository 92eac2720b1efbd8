"""What MLflow loads: `mlflow.pyfunc.load_model` finds this module by its name in the model's `MLmodel`, so
that nothing is unpickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaloom.export import load
from metaloom.export.trained import Trained


class Served:
    """A model that MLflow asks for predictions."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    def predict(self, model_input: NDArray[Any], params: dict[str, Any] | None = None) -> NDArray[Any]:
        """The outputs where adaptation starts `[N, ..., V]`: see `Trained.outputs`.

        Args:
            model_input: images, arrays or tokens `[N, ...]`, as the signature says.
            params: none are known.
        """
        return self._trained.outputs(torch.from_numpy(np.array(model_input))).numpy()


def _load_pyfunc(path: str) -> Served:
    return Served(load(path))
