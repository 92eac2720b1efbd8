"""Soft prompts: vectors in front of a text, one set per task."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.precision import Precision
from metaloom.models.gpt import PAD, Gpt
from tests.numerics.kinds_of_tasks import NUM_PROMPT, NUMBERS, Kind, Setting, problem_of
from tests.numerics.test_tasks_side_by_side import with_other_data


def by_hand(model: Gpt, prompt: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Hidden states `[L, D]` of one text without its padding, written out layer by layer, attention
    included."""
    vectors = torch.cat([prompt, model.token_embedding.weight[tokens[:length]]])
    hidden = vectors + model.position_embedding.weight[: len(vectors)]
    mask = torch.ones(len(vectors), len(vectors), dtype=torch.bool).tril()
    for number in range(len(model.blocks)):
        part = functools.partial(_part, model, f"blocks.{number}")
        query, key, value = (
            projected.view(len(vectors), 2, -1).transpose(0, 1)
            for projected in part("attention.qkv", part("norm_attention", hidden)).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        hidden = hidden + part("attention.proj", mixed.transpose(0, 1).flatten(1))
        hidden = hidden + part("mlp.fc_out", F.gelu(part("mlp.fc_in", part("norm_mlp", hidden))))
    normed: Tensor = model.norm(hidden)
    return normed[NUM_PROMPT:]


def _part(model: Gpt, block: str, name: str, inputs: Tensor) -> Tensor:
    output: Tensor = model.get_submodule(f"{block}.{name}")(inputs)
    return output


def test_logits_of_tokens_and_classes_are_those_of_a_forward_pass_by_hand() -> None:
    kinds: tuple[Kind, ...] = ("tokens", "sequences")
    for kind in kinds:
        problem = problem_of(Setting(kind, "soft_prompt"), NUMBERS, is_padded=True)
        model, learner = problem.model, problem.unroll.learner
        assert isinstance(model, Gpt)
        fast = learner.init({}, 3)
        generator = torch.Generator().manual_seed(0)
        name = "token_embedding.soft_prompt"
        fast = {name: fast[name] + torch.randn(fast[name].shape, generator=generator, dtype=torch.float64)}
        losses, _ = learner.losses("query", {}, fast, problem.batch, 0)
        for task in range(3):
            each = []
            for tokens, target in zip(
                problem.batch.query["inputs"][task], problem.batch.query["targets"][task], strict=True
            ):
                length = int((tokens != PAD).sum())
                hidden = by_hand(model, fast[name][task], tokens, length)
                if kind == "tokens":
                    each.append(F.cross_entropy(model.head(hidden), target[:length]))
                else:
                    each.append(F.cross_entropy(model.classifier(hidden[-1]), target))
                if len(each) == int(problem.batch.query["weights"][task].sum()):
                    break
            # The same sums, in another order.
            torch.testing.assert_close(losses[task], torch.stack(each).mean(), rtol=1e-12, atol=0)


def test_a_prompt_moves_what_is_said_of_every_token() -> None:
    problem = problem_of(Setting("tokens", "soft_prompt"), (3,), is_padded=False)
    adapter = problem.unroll.learner.adapter
    tokens = problem.batch.support["inputs"].clamp(min=0)
    fast = adapter.init({}, 1)
    others = {name: value + torch.arange(value.shape[-1]) for name, value in fast.items()}
    forward_pass = ForwardPass(Precision("float64"), tokens.device, head="language_modelling")
    one, other = (adapter.forward({}, each, tokens, forward_pass).features for each in (fast, others))
    assert one.shape[:3] == tokens.shape
    assert bool(((one - other).abs().amax(-1) > 1e-6).all())


def test_changing_one_tasks_data_leaves_the_other_tasks_bit_for_bit() -> None:
    problem = problem_of(Setting("tokens", "soft_prompt"), NUMBERS, is_padded=True)
    learner = problem.unroll.learner
    fast = learner.init({}, 3)
    changed = with_other_data(problem.batch, 1)
    before, _ = learner.losses("support", {}, fast, problem.batch, 0)
    after, _ = learner.losses("support", {}, fast, changed, 0)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_a_prompt_starts_at_the_embeddings_of_tokens_drawn_from_the_seed() -> None:
    problem, again = (problem_of(Setting("tokens", "soft_prompt"), (3,), is_padded=False) for _ in range(2))
    assert isinstance(problem.model, Gpt)
    (start,) = problem.unroll.learner.init({}, 1).values()
    (same,) = again.unroll.learner.init({}, 1).values()
    assert torch.equal(start, same)
    embeddings = problem.model.token_embedding.weight
    for vector in start[0]:
        assert bool((embeddings == vector).all(1).any())
