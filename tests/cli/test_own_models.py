"""A module of one's own, by its import path: from a recipe to an adapter that PEFT loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from metaloom.cli import main
from metaloom.export import load, load_backbone
from tests.commands import RECIPES, run_well

# Raised by transformers where PEFT looks at its models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("alone"),
]
MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_outputs, width=16):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(28 * 28, width), nn.Linear(width, width)])
        self.last = nn.Linear(width, num_outputs)

    def forward(self, images):
        features = images.flatten(1)
        for layer in self.layers:
            features = torch.tanh(layer(features))
        return self.last(features)

def nothing(num_outputs, width):
    return {}
"""


def test_a_module_of_ones_own_is_trained_in_shards_and_exported(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    name = "own_models_of_a_test"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    words = [
        str(RECIPES / "smoke.yaml"),
        f"data.url={glyphs}",
        f"model={{kind: custom, factory: '{name}:Net', options: {{width: 12}}, head: last}}",
        "adaptation.fast={kind: lora, rank: 2, alpha: 4, targets: all-linear, modules_to_save: [last]}",
        "algorithm={kind: maml, meta_parameters: {init: true, backbone: ['layers.1.*']}}",
        "outer.num_steps=4",
        "outer.tasks_per_step=2",
        "outer.schedule.warmup_steps=1",
        "outer.lr_parts={backbone: 0.001, init.*lora_b: 0.05}",
        "validation.num_episodes=2",
        "validation.every_steps=2",
        "launcher.num_processes=2",
        "sharding=sharded",
        "memory.recompute_blocks=true",
        "tracking=none",
    ]
    run_well("train", *words, "--run", "run", cwd=tmp_path)
    run = tmp_path / "run"
    assert main(["export", str(run)]) == 0
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    folder = run / "export" / "peft"
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    trained = load(run / "export" / "safetensors")
    with torch.no_grad():
        model = PeftModel.from_pretrained(load_backbone(folder), str(folder)).eval()
        torch.testing.assert_close(model(images), trained.outputs(images), rtol=0.0, atol=1e-5)
    for word, told in (
        (f"model.factory={name}:No", f"model.factory: {name}:No cannot be imported: module"),
        ("model.options.widht=3", "(width, widht): got an unexpected keyword argument 'widht'"),
        ("model.head=first", "model.head: 'first' is no part of "),
        ("model.blocks=[layers.*, layers]", "model.blocks: layers.0 is inside layers, and both match"),
        ("model.context_length=8", "model.context_length: 8; has no effect, since the tasks' inputs are im"),
        ("model.factory=torch:tensor", "cannot be called with num_outputs"),
        (f"model.factory={name}:nothing", "returned a dict; it has to return a torch.nn.Module"),
        ("model.blocks=[block.*]", "model.blocks: 'block.*' matches no part of the model"),
    ):
        capfd.readouterr()
        assert main(["plan", *words, word]) != 0
        assert told in capfd.readouterr().err
