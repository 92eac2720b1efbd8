"""What `metaloom export` and `metaloom adapt` write, read back by those who are to read it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.build import build_sharding, task_batch
from metaloom.cli import main
from metaloom.contenders import meta_trained, newest_checkpoint
from metaloom.engine.learner import TaskBatch
from metaloom.export import load, load_backbone, plain
from metaloom.export.card import Card
from metaloom.export.trained import result_of_run
from metaloom.job import Place, Shutdown, open_job
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from metaloom.sources import episode_source
from tests.commands import RECIPES, run_well
from tests.in_process import trained
from tests.packed import pictures

SHORT = (
    "outer.num_steps=4",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=1",
    "validation.num_episodes=2",
    "validation.every_steps=2",
    "checkpoint={every_steps: 1, keep_last: 4}",
    "launcher.num_processes=2",
    "tracking=none",
)
TEXTS = (
    "model={kind: gpt, num_layers: 2, width: 16, num_heads: 2, context_length: 32}",
    "pretrain.num_steps=4",
    "pretrain.batch_size=4",
    "pretrain.warmup_steps=1",
    "data.sequence_length=24",
    "data.num_support=2",
    "data.num_query=2",
    "outer.lr_rates=0.1",
    "adaptation.rule={kind: adam, lr: 0.03, learned: per_tensor_per_step}",
    "outer.optimizer.lr=0.03",
    *SHORT,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, stdlib: Path) -> Path:
    """A run that has learned a LoRA initialisation, on two ranks, the backbone in shards."""
    folder = tmp_path_factory.mktemp("texts")
    sharded = ("sharding=sharded", "memory.recompute_blocks=true")
    words = (RECIPES / "stdlib-lora.yaml", f"data.url={stdlib}", "--run", "run", *TEXTS, *sharded)
    run_well("train", *words, cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, glyphs: Path) -> Path:
    """A run that has learned an initialisation of all weights and their rates."""
    folder = tmp_path_factory.mktemp("images")
    learns = (
        "outer.num_steps=60",
        "outer.tasks_per_step=4",
        "outer.optimizer.lr=1e-2",
        "outer.ema=0.9",
        "adaptation.rule.learned=per_tensor",
        "adaptation.rule.lr=0.4",
        "data.n_shot=3",
        "validation.every_steps=20",
        "adaptation.num_steps=3",
        "launcher.num_processes=1",
        "model.width=16",
    )
    words = (RECIPES / "smoke.yaml", f"data.url={glyphs}", "--run", "run", *SHORT, *learns)
    run_well("train", *words, cwd=folder)
    return folder / "run"


def evaluated(folder: Path, num_steps: int) -> tuple[TaskBatch, dict[str, Tensor]]:
    """Two test tasks, and their curves as `metaloom evaluate` measures them."""
    recipe = load_recipe(folder / "recipe.yaml")
    place = Place(RunFolder(folder), torch.device("cpu"), None, Shutdown())
    sharding = build_sharding(recipe, place.device)
    with open_job(recipe, place, sharding, is_training=False, first_step=None) as job:
        contender = meta_trained(job, newest_checkpoint(job))
        source = episode_source(recipe, job.data, "test", seed=7, num_steps=num_steps)
        episodes = [source.episode(number) for number in range(2)]
        batch = task_batch(recipe, episodes, place.device, num_steps=num_steps)
        return batch, contender.curve(contender.meta, batch, num_steps=num_steps)


def losses(logits: Tensor, targets: Tensor) -> float:
    """The mean cross-entropy of next tokens `[N, L]`, of logits `[N, L, V]`."""
    return float(F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()))


def first_losses(curves: dict[str, Tensor]) -> list[float]:
    return curves["loss"][:, 0].tolist()


@pytest.mark.usefixtures("alone")
def test_a_safetensors_folder_computes_as_an_evaluation_of_the_run_does(texts: Path, images: Path) -> None:
    for folder in (texts, images):
        assert main(["export", str(folder), "--format", "safetensors"]) == 0
        batch, curves = evaluated(folder, num_steps=5)
        trained = load(folder / "export" / "safetensors")
        loaded = trained.curve(batch, num_steps=5)
        assert loaded.keys() == curves.keys()
        for name, values in curves.items():
            torch.testing.assert_close(loaded[name], values, rtol=1e-6, atol=1e-6)
        assert not torch.equal(curves["loss"][:, 0], curves["loss"][:, -1])
        card = json.loads((folder / "export" / "safetensors" / "card.json").read_text())
        assert card["step"] == trained.step
        assert card["metrics"]["validation_loss"] > 0
        assert card["recipe"]["model"]["kind"] == trained.recipe.model.kind


@pytest.mark.usefixtures("alone")
def test_peft_computes_with_a_lora_initialisation_as_the_run_does(texts: Path) -> None:
    from peft import PeftModel

    assert main(["export", str(texts)]) == 0
    folder = texts / "export" / "peft"
    batch, curves = evaluated(texts, num_steps=0)
    backbone = load_backbone(folder)
    plain = backbone(batch.query["inputs"][0])
    model = PeftModel.from_pretrained(backbone, str(folder))
    with torch.no_grad():
        found = [
            losses(model(inputs), targets)
            for inputs, targets in zip(batch.query["inputs"], batch.query["targets"], strict=True)
        ]
        assert found == pytest.approx(first_losses(curves), abs=1e-6)
        assert main(["export", str(texts), "--format", "safetensors", "--replace"]) == 0
        ours = load(texts / "export" / "safetensors").outputs(batch.query["inputs"][0])
        torch.testing.assert_close(model(batch.query["inputs"][0]), ours, rtol=0.0, atol=1e-6)
    # The matrices have left where they started, at which they do nothing.
    assert not torch.allclose(plain, ours, atol=1e-5)


# Raised by transformers where PEFT looks at its models.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.usefixtures("alone")
def test_transformers_computes_with_the_model_as_the_run_does(texts: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    batch, curves = evaluated(texts, num_steps=0)
    assert main(["export", str(texts), "--format", "huggingface"]) == 0
    folder = texts / "export" / "huggingface"
    base = GPT2LMHeadModel.from_pretrained(folder)
    merged_folder = texts.parent / "merged"
    words = ["export", str(texts), "--format", "huggingface", "--merge", "--output", str(merged_folder)]
    assert main(words) == 0
    assert main(["export", str(texts), "--format", "safetensors", "--replace"]) == 0
    ours = load(texts / "export" / "safetensors")
    inputs, targets = batch.query["inputs"], batch.query["targets"]
    with torch.no_grad():
        for model in (
            PeftModel.from_pretrained(base, str(folder / "adapter")),
            GPT2LMHeadModel.from_pretrained(merged_folder),
        ):
            model.eval()
            logits = [model(inputs[task]).logits for task in range(2)]
            for task in range(2):
                torch.testing.assert_close(logits[task], ours.outputs(inputs[task]), rtol=0.0, atol=1e-6)
            found = [losses(logits[task], targets[task]) for task in range(2)]
            assert found == pytest.approx(first_losses(curves), abs=1e-6)


# Raised by MLflow about hints of its own when its models are imported.
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")
def test_mlflow_predicts_what_the_model_says(texts: Path, images: Path) -> None:
    import mlflow

    for folder in (texts, images):
        assert main(["export", str(folder), "--format", "mlflow"]) == 0
        model = mlflow.pyfunc.load_model(str(folder / "export" / "mlflow"))
        example = np.array(model.input_example)
        if example.dtype.kind == "f":
            example = np.random.default_rng(0).random((3, *example.shape[1:]), dtype=np.float32)
        else:
            example = np.random.default_rng(0).integers(0, 256, (3, 17))
        assert main(["export", str(folder), "--format", "safetensors", "--replace"]) == 0
        ours = load(folder / "export" / "safetensors").outputs(torch.from_numpy(example))
        np.testing.assert_allclose(model.predict(example), ours.numpy(), rtol=0, atol=1e-6)
        text = (folder / "export" / "mlflow" / "requirements.txt").read_text()
        assert f"torch=={torch.__version__.partition('+')[0]}" in text


def test_an_export_is_of_the_best_step_or_of_a_named_one_and_needs_no_data(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(texts, run, ignore=shutil.ignore_patterns("export"))
    recipe = (run / "recipe.yaml").read_text()
    url = load_recipe(run / "recipe.yaml").data.url  # type: ignore[union-attr]
    (run / "recipe.yaml").write_text(recipe.replace(url, str(tmp_path / "gone")))
    assert main(["export", str(run), "--format", "safetensors", "--step", "3"]) == 0
    assert "of outer step 3, moving average" in capfd.readouterr().out
    assert load(run / "export" / "safetensors-step-3").step == 3
    assert main(["export", str(run), "--step", "9"]) == 4
    assert "no checkpoint of outer step 9; it has those of 1, 2, 3, 4" in capfd.readouterr().err
    assert not list(run.glob("export/peft*"))
    words = ["export", str(run), "--format", "safetensors", "--step", "3"]
    assert main(words) == 5
    assert "already holds an export" in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    assert main([*words, "--output", str(tmp_path / "mine"), "--replace"]) == 5
    assert "is there, and is no export" in capfd.readouterr().err


def test_adapting_to_a_folder_of_images_is_told_and_its_result_predicts_them(
    images: Path, glyphs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = pictures(glyphs, tmp_path / "letters", 3)
    output = tmp_path / "adapted"
    assert main(["adapt", str(images), str(task), "--output", str(output), "--steps", "8"]) == 0
    told = capfd.readouterr().out
    assert "letters, before and after 8 inner steps" in told
    assert "of 36 examples" in told
    adapted = json.loads((output / "card.json").read_text())["adapted"]
    before, after = adapted["measures"]["query_accuracy"]
    assert after > before + 0.2
    assert adapted["classes"] == ["class 0", "class 1", "class 2"]
    # What was written starts where adaptation has ended.
    assert load(output).num_steps == 8


def test_adapting_to_a_text_writes_an_adapter_that_peft_computes_with(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    text = tmp_path / "song.txt"
    text.write_text("round and round the garden, like a teddy bear; " * 8, encoding="utf-8")
    output = tmp_path / "song"
    words = ["adapt", str(texts), str(text), "--steps", "12", "--output"]
    assert main([*words, str(output)]) == 0
    told = capfd.readouterr().out
    assert "bits per byte before" in told
    assert "retention" in told
    measures = json.loads((output / "card.json").read_text())["adapted"]["measures"]
    # As far as matrices behind a frozen head of small weights can bring it.
    assert measures["query_loss"][1] < measures["query_loss"][0] - 0.03
    tokens = torch.tensor(list(text.read_bytes()))
    stretches = tokens[: len(tokens) // 25 * 25].view(-1, 25)
    query = stretches[-round(len(stretches) / 4) :]
    model = PeftModel.from_pretrained(load_backbone(output), str(output))
    with torch.no_grad():
        found = losses(model(query[:, :-1]), query[:, 1:])
    assert found == pytest.approx(measures["query_loss"][1], abs=1e-6)
    assert main([*words, str(tmp_path / "alone"), "--no-rehearsal"]) == 0
    assert "retention" not in capfd.readouterr().out


def test_adapting_to_records_of_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ("outer.num_steps=3", "outer.tasks_per_step=2", "launcher.num_processes=1", "tracking=none")
    quiet = ("validation.every_steps=null", "adaptation.fast={kind: full, tasks: loop}")
    run = trained(load_recipe(RECIPES / "sinusoid-maml.yaml", (*few, *quiet)), tmp_path / "run")
    xs = np.linspace(-2.0, 2.0, 20)
    records = [{"x": x, "y": 2.0 * np.sin(x)} for x in xs]
    for name, part in (("shown", records[::2]), ("asked", records[1::2])):
        lines = "".join(f"{json.dumps(record)}\n" for record in part)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    columns = ["--input", "x", "--target", "y", "--steps", "30"]
    query = ["--query", str(tmp_path / "asked.jsonl")]
    assert main(["adapt", str(run), str(tmp_path / "shown.jsonl"), *columns, *query]) == 0
    assert "mean squared error before" in capfd.readouterr().out
    folder = run / "adapted" / "shown"
    before, after = json.loads((folder / "card.json").read_text())["adapted"]["measures"]["query_loss"]
    assert after < 0.5 * before
    asked = torch.tensor(xs[1::2], dtype=torch.float32)[:, None]
    errors = (load(folder).outputs(asked) - 2.0 * asked.sin()) ** 2
    assert float(errors.mean()) == pytest.approx(after, abs=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way",
    [
        ("algorithm=protonet",),
        ("algorithm=erm", "data.labels=kept", "model.norm=layer"),
        ("algorithm=cnp",),
        ("adaptation.head.init=zero", "adaptation.rule.learned=per_element"),
        ("adaptation.norms={weights: per_step, statistics: per_step}", "adaptation.num_steps=2"),
        ("adaptation.fast=head", "algorithm.meta_parameters.backbone=true", "regularisation=weights"),
        (
            "adaptation.fast={kind: msr, symmetry: {kind: dense, rank: 4}, tasks: loop}",
            "algorithm.meta_parameters.backbone=true",
        ),
    ],
)
def test_what_any_way_to_learn_has_left_reads_back(
    way: tuple[str, ...], glyphs: Path, tmp_path: Path
) -> None:
    few = ("outer.num_steps=2", "validation.every_steps=null", "launcher.num_processes=1", "tracking=none")
    recipe = load_recipe(RECIPES / "smoke.yaml", (f"data.url={glyphs}", *few, *way))
    run = trained(recipe, tmp_path / "run")
    result = result_of_run(RunFolder(run), recipe, None, pytest.fail)
    (tmp_path / "export").mkdir()
    plain.write(result, Card(recipe, result.step), tmp_path / "export")
    batch, curves = evaluated(run, num_steps=3)
    loaded = load(tmp_path / "export")
    found = loaded.curve(batch, num_steps=3)
    assert found.keys() == curves.keys()
    for name, values in curves.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6)
    if loaded.unroll is None:
        return
    # At adapted weights, too, the start is where it says.
    fast = {name: value + 0.1 for name, value in loaded.start().items()}
    moved = loaded.moved(fast, num_steps=2)
    torch.testing.assert_close(moved.start(), fast)
    inputs, learner = batch.query["inputs"][:1], loaded.unroll.learner
    with torch.no_grad():
        one_task = {name: value[None] for name, value in fast.items()}
        expected = learner.outputs(loaded.meta, one_task, inputs, 2)[0]
    torch.testing.assert_close(moved.outputs(inputs[0]), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--format", "peft"], 2, r"adaptation.fast is full. This run can be written as safetensors, mlflow"),
        (["--format", "huggingface"], 2, r"model.kind: conv4 has no counterpart in transformers"),
        (["--format", "onnx"], 2, r"--format onnx is none of peft, huggingface, safetensors, mlflow"),
        (["--merge"], 2, r"--merge puts a LoRA initialisation into .* it has no effect"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    images: Path, words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(images), *words]) == code
    assert re.search(message, capfd.readouterr().err)
