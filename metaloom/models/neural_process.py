"""Conditional neural processes: a support set as one vector, and what that says of queries.

Shape letters: T tasks, S support examples, Q query examples, F features of an example, P numbers of a
regression's target, C classes, D width.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NeuralProcess(nn.Module):
    """Mean and standard deviation of what a query's target is, given the support set (Garnelo et al. 2018,
    "Conditional Neural Processes", equations 1 to 3 of section 2):

        r_i = h(x_i, y_i),    r = mean of r_i over the support examples,    (mu, s) = g(x, r)
        sigma = min_std + (1 - min_std) * softplus(s)

    Args:
        num_features: F.
        num_targets: P.
        width: D, of r and of the hidden layers of h and g.
        num_layers: linear layers of h, and of g, at least 1.
        min_std: the least sigma, from 0 to below 1: a likelihood has no bound where sigma comes to 0.

    Attributes:
        encoder: h.
        decoder: g.
    """

    def __init__(
        self, *, num_features: int, num_targets: int, width: int, num_layers: int, min_std: float
    ) -> None:
        super().__init__()
        self.encoder = _mlp(num_features + num_targets, width, width, num_layers)
        self.decoder = _mlp(num_features + width, width, 2 * num_targets, num_layers)
        self.min_std = min_std

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, `[T, Q, P]` each, in at least float32.

        Args:
            support: `[T, S, F]`.
            labels: the support examples' targets, `[T, S, P]`.
            query: `[T, Q, F]`.
            weights: `[T, S]`, 0 for padding; None where there is none.
        """
        encoded = _in_full(self.encoder(torch.cat([support, labels.to(support.dtype)], dim=-1)))
        counts = torch.ones_like(encoded[..., 0]) if weights is None else weights.to(encoded.dtype)
        mean, std = _in_full(self.decoder(_beside_each(query, _means(encoded, counts[..., None])))).chunk(
            2, dim=-1
        )
        return mean, self.min_std + (1.0 - self.min_std) * F.softplus(std)


class ClassNeuralProcess(nn.Module):
    """Logits of a query's class, given the support set (Garnelo et al. 2018, section 4.3): the mean over the
    support examples is taken class by class, and r is all of these in a row:

        r_c = mean of h(x_i, y_i) over the support examples of class c,    r = (r_1, ..., r_C)
        logits = g(x, r)

    Args:
        num_features: F.
        num_classes: C. A class without examples has r_c = 0.
        width: D, of r_c and of the hidden layers of h and g.
        num_layers: linear layers of h, and of g, at least 1.

    Attributes:
        encoder: h.
        decoder: g.
    """

    def __init__(self, *, num_features: int, num_classes: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.encoder = _mlp(num_features + num_classes, width, width, num_layers)
        self.decoder = _mlp(num_features + num_classes * width, width, num_classes, num_layers)

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Logits `[T, Q, C]`.

        Args:
            support: `[T, S, F]`.
            labels: one-hot, `[T, S, C]`.
            query: `[T, Q, F]`.
            weights: `[T, S]`, 0 for padding; None where there is none.
        """
        encoded = _in_full(self.encoder(torch.cat([support, labels.to(support.dtype)], dim=-1)))
        members = labels.to(encoded.dtype)
        if weights is not None:
            members = members * weights.to(encoded.dtype)[..., None]
        logits: Tensor = self.decoder(_beside_each(query, _means(encoded, members).flatten(1)[:, None]))
        return logits


def _means(encoded: Tensor, members: Tensor) -> Tensor:
    """Means of `encoded` `[T, S, D]` by the weights `[T, S, C]` of each of C sets, `[T, C, D]`; 0 for an
    empty one."""
    counts = members.sum(1)  # [T, C]
    # Not by a matrix product: autocast would round what it adds up.
    sums = (members[..., None] * encoded[:, :, None]).sum(1)
    return sums / torch.where(counts == 0.0, 1.0, counts)[..., None]


def _beside_each(query: Tensor, representation: Tensor) -> Tensor:
    """`[T, Q, F + R]`: each query with its task's representation `[T, 1, R]`."""
    return torch.cat([query, representation.expand(-1, query.shape[1], -1).to(query.dtype)], dim=-1)


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mlp(num_inputs: int, width: int, num_outputs: int, num_layers: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    sizes = [num_inputs, *(width,) * (num_layers - 1), num_outputs]
    layers: list[nn.Module] = []
    for size, next_size in itertools.pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
