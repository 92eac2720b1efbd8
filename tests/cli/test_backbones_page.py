"""The way from a folder and a JSONL to a served adapter, as docs/backbones.md has it, word by word."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.commands import RECIPES, REPOSITORY, environment, run_well
from tests.hosts import free_port

pytestmark = pytest.mark.usefixtures("alone")

PAGE = REPOSITORY / "docs" / "backbones.md"
WORDS = [f"w{number}" for number in range(200)]
# So that it takes seconds.
SHORT = {
    "check": ["outer.tasks_per_step=2"],
    "train": [
        "outer.num_steps=6",
        "outer.tasks_per_step=2",
        "outer.schedule.warmup_steps=1",
        "validation.every_steps=3",
        "validation.num_episodes=2",
        "tracking=none",
    ],
    "evaluate": ["evaluation.num_episodes=4", "evaluation.baselines=[]"],
}


def section() -> str:
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"^## From a folder and a JSONL.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(0)


def commands() -> list[list[str]]:
    lines = re.findall(r"^    ((?:metaloom|mlflow|curl) .*)$", section(), flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def make_files(folder: Path) -> None:
    """A small encoder with its tokenizer, and texts of intents, each of which has words of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    draws = random.Random(0)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder / "models" / "encoder")
    tokenizer.save(str(folder / "models" / "encoder" / "tokenizer.json"))
    for name, num_intents in (("intents", 30), ("acme", 5)):
        lines = []
        for number in range(num_intents):
            own = draws.sample(WORDS, 6)
            for _ in range(8):
                text = " ".join(draws.choices(own, k=4) + draws.choices(WORDS, k=3))
                lines.append(json.dumps({"text": text, "intent": f"{name}-{number}"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipes").mkdir()
    shutil.copy(RECIPES / "encoder-lora.yaml", folder / "recipes")


def served(words: list[str], asked: list[str], folder: Path) -> Any:
    """What a server says, on a port that is free."""
    port = str(free_port())
    words = [port if word == "5001" else word for word in words[1:]]
    url = next(word for word in asked if word.startswith("http")).replace("5001", port)
    data = asked[asked.index("--data") + 1].encode()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "mlflow", *words],
        cwd=folder,
        env=environment() | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120.0
        while True:
            try:
                request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=30.0) as answer:
                    return json.load(answer)
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server never answered"
                time.sleep(0.3)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate()


def test_every_command_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    make_files(tmp_path)
    *own, serve, ask = commands()
    assert [words[1] for words in own] == ["data", "plan", "check", "train", "evaluate", "adapt", "adapt"]
    shown = [run_well(*words[1:], *SHORT.get(words[1], []), cwd=tmp_path) for words in own]
    assert "rematerialized is exact on this recipe" in shown[2]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section(), flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in {f"acme-{number}" for number in range(5)}
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / "runs")
    (row,) = served(serve, ask, tmp_path)["predictions"]
    assert len(row) == 5
