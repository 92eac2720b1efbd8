"""Features that are computed in chunks, and again in chunks when they are differentiated."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.feed_forward import FeedForward
from metaloom.engine.algorithms.linear_head import LinearHead
from metaloom.engine.algorithms.protonet import Protonet
from metaloom.engine.backbone import Backbone
from metaloom.engine.heads.base import HeadSolver
from metaloom.engine.heads.logistic import LogisticSolver
from metaloom.engine.heads.parameters import HeadParameters
from metaloom.engine.heads.ridge import RidgeSolver
from metaloom.engine.heads.svm import SvmSolver
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4

T, NUM_WAYS, S, Q = 2, 3, 6, 5
Head = Literal["protonet", "ridge", "logistic", "svm"]
SOLVERS: dict[str, HeadSolver] = {
    "ridge": RidgeSolver(),
    "logistic": LogisticSolver(num_steps=2),
    "svm": SvmSolver(),
}


def backbone(*, chunk: int | None, norm: str = "none", recompute_blocks: bool = False) -> Backbone:
    torch.manual_seed(0)
    network = Conv4(num_classes=NUM_WAYS, width=8, num_blocks=2, norm=norm).double()
    structure = Structure(("blocks.0", "blocks.1"), network.heads)
    return Backbone(network, structure, "tasks", Precision("float64"), recompute_blocks, chunk)


def algorithm(head: Head, features: Backbone) -> FeedForward:
    if head == "protonet":
        return Protonet(features, NUM_WAYS)
    parameters = HeadParameters(0.5, learned=("regulariser", "scale"))
    return LinearHead(features, SOLVERS[head], parameters, CrossEntropy(), NUM_WAYS)


def batch() -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(num_examples: int) -> dict[str, Tensor]:
        images = torch.randn(T, num_examples, 1, 8, 8, dtype=torch.float64, generator=generator)
        return {"inputs": images, "targets": torch.arange(num_examples).expand(T, -1) % NUM_WAYS}

    return TaskBatch((0, 1), part(S), part(Q))


def padded(data: TaskBatch) -> TaskBatch:
    """The same with weights, and a further support example that counts for nothing."""
    support = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in data.support.items()}
    support["weights"] = torch.tensor([[1.0] * S + [0.0]] * T)
    return dataclasses.replace(data, support=support)


@pytest.mark.parametrize("head", ["protonet", "ridge", "logistic", "svm"])
@pytest.mark.parametrize(("chunk", "recompute_blocks"), [(1, False), (4, True), (100, False)])
def test_chunks_change_no_gradient(head: Head, chunk: int, recompute_blocks: bool) -> None:
    data = padded(batch())
    whole = algorithm(head, backbone(chunk=None))
    chunked = algorithm(head, backbone(chunk=chunk, recompute_blocks=recompute_blocks))
    meta = whole.meta_parameters()
    expected, found = whole.meta_gradient(meta, data), chunked.meta_gradient(meta, data)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0.0)
    scale = max(float(value.abs().max()) for value in expected.gradient.values())
    for name, value in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-12, atol=1e-12 * scale)
    curves = [one.curve(meta, data, num_steps=0)["loss"] for one in (whole, chunked)]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-12, atol=0.0)


def peak_of_saved(learner: FeedForward, data: TaskBatch) -> int:
    """The most bytes that graphs keep for backward passes at one time; weights and inputs do not count."""
    given = [*learner.meta_parameters().values(), data.support["inputs"], data.query["inputs"]]
    live, peak = {"bytes": 0}, {"bytes": 0}
    meta = learner.meta_parameters()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*given, *meta.values())}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            is_new = tensor.untyped_storage().data_ptr() not in known
            self.size = tensor.numel() * tensor.element_size() if is_new else 0
            live["bytes"] += self.size
            peak["bytes"] = max(peak["bytes"], live["bytes"])

        def __del__(self) -> None:
            live["bytes"] -= self.size

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        learner.meta_gradient(meta, data)
    assert live["bytes"] == 0
    return peak["bytes"]


def test_the_graph_of_one_chunk_lives_at_a_time() -> None:
    data = batch()
    num_examples = T * (S + Q)
    whole = peak_of_saved(algorithm("protonet", backbone(chunk=None)), data)
    one = peak_of_saved(algorithm("protonet", backbone(chunk=1)), data)
    # What a chunk's pass is given (its weights, again and again, and its examples) and the head's own graph
    # are there beside the graph of one example.
    assert one < 3 * whole / num_examples + 20_000, (one, whole)
    assert one < whole / 4


def test_layers_with_the_statistics_of_all_examples_are_refused() -> None:
    with pytest.raises(
        CapabilityError,
        match=r"features are computed 2 examples at a time.*its layer 'blocks\.0\.norm'.*"
        "set algorithm.feature_chunk to null",
    ):
        backbone(chunk=2, norm="batch")


class _OwnNorm(nn.Module):
    """Normalises without a layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, NUM_WAYS)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.batch_norm(images.flatten(1), None, None, training=True))
        return logits


def test_a_models_own_call_of_batch_norm_is_refused() -> None:
    features = Backbone(_OwnNorm().double(), Structure((), "head"), None, Precision("float64"), chunk=2)
    with pytest.raises(CapabilityError, match=r"torch\.nn\.functional\.batch_norm.*chunks would change"):
        features.features({}, batch().support["inputs"])


def test_batch_norm_with_statistics_that_stay_is_computed_in_chunks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, NUM_WAYS)).double().eval()
    inputs = batch().support["inputs"]
    whole, chunked = (
        Backbone(network, Structure((), "2"), None, Precision("float64"), chunk=chunk).features({}, inputs)
        for chunk in (None, 2)
    )
    torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=0.0)
