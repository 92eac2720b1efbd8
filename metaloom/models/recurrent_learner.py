"""An LSTM that reads examples.

Shape letters: T tasks, S support examples, Q query examples, F features of an example, P numbers of a label,
D width, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentLearner(nn.Module):
    """Says a query's label after reading the support examples one by one, each beside the label of the one
    before: (x_1, 0), (x_2, y_1), ..., (x_S, y_{S-1}), then (x, y_S) with the query's x (Hochreiter et al.
    2001, "Learning to Learn Using Gradient Descent"; Santoro et al. 2016, "Meta-Learning with
    Memory-Augmented Neural Networks", section 2 for the labels' delay; here without an external memory).

    Each query goes on from the state after the support examples, so that it does not see another. The order
    of the support examples matters.

    Args:
        num_features: F.
        num_labels: P.
        width: D, of the state.
        num_layers: LSTM cells, one on top of the other.
        num_outputs: O.
    """

    def __init__(
        self, *, num_features: int, num_labels: int, width: int, num_layers: int, num_outputs: int
    ) -> None:
        super().__init__()
        # Cells and not nn.LSTM: its flattened weights do not see those that are substituted for them.
        self.cells = nn.ModuleList(
            nn.LSTMCell(num_features + num_labels if layer == 0 else width, width)
            for layer in range(num_layers)
        )
        self.head = nn.Linear(width, num_outputs)

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Outputs `[T, Q, O]` for the queries.

        Args:
            support: `[T, S, F]`.
            labels: `[T, S, P]`, numbers or one-hot.
            query: `[T, Q, F]`.
            weights: `[T, S]`, 0 for padding, which is left out wherever it stands; None where there is none.
        """
        T, Q = query.shape[:2]
        labels = labels.to(support.dtype)
        state = [(support.new_zeros(T, self._width), support.new_zeros(T, self._width)) for _ in self.cells]
        label = torch.zeros_like(labels[:, 0])
        for position in range(support.shape[1]):
            read = self._step(torch.cat([support[:, position], label], dim=-1), state)
            if weights is None:
                state, label = read, labels[:, position]
                continue
            is_read = (weights[:, position] != 0)[:, None]
            state = [
                (torch.where(is_read, new[0], old[0]), torch.where(is_read, new[1], old[1]))
                for new, old in zip(read, state, strict=True)
            ]
            label = torch.where(is_read, labels[:, position], label)
        # Each query has a copy of its task's state.
        state = [(_repeated(hidden, Q), _repeated(cell, Q)) for hidden, cell in state]
        asked = torch.cat([query.flatten(0, 1), _repeated(label, Q)], dim=-1)
        outputs: Tensor = self.head(self._step(asked, state)[-1][0])
        return outputs.view(T, Q, -1)

    @property
    def _width(self) -> int:
        return self.head.in_features

    def _step(self, inputs: Tensor, state: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The state of each cell after `inputs`, `[N, F + P]`."""
        after = []
        for cell, before in zip(self.cells, state, strict=True):
            after.append(cell(inputs, before))
            inputs = after[-1][0]
        return after


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """Rows `[T * count, ...]` of `[T, ...]`, those of a task beside each other."""
    return tensor.repeat_interleave(count, dim=0)
