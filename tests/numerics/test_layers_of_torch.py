"""Models made of torch's own layers: right by every exact estimator, or refused by name.

Shape letters: T tasks, N sequences, L tokens, D width, V vocabulary, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.kernels import written_out_group_norm, written_out_mish
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll, adapt
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, perturbed
from tests.numerics.token_problems import distance

VOCABULARY, TOKENS, WIDTH, NUM_TASKS = 7, 5, 8, 2
Tasks = Literal["loop", "vmap"]
TASKS: tuple[Tasks, ...] = ("loop", "vmap")


class Stack(nn.Module):
    """Tokens `[N, L]`, embedded, through one layer `[N, L, D] -> [N, L, D]`, to logits `[N, L, V]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = layer
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.layer(self.embedding(tokens))
        logits: Tensor = self.head(features[0] if isinstance(features, tuple) else features)
        return logits


class Attention(nn.Module):
    """nn.MultiheadAttention of a sequence to what came before in it."""

    def __init__(self, *, need_weights: bool, dropout: float = 0.0, add_bias_kv: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, dropout=dropout, add_bias_kv=add_bias_kv, batch_first=True
        )
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        attended: Tensor = self.attention(x, x, x, need_weights=self.need_weights, attn_mask=mask)[0]
        return attended


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.layer(x, x)
        return decoded


class OfChannels(nn.Module):
    """A linear layer, then a norm `[N, D, L] -> [N, D, L]`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x).transpose(1, 2))).transpose(1, 2)


class Then(nn.Module):
    """A linear layer, then a function `[N, L, D] -> [N, L, D]`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", torch.linspace(0.5, 2.0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.get_buffer("slopes"))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.detach()[:, :, 0].argsort(dim=1)
        return torch.tanh(self.bag(tokens))[:, None, :] + x


def encoder(
    *, norm_first: bool = False, activation: str = "relu", dropout: float = 0.0
) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        WIDTH, 2, WIDTH, dropout=dropout, activation=activation, norm_first=norm_first, batch_first=True
    )


def losing(x: Tensor) -> Tensor:
    """x times a cross-entropy of its own."""
    targets = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    losses = F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none")
    return x * losses.view(*x.shape[:-1], 1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "TransformerEncoderLayer": encoder,
    "TransformerEncoderLayer, eval, gelu, norm first": lambda: encoder(
        norm_first=True, activation="gelu"
    ).eval(),
    "TransformerEncoder, eval": lambda: nn.TransformerEncoder(encoder(), 2).eval(),
    "TransformerDecoderLayer": Decoder,
    "MultiheadAttention": lambda: Attention(need_weights=False),
    "MultiheadAttention with its weights, dropout": lambda: Attention(need_weights=True, dropout=0.4),
    "MultiheadAttention with a bias of keys": lambda: Attention(need_weights=False, add_bias_kv=True),
    "GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "LSTM": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "EmbeddingBag": Bag,
    "softmax": lambda: Then(lambda x: F.softmax(x, dim=-1)),
    "log_softmax": lambda: Then(lambda x: F.log_softmax(x, dim=-1)),
    "cross_entropy": lambda: Then(losing),
    "mish": lambda: Then(F.mish),
    "silu": lambda: Then(F.silu),
    "LayerNorm": lambda: Then(nn.LayerNorm(WIDTH)),
    "RMSNorm": lambda: Then(nn.RMSNorm(WIDTH)),
    "GroupNorm": lambda: OfChannels(nn.GroupNorm(2, WIDTH)),
    "GroupNorm without weights": lambda: OfChannels(nn.GroupNorm(2, WIDTH, affine=False)),
    "InstanceNorm": lambda: OfChannels(nn.InstanceNorm1d(WIDTH, affine=True)),
    "BatchNorm": lambda: OfChannels(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "BatchNorm, eval": lambda: OfChannels(nn.BatchNorm1d(WIDTH)).eval(),
    "a buffer": WithBuffer,
    # Refused.
    "attention dropout": lambda: encoder(dropout=0.1),
    "BatchNorm with running statistics": lambda: OfChannels(nn.BatchNorm1d(WIDTH)),
    "InstanceNorm with running statistics": lambda: OfChannels(
        nn.InstanceNorm1d(WIDTH, track_running_stats=True)
    ),
    "hardsigmoid": lambda: Then(F.hardsigmoid),
}
RUNNING = r"the model calls torch\.nn\.functional\.{} with running statistics, .*track_running_stats=False"
# What is refused, by estimator and by how tasks are put side by side; "" for any.
REFUSED: dict[tuple[str, str, str], str] = {
    ("attention dropout", "", ""): r"attention dropout \(0\.1\) inside a fused kernel",
    ("BatchNorm with running statistics", "", ""): RUNNING.format("batch_norm"),
    ("InstanceNorm with running statistics", "", ""): RUNNING.format("instance_norm"),
    ("MultiheadAttention with its weights, dropout", "", "vmap"): "dropout is not drawn inside vmap",
    ("GRU", "", "vmap"): r"for all tasks at once: torch\.func\.vmap knows nothing of aten::gru\.input; set "
    "adaptation.fast.tasks to loop",
    ("LSTM", "", "vmap"): r"torch\.func\.vmap knows nothing of aten::lstm\.input",
    (
        "EmbeddingBag",
        "mixed_mode",
        "",
    ): "no forward-mode derivative of _embedding_bag, .* take rematerialized",
    ("EmbeddingBag", "", ""): "no derivative of _embedding_bag_backward, .* can be differentiated twice",
    ("hardsigmoid", "mixed_mode", ""): "no forward-mode derivative of aten::hardsigmoid_backward",
    ("hardsigmoid", "", ""): "no derivative of aten::hardsigmoid_backward",
}


def refusal(layer: str, estimator: str, tasks: Tasks) -> str | None:
    for key in ((layer, estimator, ""), (layer, "", tasks), (layer, "", "")):
        if key in REFUSED:
            return REFUSED[key]
    return None


def problem(layer: str, tasks: Tasks, *, recompute_blocks: bool = False) -> Problem:
    """Sequences of tokens, every weight fast, two inner steps, a query loss after each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Stack(LAYERS[layer]()).double()
    adapter = FullAdapter(model, structure=Structure(("layer",), "head"), tasks=tasks)
    generator = torch.Generator().manual_seed(2)

    def part(num_sequences: int) -> dict[str, Tensor]:
        tokens = torch.randint(VOCABULARY, (NUM_TASKS, num_sequences, TOKENS + 1), generator=generator)
        return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}

    rates = Rates(0.2, "per_tensor", 2)
    learner = Learner(adapter, Precision("float64"), recompute_blocks=recompute_blocks)
    unroll = Unroll(learner, Sgd(momentum=0.6), rates, (0.0, 0.4, 1.0))
    meta = adapter.meta_parameters(init=True, backbone=False) | rates.meta_parameters(adapter.init({}, 1))
    batch = TaskBatch((3, 8), part(2), part(3))
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)


def gradient(problem: Problem, estimator: str) -> dict[str, Tensor]:
    result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
    return result.gradient


def meta_loss(problem: Problem, meta: dict[str, Tensor]) -> float:
    """By forward passes and inner steps without a graph."""
    total = 0.0
    for step, at in enumerate(adapt(problem.unroll, meta, problem.batch, num_steps=2)):
        with torch.no_grad():
            losses, _ = problem.unroll.learner.losses("query", meta, at.fast, problem.batch, step)
        total += problem.unroll.step_weights[step] * float(losses.sum())
    return total


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of embedding_bag under vmap
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_of_a_layer_is_right_by_every_exact_estimator_or_refused_by_name(
    layer: str, tasks: Tasks
) -> None:
    gradients = {}
    for estimator in ("unrolled", "rematerialized", "mixed_mode"):
        message = refusal(layer, estimator, tasks)
        if message is not None:
            with pytest.raises(CapabilityError, match=message):
                gradient(problem(layer, tasks), estimator)
        else:
            gradients[estimator] = gradient(problem(layer, tasks), estimator)
    for found in gradients.values():
        # The same sums in another order.
        assert distance(found, gradients["unrolled"]) < 1e-9


@pytest.mark.parametrize("layer", [name for name in LAYERS if refusal(name, "unrolled", "loop") is None])
def test_the_whole_graph_agrees_with_differences_and_with_blocks_computed_again(layer: str) -> None:
    whole = problem(layer, "loop")
    expected = gradient(whole, "unrolled")
    direction = perturbed({name: torch.zeros_like(value) for name, value in whole.meta.items()}, scale=1.0)
    slope = sum(float((expected[name] * value).sum()) for name, value in direction.items())
    ahead, behind = (
        meta_loss(whole, {name: value + 1e-5 * sign * direction[name] for name, value in whole.meta.items()})
        for sign in (1.0, -1.0)
    )
    # Third derivatives, times the square of the distance; a lost term is of the order of 1e-2.
    assert (ahead - behind) / 2e-5 == pytest.approx(slope, rel=1e-4)
    for estimator in ("rematerialized", "mixed_mode"):
        if refusal(layer, estimator, "loop") is None:
            again = gradient(problem(layer, "loop", recompute_blocks=True), estimator)
            assert distance(again, expected) < 1e-9


def test_loop_and_vmap_are_the_same_for_a_transformer_of_torch() -> None:
    loop, vmap = (gradient(problem("TransformerEncoderLayer", tasks), "unrolled") for tasks in TASKS)
    assert distance(vmap, loop) < 1e-9


def test_attention_inside_a_layer_of_torch_keeps_its_fused_kernel_where_that_suffices() -> None:
    layer, x = Attention(need_weights=False).double(), torch.ones(2, TOKENS, WIDTH, dtype=torch.float64)
    outputs = []
    for derivative in ("once", "reverse"):
        forward_pass = ForwardPass(Precision("float64"), torch.device("cpu"), derivative)
        with Interception(forward_pass):
            outputs.append(layer(x))
    fused, twice = outputs
    assert "FlashAttention" in graph_of(fused)
    assert "FlashAttention" not in graph_of(twice)
    assert "_AttentionBackward" in graph_of(twice)


def graph_of(output: Tensor) -> str:
    """The names of the nodes that a tensor hangs on."""
    waiting, names = [output.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(node.name())
            waiting += [following for following, _ in node.next_functions]
    return " ".join(names)


def test_written_out_forms_are_the_functions_that_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 4, 2, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    for w, b in ((None, None), (weight, None), (weight, bias)):
        torch.testing.assert_close(
            written_out_group_norm(x, 3, w, b, 1e-3), F.group_norm(x, 3, w, b, 1e-3), rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(written_out_mish(x), F.mish(x), rtol=1e-12, atol=1e-12)
    half = x.to(torch.bfloat16)
    # Both round to bfloat16 once.
    torch.testing.assert_close(written_out_group_norm(half, 3), F.group_norm(half, 3), rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="divisible"):
        written_out_group_norm(x, 4)
