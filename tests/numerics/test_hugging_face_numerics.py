"""Models of transformers under the engine, against PEFT's LoRA layers and plain automatic differentiation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM

from metaloom.engine.adapters.base import BACKBONE, INIT
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import uses_of
from metaloom.engine.adapters.soft_prompt import SoftPromptAdapter
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from tests.numerics.hugging_face_problems import CASES, examples, small_model, structure_of
from tests.numerics.problems import assert_gradients_agree, last, logits_of, perturbed, relative_error

# PEFT asks transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NUM_TASKS, RANK, ALPHA, RATE = 2, 2, 6, 0.2
# Whose RMS norms compute in float32 whatever their weights are.
SINGLE = {"Llama", "Llama, classes", "Llama, features", "Qwen"}
CLASSES: dict[str, Any] = {"GPT-2": GPT2LMHeadModel, "Llama": LlamaForCausalLM, "Qwen": Qwen2ForCausalLM}
all_cases = pytest.mark.parametrize("case", CASES)
EXACT = ("unrolled", "rematerialized", "mixed_mode")


def adapter_of(case: str, *, with_head: bool = False) -> LoraAdapter:
    """Rank 2 on all linear layers but the head, which is fast in whole or not at all."""
    model = small_model(case)
    return LoraAdapter(
        model,
        targets="all-linear",
        rank=RANK,
        alpha=ALPHA,
        generator=torch.Generator().manual_seed(3),
        rank_stabilized=with_head,
        whole_modules=[model.head_name] if with_head else (),
        structure=structure_of(model),
    )


def peft_model(case: str, *, with_head: bool = False) -> tuple[nn.Module, dict[str, str]]:
    """The same in PEFT, and its parameters' names by those of the fast weights."""
    model = small_model(case)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        # PEFT leaves out a language model's head itself.
        exclude_modules=None if CASES[case][1] == "causal-lm" else [model.head_name],
        use_rslora=with_head,
        modules_to_save=[model.head_name] if with_head else None,
        fan_in_fan_out=case.startswith("GPT-2"),
    )
    wrapped = get_peft_model(model, config).double().eval()
    names = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".lora_a")
        .replace(".lora_B.default.weight", ".lora_b")
        .replace(".modules_to_save.default", ""): name
        for name, _ in wrapped.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }
    return wrapped, names


def names_of_shared(case: str, wrapped: nn.Module) -> dict[str, str]:
    """The names in PEFT of what tasks share, by our own; but for biases of keys, which change nothing where
    keys are not turned by their place."""
    there = dict(wrapped.named_parameters())
    found = {}
    for name, _ in small_model(case).named_parameters():
        if name.endswith((".key.bias", ".k_proj.bias")) and case.startswith(("BERT", "ViT")):
            continue
        layer, _, kind = name.rpartition(".")
        beneath = f"base_model.model.{layer}.base_layer.{kind}"
        found[name] = beneath if beneath in there else f"base_model.model.{name}"
    assert set(found.values()) <= there.keys()
    return found


@pytest.mark.parametrize(
    ("case", "with_head"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES if CASES[case][1] != "causal-lm")],
)
def test_outputs_and_gradients_of_each_task_are_those_of_pefts_layers(case: str, with_head: bool) -> None:
    adapter = adapter_of(case, with_head=with_head)
    model, names = peft_model(case, with_head=with_head)
    fast = perturbed(adapter.init({}, NUM_TASKS), scale=0.3)
    assert fast.keys() == names.keys()
    inputs = examples(case, NUM_TASKS, 3, seed=2)["inputs"]
    leaves = [value.requires_grad_() for value in fast.values()]
    found = logits_of(adapter, {}, fast, inputs)
    expected = torch.stack(
        [
            functional_call(
                model, {names[name]: value[task] for name, value in fast.items()}, (inputs[task],)
            )
            for task in range(NUM_TASKS)
        ]
    )
    # W x + s B A x in one order or the other: rounding.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(8), dtype=found.dtype)
    for name, one, other in zip(
        fast,
        torch.autograd.grad((found * cotangent).sum(), leaves),
        torch.autograd.grad((expected * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=f"{name} differs")


def layers_together(case: str) -> list[str]:
    """The parameters of which one pass of all tasks holds a copy per task: of embeddings, linear layers,
    convolutions and norms, of whatever class; but a position's vector is of no example, and a bias of keys
    changes nothing."""
    model = small_model(case)
    shared = {name for names in uses_of(model).values() if len(names) > 1 for name in names}
    names = []
    for owner, module in model.named_modules():
        if any(True for _ in module.children()) or "position_embeddings" in owner or "wpe" in owner:
            continue
        own = [f"{owner}.{name}" for name, _ in module.named_parameters()]
        if not case.startswith(("BERT", "ViT")):
            own = [name for name in own if not name.endswith((".key.bias", ".k_proj.bias"))]
        names += [name for name in own if name not in shared and "token_type" not in name]
    return names


@pytest.mark.parametrize("case", ["GPT-2", "Llama", "BERT", "ViT"])
def test_one_pass_of_tasks_with_layers_of_their_own_equals_the_loop_over_tasks(case: str) -> None:
    batch = TaskBatch(
        tuple(range(NUM_TASKS)),
        support=examples(case, NUM_TASKS, 3, seed=4),
        query=examples(case, NUM_TASKS, 2, seed=5),
    )
    for estimator in EXACT:
        gradients = []
        for tasks in ("together", "loop"):
            model = small_model(case)
            adapter = PartAdapter(
                model, names=layers_together(case), tasks=tasks, structure=structure_of(model)
            )
            rates = Rates(RATE, "none", 2)
            learner = Learner(adapter, Precision("float64"), recompute_blocks=tasks == "together")
            unroll = Unroll(learner, Sgd(), rates, last(2))
            meta = adapter.meta_parameters(init=True, backbone=True)
            gradients.append(HYPERGRADIENTS[estimator]().meta_gradient(unroll, meta, batch).gradient)
        together, loop = (
            torch.cat([value.flatten() for value in gradient.values()]) for gradient in gradients
        )
        assert relative_error(together, loop) < (1e-5 if case in SINGLE else 1e-9), estimator


@pytest.mark.parametrize("case", ["GPT-2", "Llama, classes", "BERT, features", "ViT"])
def test_tasks_of_fewer_examples_are_padded_and_stay_as_they_are_alone(case: str) -> None:
    adapter = adapter_of(case, with_head=CASES[case][1] != "causal-lm")
    unroll = Unroll(Learner(adapter, Precision("float64")), Sgd(), Rates(RATE, "none", 2), last(2))
    meta = perturbed(adapter.meta_parameters(init=True, backbone=True), scale=0.3)
    support, query = examples(case, NUM_TASKS, 3, seed=4), examples(case, NUM_TASKS, 2, seed=5)
    num_support = (1, 3)
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    padded = TaskBatch((0, 1), support | {"weights": weights}, query)
    together = MixedMode().meta_gradient(unroll, meta, padded).gradient
    alone = []
    for task, count in enumerate(num_support):
        part = {name: value[task : task + 1, :count] for name, value in support.items()}
        judged = {name: value[task : task + 1] for name, value in query.items()}
        alone.append(MixedMode().meta_gradient(unroll, meta, TaskBatch((task,), part, judged)).gradient)
    for name, value in together.items():
        torch.testing.assert_close(
            value,
            alone[0][name] + alone[1][name],
            rtol=1e-5 if case in SINGLE else 1e-9,
            atol=1e-9,
            msg=f"{name} differs",
        )


@pytest.mark.parametrize("case", ["GPT-2", "Llama", "Qwen"])
def test_soft_prompts_are_vectors_in_front_of_those_of_tokens(case: str) -> None:
    model = small_model(case)
    structure = structure_of(model)
    adapter = SoftPromptAdapter(
        model,
        num_tokens=3,
        start="normal",
        generator=torch.Generator().manual_seed(3),
        structure=structure,
    )
    (prompts,) = fast = perturbed(adapter.init({}, NUM_TASKS), scale=0.5)
    tokens = examples(case, NUM_TASKS, 2, seed=2)["inputs"]
    found = logits_of(adapter, {}, fast, tokens)
    assert structure.embedding is not None
    vectors = model.get_submodule(structure.embedding)(tokens)  # [T, N, L, D]
    for task, prompt in enumerate(fast[prompts]):
        shown = torch.cat([prompt.expand(2, -1, -1), vectors[task]], dim=1)
        # Its class as transformers has it.
        expected = CLASSES[case].forward(model, inputs_embeds=shown).logits[:, 3:]
        torch.testing.assert_close(found[task], expected, rtol=1e-6 if case in SINGLE else 1e-10, atol=1e-7)


@all_cases
def test_hypergradients_are_those_of_pefts_layers_by_plain_differentiation(case: str) -> None:
    """Of where LoRA starts, and of every weight that tasks share."""
    adapter, (model, names) = adapter_of(case), peft_model(case)
    shared = names_of_shared(case, model)
    unroll = Unroll(
        learner=Learner(adapter, Precision("float64")),
        rule=Sgd(),
        rates=Rates(RATE, "none", 2),
        step_weights=last(2),
    )
    meta = perturbed(adapter.meta_parameters(init=True, backbone=False), scale=0.3)
    backbone = adapter.meta_parameters(init=False, backbone=True)
    meta |= {BACKBONE + name: backbone[BACKBONE + name] for name in shared}
    batch = TaskBatch(
        tuple(range(NUM_TASKS)),
        support=examples(case, NUM_TASKS, 3, seed=4),
        query=examples(case, NUM_TASKS, 2, seed=5),
    )
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}

    def loss(fast: dict[str, Tensor], data: Mapping[str, Tensor], task: int) -> Tensor:
        weights = {names[name]: value for name, value in fast.items()}
        weights |= {own: leaves[BACKBONE + name] for name, own in shared.items()}
        logits = functional_call(model, weights, (data["inputs"][task],))
        return F.cross_entropy(logits.flatten(0, -2), data["targets"][task].flatten())

    total = torch.zeros((), dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for task in range(NUM_TASKS):
            fast = {name.removeprefix(INIT): value for name, value in leaves.items() if name.startswith(INIT)}
            for _ in range(2):
                gradients = torch.autograd.grad(
                    loss(fast, batch.support, task), list(fast.values()), create_graph=True
                )
                fast = {
                    name: value - RATE * gradient
                    for (name, value), gradient in zip(fast.items(), gradients, strict=True)
                }
            total = total + loss(fast, batch.query, task)
        expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    for name in EXACT:
        found = HYPERGRADIENTS[name]().meta_gradient(unroll, meta, batch).gradient
        assert_gradients_agree(found, expected, rtol=1e-5 if case in SINGLE else 1e-9)
    # A part of the backbone gets its own gradients, and the rest has none.
    some = adapter.meta_parameters(init=False, backbone=("*.0.*.weight",))
    assert 0 < len(some) < len(shared)
    learned = {name: value for name, value in meta.items() if name.startswith(INIT)} | some
    found = HYPERGRADIENTS["mixed_mode"]().meta_gradient(unroll, learned, batch).gradient
    assert_gradients_agree(
        found, {name: expected[name] for name in learned}, rtol=1e-5 if case in SINGLE else 1e-9
    )
