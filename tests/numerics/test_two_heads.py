"""A decoder of transformers with a head for classes beside its own, which rehearsal of texts reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.losses import CrossEntropy
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.models.hugging_face import OfTransformers, make_model
from tests.numerics.hugging_face_problems import CASES, NUM_CLASSES, examples
from tests.numerics.problems import assert_gradients_agree, last, perturbed

KINDS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "GPT-2": (GPT2LMHeadModel, GPT2ForSequenceClassification),
    "Llama": (LlamaForCausalLM, LlamaForSequenceClassification),
}
RTOL = 1e-6  # norms of Llama compute in float32
every_decoder = pytest.mark.parametrize("case", KINDS)


def with_two_heads(case: str) -> OfTransformers:
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        CASES[case][0].save_pretrained(name)
        torch.manual_seed(1)
        model = make_model(
            Path(name), "sequence-classification", num_outputs=NUM_CLASSES, keeps_language_head=True
        )
        model.double().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def structure_of(model: OfTransformers) -> Structure:
    assert model.language_head_name is not None
    heads = {"classification": model.head_name, "language_modelling": model.language_head_name}
    return Structure(model.block_names, heads, model.embedding_name)


@every_decoder
def test_each_head_says_what_transformers_own_class_says(case: str) -> None:
    model = with_two_heads(case)
    language, classes = KINDS[case]
    weights = model.state_dict()
    config = CASES[case][0]
    config.num_labels = NUM_CLASSES
    own, other = language(config).double().eval(), classes(config).double().eval()
    own.load_state_dict({name: value for name, value in weights.items() if name != "score.weight"})
    other.load_state_dict({name: value for name, value in weights.items() if not name.startswith("lm_head")})
    tokens = examples(f"{case}, classes", 1, 3, seed=0)["inputs"][0]
    whole = tokens.clamp(min=0)
    torch.testing.assert_close(
        model(whole, "language_modelling"), own(input_ids=whole).logits, rtol=RTOL, atol=1e-7
    )
    other.config.pad_token_id = None
    expected = torch.cat([other(input_ids=row[row >= 0][None]).logits for row in tokens])
    torch.testing.assert_close(model(tokens, "classification"), expected, rtol=RTOL, atol=1e-7)


@every_decoder
def test_hypergradients_with_rehearsal_of_texts_are_those_of_the_whole_graph(case: str) -> None:
    model = with_two_heads(case)
    adapter = LoraAdapter(
        model,
        targets="all-linear",
        rank=2,
        alpha=4,
        generator=torch.Generator().manual_seed(3),
        whole_modules=["score"],
        structure=structure_of(model),
    )
    assert not any("lm_head" in name for name in adapter.init({}, 1))
    learner = Learner(
        adapter,
        Precision("float64"),
        rehearsal=Rehearsal(ratio=0.3, num_samples=1, criterion=CrossEntropy(), head="language_modelling"),
        head="classification",
    )
    unroll = Unroll(learner, Sgd(), Rates(0.2, "none", 2), last(2))
    meta = perturbed(adapter.meta_parameters(init=True, backbone=True), scale=0.3)
    batch = TaskBatch(
        (0, 1),
        examples(f"{case}, classes", 2, 3, seed=4),
        examples(f"{case}, classes", 2, 2, seed=5),
        rehearsal=examples(case, 2, 2, seed=6),
    )
    found = {
        name: HYPERGRADIENTS[name]().meta_gradient(unroll, meta, batch).gradient
        for name in ("unrolled", "rematerialized", "mixed_mode")
    }
    expected: dict[str, Tensor] = found["unrolled"]
    # It is through rehearsal alone that the language model's head matters.
    if "backbone.lm_head.weight" in expected:
        assert expected["backbone.lm_head.weight"].abs().max() > 1e-6
    for name in ("rematerialized", "mixed_mode"):
        assert_gradients_agree(found[name], expected, rtol=1e-4 if case == "Llama" else 1e-9)


def test_an_encoder_has_no_such_head(tmp_path: Path) -> None:
    config, _ = CASES["BERT"]
    assert isinstance(config, BertConfig)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification is no decoder"):
        make_model(tmp_path, "sequence-classification", num_outputs=2, keeps_language_head=True)
