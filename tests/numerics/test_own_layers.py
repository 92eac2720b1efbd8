"""Models of one's own with parameters per task in one pass: as each task alone, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import norm_and_bias_parameters
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from metaloom.models.as_function import items_of_lists
from metaloom.models.gpt import Gpt
from tests.numerics.hugging_face_problems import examples, small_model, structure_of
from tests.numerics.problems import last, perturbed, relative_error

EXACT = ("unrolled", "rematerialized", "mixed_mode")
WIDTH, VOCABULARY, LENGTH = 4, 11, 6


class ScaledNorm(nn.Module):
    """With two vectors, and perhaps a gate beside its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor, *, gate: Tensor | None = None) -> Tensor:
        normed = self.weight * hidden / hidden.square().mean(-1, keepdim=True).add(1.0).sqrt() + self.bias
        return normed if gate is None else normed * torch.sigmoid(gate)


class Reader(nn.Module):
    """Tokens and positions, a gated norm, and a head that begins with a norm."""

    def __init__(self, *, positions_have_rows: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.norm = ScaledNorm(WIDTH)
        self.head = nn.Sequential(ScaledNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))
        self.positions_have_rows = positions_have_rows

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        embedded = self.tokens(tokens)
        hidden = embedded + self.positions(places[None] if self.positions_have_rows else places)
        logits: Tensor = self.head(self.norm(hidden=hidden, gate=embedded))
        return logits


def both_ways(
    model: nn.Module,
    names: list[str],
    batch: TaskBatch,
    estimator: str,
    *,
    structure: Structure,
    head_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The hypergradient with all tasks in one pass, and with one after the other."""
    found = []
    for tasks in ("together", "loop"):
        adapter = PartAdapter(model, names=names, tasks=tasks, structure=structure)
        learner = Learner(
            adapter,
            Precision("float64"),
            recompute_blocks=tasks == "together" and bool(structure.blocks),
            head_chunk=head_chunk if tasks == "together" else None,
        )
        unroll = Unroll(learner, Sgd(), Rates(0.3, "none", 2), last(2))
        meta = perturbed(adapter.meta_parameters(init=True, backbone=True), scale=0.1)
        gradient = HYPERGRADIENTS[estimator]().meta_gradient(unroll, meta, batch).gradient
        found.append(torch.cat([value.flatten() for value in gradient.values()]))
    return found[0], found[1]


def sequences(num_tasks: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (num_tasks, 2, LENGTH + 1), generator=generator)
    part = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    return TaskBatch(tuple(range(num_tasks)), part, part)


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("num_tasks", [1, 2, 3])  # 2 and 3 divide the positions, 4 numbers have T rows
@pytest.mark.parametrize("positions_have_rows", [False, True])
def test_positions_gated_norms_and_heads_with_norms_equal_the_loop(
    estimator: str, num_tasks: int, positions_have_rows: bool
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader(positions_have_rows=positions_have_rows).double()
    # Of the norms one vector is shared.
    names = ["tokens.weight", "positions.weight", "norm.weight", "head.0.bias", "head.1.weight"]
    for head_chunk in (None, 4):
        together, loop = both_ways(
            model,
            names,
            sequences(num_tasks),
            estimator,
            structure=Structure((), "head"),
            head_chunk=head_chunk,
        )
        assert relative_error(together, loop) < 1e-10


def test_a_norm_with_as_many_numbers_as_tasks_is_not_taken_for_one_per_task() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader(positions_have_rows=False).double()
    together, loop = both_ways(
        model, ["norm.weight"], sequences(WIDTH), "mixed_mode", structure=Structure((), "head")
    )
    assert relative_error(together, loop) < 1e-10


@pytest.mark.parametrize("length", [4, 6])
def test_positions_of_the_built_in_gpt_equal_the_loop(length: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gpt(num_layers=1, width=8, num_heads=2, context_length=6, tied_embeddings=False).double()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(20, (2, 2, length + 1), generator=generator)
    part = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    names = ["position_embedding.weight", "blocks.0.mlp.fc_in.weight"]
    together, loop = both_ways(
        model, names, TaskBatch((0, 1), part, part), "mixed_mode", structure=Structure(("blocks.0",), "head")
    )
    assert relative_error(together, loop) < 1e-10


@pytest.mark.parametrize("recompute_blocks", [False, True])
def test_features_of_padded_texts_are_the_same_where_blocks_are_computed_again(
    recompute_blocks: bool,
) -> None:
    case = "Llama, features"
    losses = []
    for recomputed in (False, True):
        model = small_model(case)
        adapter = LoraAdapter(
            model,
            targets="all-linear",
            rank=2,
            alpha=4,
            generator=torch.Generator().manual_seed(3),
            structure=structure_of(model),
        )
        learner = Learner(adapter, Precision("float64"), recompute_blocks=recomputed)
        unroll = Unroll(learner, Sgd(), Rates(0.2, "none", 2), last(2))
        meta = perturbed(adapter.meta_parameters(init=True, backbone=True), scale=0.2)
        batch = TaskBatch((0, 1), examples(case, 2, 3, seed=4), examples(case, 2, 2, seed=5))
        found = HYPERGRADIENTS["mixed_mode"]().meta_gradient(unroll, meta, batch)
        losses.append(torch.cat([value.flatten() for value in found.gradient.values()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)


class Pairs(nn.Module):
    """Layers that are lists, whose items are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2)])
        self.last = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            for layer in pair:
                inputs = torch.tanh(layer(inputs))
        outputs: Tensor = self.last(inputs)
        return outputs


def test_blocks_are_what_is_called() -> None:
    assert items_of_lists(Pairs()) == ("layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1")


def test_what_is_adapted_in_a_block_that_is_never_called_is_refused() -> None:
    model = Pairs().double()
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    part = {"inputs": inputs, "targets": torch.zeros(2, 4, dtype=torch.int64)}
    good, bad = Structure(items_of_lists(model), "last"), Structure(("layers.0", "layers.1"), "last")
    for structure in (good, bad):
        adapter = LoraAdapter(
            model, targets="all-linear", rank=1, alpha=1, generator=torch.Generator(), structure=structure
        )
        learner = Learner(adapter, Precision("float64"))
        fast = {name: value.requires_grad_() for name, value in adapter.init({}, 2).items()}
        if structure is good:
            losses, _ = learner.losses("support", {}, fast, TaskBatch((0, 1), part, part), 0)
            assert losses.requires_grad
        else:
            with pytest.raises(CapabilityError, match=r"layers\.0 is named as a block and never called"):
                learner.losses("support", {}, fast, TaskBatch((0, 1), part, part), 0)


def test_biases_of_transposed_layers_are_biases() -> None:
    names = norm_and_bias_parameters(small_model("GPT-2"), norms=False, biases=True)
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert not any("ln_" in name for name in names)


class Summed(nn.Module):
    """`torch.addmm` with all that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1, 2))
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.scale = nn.LayerNorm(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(input=self.bias, mat1=self.scale(inputs), mat2=self.weight, beta=0.5, alpha=2.0)


def test_a_sum_and_product_that_no_task_has_of_its_own_is_torchs() -> None:
    model = Summed().double()
    adapter = PartAdapter(model, names=["scale.weight"])
    inputs = torch.randn(2, 3, 3, dtype=torch.float64)
    part = {"inputs": inputs, "targets": torch.zeros(2, 3, dtype=torch.int64)}
    learner = Learner(adapter, Precision("float64"))
    losses, _ = learner.losses("query", {}, adapter.init({}, 2), TaskBatch((0, 1), part, part), 0)
    expected = [F.cross_entropy(model(inputs[task]), part["targets"][task]) for task in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0.0)
