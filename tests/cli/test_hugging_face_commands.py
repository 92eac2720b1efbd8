"""From a folder of transformers to an adapter that PEFT loads beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from metaloom.cli import main
from metaloom.export import load, load_backbone
from tests.commands import RECIPES, run_well
from tests.packed import pictures

# Raised by transformers where PEFT looks at its models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("alone"),
]
SHORT = (
    "outer.num_steps=4",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=1",
    "outer.optimizer.lr=0.03",
    "validation.num_episodes=2",
    "validation.every_steps=2",
    "launcher.num_processes=2",
    "sharding=sharded",
    "memory.recompute_blocks=true",
    "tracking=none",
)


def test_a_language_model_in_shards_gets_an_adapter(
    stdlib: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=256,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    words = (
        f"model={{hf: {tmp_path / 'llama'}, task: causal-lm}}",
        "pretrain=null",
        "adaptation.fast={kind: lora, rank: 2, alpha: 8, targets: [q_proj, down_proj], rslora: true}",
        "data.sequence_length=24",
        "data.num_support=2",
        "data.num_query=2",
    )
    run_well(
        "train",
        RECIPES / "stdlib-lora.yaml",
        f"data.url={stdlib}",
        *words,
        *SHORT,
        "--run",
        "run",
        cwd=tmp_path,
    )
    run = tmp_path / "run"
    assert main(["export", str(run)]) == 0
    told = capfd.readouterr().out
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'llama'}')" in told
    folder = run / "export" / "peft"
    assert not (folder / "backbone").exists()
    tokens = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        found = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=tokens).logits
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    ours = load(run / "export" / "safetensors").outputs(tokens)
    torch.testing.assert_close(found, ours, rtol=0.0, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)

    text = tmp_path / "song.txt"
    text.write_text("round and round the garden, like a teddy bear; " * 8, encoding="utf-8")
    assert main(["adapt", str(run), str(text), "--steps", "8", "--output", str(tmp_path / "song")]) == 0
    before, after = json.loads((tmp_path / "song" / "card.json").read_text())["adapted"]["measures"][
        "query_loss"
    ]
    assert after < before
    stretches = torch.tensor(list(text.read_bytes()))
    stretches = stretches[: len(stretches) // 25 * 25].view(-1, 25)
    query = stretches[-round(len(stretches) / 4) :]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, str(tmp_path / "song"))(input_ids=query[:, :-1]).logits
    loss = F.cross_entropy(logits.double().flatten(0, 1), query[:, 1:].flatten())
    assert float(loss) == pytest.approx(after, abs=1e-5)


def test_a_classifier_of_images_is_adapted_with_its_head(glyphs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

    config = ViTConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=28,
        patch_size=7,
        num_channels=1,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")  # of no task: the head is new
    normalisation = '{"image_mean": [0.3], "image_std": [0.5]}'
    (tmp_path / "vit" / "preprocessor_config.json").write_text(normalisation)
    fast = "{kind: lora, rank: 2, alpha: 4, dropout: 0.2, modules_to_save: [classifier]}"
    words = (
        f"model={{hf: {tmp_path / 'vit'}, task: image-classification}}",
        f"adaptation.fast={fast}",
        "algorithm={kind: maml, hypergradient: mixed_mode, meta_parameters: {init: true, backbone: false}}",
        "data.n_way=3",
        "adaptation.rule={kind: sgd, lr: 0.5}",
    )
    run_well(
        "train", RECIPES / "smoke.yaml", f"data.url={glyphs}", *words, *SHORT, "--run", "run", cwd=tmp_path
    )
    run, output = tmp_path / "run", tmp_path / "adapted"
    task = pictures(glyphs, tmp_path / "task", 3)
    assert main(["adapt", str(run), str(task), "--steps", "20", "--output", str(output)]) == 0
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    start = AutoModelForImageClassification.from_pretrained(output / "backbone").eval()
    with torch.no_grad():
        plain = start(pixel_values=images).logits
        adapted = PeftModel.from_pretrained(start, str(output)).eval()(pixel_values=images).logits
    assert adapted.shape == (5, 3)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["modules_to_save"], saved["lora_dropout"]) == (["classifier"], 0.2)
    # The result of the run computes as its own adapter does.
    assert main(["export", str(run)]) == 0
    folder = run / "export" / "peft"
    again = AutoModelForImageClassification.from_pretrained(folder / "backbone").eval()
    with torch.no_grad():
        normalised = (images - 0.3) / 0.5
        found = PeftModel.from_pretrained(again, str(folder)).eval()(pixel_values=normalised).logits
        # The backbone beside the adapter still knows how images are normalised.
        loaded = PeftModel.from_pretrained(load_backbone(folder), str(folder)).eval()(images)
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    (tmp_path / "vit").rename(tmp_path / "gone")  # what is exported needs the folder no more
    ours = load(run / "export" / "safetensors").outputs(images)
    torch.testing.assert_close(found, ours, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(loaded, ours, rtol=0.0, atol=1e-5)
