"""A small decoder-only transformer over bytes or other tokens.

Shape letters: N sequences, L tokens, D width, H heads, V vocabulary, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
# In place of a token where a sequence has ended.
PAD = -1


class Gpt(nn.Module):
    """Pre-norm blocks, learned positions, GELU (Radford et al. 2019, section 2.3).

    Sequences may be padded on the right with `PAD`: what is before does not see it. With `num_classes` it
    classifies whole sequences too, by a linear layer on the last token's hidden state (Radford et al. 2018,
    section 3.2).

    Args:
        num_layers: blocks.
        width: D, a multiple of `num_heads`.
        num_heads: H.
        context_length: the longest sequence, tokens.
        tied_embeddings: the head's weight is the embedding's.
        dropout: probability, after the embeddings and before each addition to the residual stream.
        vocabulary: V.
        num_classes: C; None for next tokens alone. The other weights start the same with and without.

    Attributes:
        heads: the module that gives each output, by the output's name.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_heads: int,
        context_length: int,
        tied_embeddings: bool,
        dropout: float = 0.0,
        vocabulary: int = VOCABULARY,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_init_weights)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "fc_out.weight")):
                # Each block adds two terms to the residual stream: keep its variance near 1.
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * num_layers))
        if tied_embeddings:
            self.head.weight = self.token_embedding.weight
        self.heads = {"language_modelling": "head"}
        if num_classes is not None:
            self.classifier = nn.Linear(width, num_classes)
            _init_weights(self.classifier)
            self.heads["classification"] = "classifier"

    def forward(self, tokens: Tensor, head: str = "language_modelling") -> Tensor:
        """Logits `[N, L, V]` of the next token, or `[N, C]` of the sequence's class, for tokens `[N, L]`.

        Args:
            head: `language_modelling` or `classification`.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.token_embedding(tokens.clamp(min=0)) + self.position_embedding(positions)
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        if head == "classification":
            hidden = at_last_token(hidden, tokens)
        logits: Tensor = self.get_submodule(self.heads[head])(self.norm(hidden))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = _CausalAttention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = _Mlp(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.norm_attention(hidden)))
        residual: Tensor = hidden + self.dropout(self.mlp(self.norm_mlp(hidden)))
        return residual


class _CausalAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        N, L, D = hidden.shape
        query, key, value = (
            part.view(N, L, self.num_heads, D // self.num_heads).transpose(1, 2)
            for part in self.qkv(hidden).split(D, dim=-1)
        )
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.proj(heads.transpose(1, 2).reshape(N, L, D))
        return mixed


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_in = nn.Linear(width, 4 * width)
        self.fc_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.fc_out(F.gelu(self.fc_in(hidden)))
        return projected


def at_last_token(hidden: Tensor, tokens: Tensor) -> Tensor:
    """The hidden states `[N, D]` of the last token of each sequence; of the first position where there is
    none."""
    last = ((tokens != PAD).sum(1) - 1).clamp(min=0)
    return hidden[torch.arange(len(tokens), device=tokens.device), last]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
