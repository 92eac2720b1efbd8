"""Every kind of data that can be packed can be trained on, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from metaloom.cli import main
from metaloom.export import load
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.sources import open_data, require_episodes
from metaloom.train import train

SPLITS = "train=0.5,validation=0.25,test=0.25"
IMAGES = "{kind: image, size: 12, channels: 3}"
CLASSES = f"{{kind: classes, url: birds, n_way: 2, n_shot: 1, n_query: 2, inputs: {IMAGES}}}"
VARIABLE = (
    f"{{kind: classes, url: birds, variable: {{min_way: 2, max_way: 3, max_support: 9}}, inputs: {IMAGES}}}"
)
OWN_HEAD = f"{{outer_ratio: 0.1, data: {{kind: classes, url: birds, num_classes: 4, inputs: {IMAGES}}}}}"
TEXT = "{kind: text, length: 24}"
CONV = "{kind: conv4, width: 2, num_blocks: 2}"
GPT = "{kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 24}"
USERS = (
    f"{{kind: groups, url: users, inputs: {TEXT}, targets: {{kind: class, num_classes: 2}}, "
    "num_support: 3, num_query: 2}"
)
RECIPE = """\
name: kinds
model: {kind: mlp, width: 4, num_layers: 1}
data:
  kind: groups
  url: waves
  inputs: {kind: array, shape: [1]}
  targets: number
  num_support: 3
  num_query: 2
adaptation:
  fast: {kind: full, tasks: loop}
  rule: {kind: sgd, lr: 0.01}
  num_steps: 2
algorithm: {hypergradient: rematerialized}
outer: {num_steps: 2, tasks_per_step: 3}
validation: {every_steps: 2, num_episodes: 2}
evaluation: {num_episodes: 3, tuning: {num_episodes: 2, rate_factors: [1.0]}}
tracking: none
"""
KINDS = {
    "regression by group": [],
    "regression by a neural process": ["algorithm=cnp"],
    "colour images": [f"model={CONV}", f"data={CLASSES}"],
    "varying ways and shots": [f"model={CONV}", f"data={VARIABLE}"],
    "kept labels": [f"model={CONV}", f"data={CLASSES}", "data.labels=kept"],
    "a mixture": [
        f"model={CONV}",
        f"data={{kind: mixture, parts: [{{data: {CLASSES}}}, {{data: {CLASSES}}}]}}",
    ],
    "rehearsal with a head of its own": [
        f"model={CONV}",
        f"data={CLASSES}",
        f"adaptation.rehearsal={OWN_HEAD}",
    ],
    "ready episodes": [
        "data={kind: episodes, url: tasks, inputs: {kind: array, shape: [2]}, "
        "targets: {kind: class, num_classes: 2}, num_support: 2, num_query: 4}",
    ],
    "sequence classification, texts rehearsed": [
        f"model={GPT}",
        f"data={USERS}",
        "adaptation.fast=lora",
        "adaptation.rehearsal={outer_ratio: 0.1, data: {kind: documents, url: books, sequence_length: 16}}",
    ],
    "a decoder of transformers that tells classes apart, texts rehearsed": [
        "model={hf: decoder, task: sequence-classification}",
        f"data={USERS}",
        "adaptation.fast={kind: lora, rank: 2, alpha: 4, targets: all-linear, modules_to_save: [score]}",
        "adaptation.rehearsal={outer_ratio: 0.1, data: {kind: documents, url: books, sequence_length: 16}}",
        "sharding=sharded",
        "memory.recompute_blocks=true",
    ],
    "sequence classification by a transformer over texts": [
        f"model={GPT}",
        f"data={USERS}",
        "adaptation.fast=lora",
        "algorithm={kind: attention_learner, width: 8}",
    ],
    "texts in shards": [
        f"model={GPT}",
        "data={kind: documents, url: books, num_support: 1, num_query: 1, sequence_length: 16}",
        "adaptation.fast=lora",
        "sharding=sharded",
        "memory.recompute_blocks=true",
    ],
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small data set of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    for split, classes in (("train", 4), ("validation", 3), ("test", 3)):
        for number in range(classes):
            place = folder / "pictures" / split / f"{split}{number}"
            place.mkdir(parents=True)
            for row in range(5):
                pixels = rng.integers(0, 256, (14, 13, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{row}.png")
    with (folder / "waves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("wave", "x", "y"))
        rows.writerows((f"wave{row % 16}", f"{rng.normal():.4f}", f"{rng.normal():.4f}") for row in range(96))
    with (folder / "users.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("user", "text", "label"))
        rows.writerows(
            (f"user{row % 16}", f"text {row} of it", ("good", "bad")[row // 16 % 2]) for row in range(96)
        )
    with (folder / "books.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"book {row} " + "and so on " * 9}) + "\n" for row in range(16))
    with (folder / "tasks.jsonl").open("w") as file:
        for _ in range(16):
            part = [{"input": rng.normal(size=2).tolist(), "target": ("a", "b")[row % 2]} for row in range(6)]
            file.write(json.dumps({"support": part[:2], "query": part[2:]}) + "\n")
    commands = (
        "images pictures birds",
        f"records waves.csv waves --task regression --input x --target y --group wave --split {SPLITS}",
        f"records users.csv users --input text --target label --group user --split {SPLITS} --split-by group",
        f"records books.jsonl books --task language-modelling --input text --split {SPLITS}",
        f"records tasks.jsonl tasks --task episodes --split {SPLITS}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            assert main(["data", "pack", *command.split(), "--processes", "1"]) == 0
    (folder / "recipe.yaml").write_text(RECIPE)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=256,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "decoder")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_data_is_packed_and_trained_on(
    kind: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(packed)
    folder = RunFolder(packed / "runs" / kind)
    folder.create()
    recipe = load_recipe("recipe.yaml", KINDS[kind])
    require_episodes(recipe, open_data(recipe))
    train(recipe, Place(folder, torch.device("cpu"), None, Shutdown()))
    metrics = metrics_of(folder)
    assert np.isfinite(metrics["validation_loss"])
    assert ("accuracy_after" in metrics) is (not kind.startswith("regression"))
    assert ("validation_log_likelihood" in metrics) is (kind == "regression by a neural process")
    assert ("rehearsal_loss_after" in metrics) is ("rehears" in kind)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_decoder_that_rehearsed_texts_is_exported_as_a_classifier(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(packed)
    run = packed / "runs" / "decoder"
    kind = KINDS["a decoder of transformers that tells classes apart, texts rehearsed"]
    assert main(["train", "recipe.yaml", *kind, "launcher.num_processes=2", "--run", str(run)]) == 0
    for name in ("peft", "safetensors"):
        assert main(["export", str(run), "--format", name]) == 0
    folder = run / "export" / "peft"
    tokens = torch.randint(1, 256, (4, 10), generator=torch.Generator().manual_seed(0))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "backbone").eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, load(run / "export" / "safetensors").outputs(tokens), rtol=0, atol=1e-5)


def test_ranks_and_their_workers_give_the_losses_of_one_process(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(packed)
    losses = []
    for name, overrides in (
        ("two-ranks", ["launcher.num_processes=2", "loading.num_workers=1"]),
        ("one-process", []),
    ):
        run = RunFolder(packed / "runs" / name)
        command = ["train", "recipe.yaml", f"model={CONV}", f"data={VARIABLE}", "precision.compute=float64"]
        assert main([*command, *overrides, "--run", str(run.path)]) == 0
        losses.append(metrics_of(run)["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)  # to rounding, and Adam's amplification of it


def metrics_of(folder: RunFolder) -> dict[str, float]:
    """The last value of each metric."""
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_a_regression_is_evaluated_by_its_squared_error(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(packed)
    assert main(["train", "recipe.yaml", "--run", "runs/regression"]) == 0
    code = main(["evaluate", "runs/regression"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "mean squared error after 2 adaptation steps on waves (test)" in out
    assert "ordinary, equal compute" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.inputs={kind: array, shape: [2]}"], "its shape is [1], and [2] is expected"),
        (
            [f"model={GPT}", f"data={USERS}", "data.url=books"],
            "has layout 'documents', and what is drawn here needs 'groups' or 'classes'",
        ),
        (
            [f"model={GPT}", f"data={USERS}", "data.url=waves"],
            "data.inputs.kind reads tokens.npy, txt, json, and samples of split 'train' of waves at waves "
            "have npy, target.npy",
        ),
        (["data.num_support=30"], "but the largest group of split 'train' of waves at waves has"),
        (
            [
                "data={kind: episodes, url: tasks, inputs: {kind: array, shape: [2]}, "
                "targets: {kind: class, num_classes: 2}, num_support: 3, num_query: 4}"
            ],
            "support: it has 2 examples, and 3 are expected",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_a_job_starts(
    overrides: list[str],
    message: str,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(packed)
    code = main(["train", "recipe.yaml", *overrides, "--run", "runs/refused"])
    assert code == 3
    assert message in capfd.readouterr().err
    assert not (packed / "runs/refused").exists()
