"""A transformer whose tokens are examples.

Shape letters: T tasks, S support examples, Q query examples, F features of an example, P numbers of a label,
D width, H heads, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionLearner(nn.Module):
    """Says the queries' labels after attending to the labelled support examples (Müller et al. 2022,
    "Transformers Can Do Bayesian Inference", section 3.2 and its attention mask; in place of recurrence or
    causal attention over examples, as in Mishra et al. 2018, "A Simple Neural Attentive Meta-Learner").

    A token is an example: a linear map of its features plus one of its label, or plus a learned vector where
    the label is asked for. All tokens attend to support tokens alone. So the support examples' order has no
    effect, a query does not see another, and the cost is linear in Q.

    Args:
        num_features: F.
        num_labels: P.
        width: D, a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: H.
        num_outputs: O.
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_labels: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_outputs: int,
    ) -> None:
        super().__init__()
        self.features = nn.Linear(num_features, width)
        self.labels = nn.Linear(num_labels, width, bias=False)
        self.asked = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Outputs `[T, Q, O]` for the queries.

        Args:
            support: `[T, S, F]`.
            labels: `[T, S, P]`, numbers or one-hot.
            query: `[T, Q, F]`.
            weights: `[T, S]`, 0 for padding; None where there is none.
        """
        known = self.features(support) + self.labels(labels.to(support.dtype))
        hidden = torch.cat([known, self.features(query) + self.asked], dim=1)
        num_support = support.shape[1]
        is_seen = None if weights is None else (weights != 0)[:, None, None, :]  # [T, 1, 1, S]
        for block in self.blocks:
            hidden = block(hidden, num_support, is_seen)
        outputs: Tensor = self.head(self.norm(hidden[:, num_support:]))
        return outputs


class _Block(nn.Module):
    """Attention to the support tokens, then two linear layers; both pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.fc_in = nn.Linear(width, 4 * width)
        self.fc_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, num_support: int, is_seen: Tensor | None) -> Tensor:
        normed = self.norm_attention(hidden)
        key, value = self.key_value(normed[:, :num_support]).chunk(2, dim=-1)
        heads = F.scaled_dot_product_attention(
            self._by_head(self.query(normed)), self._by_head(key), self._by_head(value), attn_mask=is_seen
        )
        hidden = hidden + self.proj(heads.transpose(1, 2).flatten(2))
        residual: Tensor = hidden + self.fc_out(F.gelu(self.fc_in(self.norm_mlp(hidden))))
        return residual

    def _by_head(self, tokens: Tensor) -> Tensor:
        """`[T, H, N, D / H]` of `[T, N, D]`."""
        T, N, D = tokens.shape
        return tokens.view(T, N, self.num_heads, D // self.num_heads).transpose(1, 2)
