"""What a user takes away: a PEFT adapter, a Hugging Face folder, a safetensors file, an MLflow model.

    from metaloom.export import load

    trained = load("runs/stdlib-lora/export/safetensors")
    logits = trained.outputs(tokens)

Imports without torch: the command line asks `formats` what a recipe's result can be written as.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from metaloom.export.trained import Trained


def load(folder: str | Path) -> Trained:
    """What a folder of format `safetensors` holds, ready to predict and to adapt, on the CPU.

    Raises:
        CheckpointError: the folder holds no such model, or one that this version cannot read.
    """
    from metaloom.export.plain import read

    return read(Path(folder))


def load_backbone(folder: str | Path) -> nn.Module:
    """The model that a folder of format `peft` is an adapter for, on the CPU: what
    `PeftModel.from_pretrained` is given in front of the folder.

    Raises:
        CheckpointError: the folder holds no such adapter, or its backbone cannot be read.
    """
    from metaloom.export.peft import read_backbone

    return read_backbone(Path(folder))
