"""Learning in context: a language model reads the support sequences before a query, and no weight changes.

Shape letters: T tasks, S support sequences, Q query sequences, L tokens of a sequence, P tokens of a prompt,
D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.model import Readout, Structure, nothing_attached, run_model
from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors
from metaloom.engine.examples import Reading, read
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class InContext(FeedForward):
    """The query loss of a language model that has the support sequences in front of each query (Brown et al.
    2020, "Language Models are Few-Shot Learners", section 2); learned from, it is MetaICL (Min et al. 2022,
    "MetaICL: Learning to Learn In Context", section 3.1):

        loss = -log P(query | x_1, ..., x_k), the mean over the query's own tokens

    The tokens that count are those that the query loss of other algorithms counts: all of a query but its
    first. Queries do not see each other.

    Attributes:
        model: of tokens `[N, L]`, causal; its positions take a prompt and a query.
        structure: where it can be taken apart.
        head: which of its outputs is the next token; None where it has one.
        precision: number format.
        num_shown: k, the most support sequences in a prompt: the last ones of a task.
        recompute_blocks: keep the inputs of blocks alone, and compute each again when it is differentiated.

    Raises:
        CapabilityError: the model has no head that can be told from the rest; or nothing is shown.
    """

    model: nn.Module
    structure: Structure
    head: str | None
    precision: Precision
    num_shown: int
    recompute_blocks: bool = False

    def __post_init__(self) -> None:
        if self.structure.head_of(self.head) is None:
            raise CapabilityError(
                "the head of a model in context is computed for queries alone, and this model has no head "
                "that can be told from the rest: name it in Structure.head."
            )
        if self.num_shown < 1:
            raise CapabilityError(
                f"num_shown is {self.num_shown}; learning in context needs a support sequence to be shown."
            )

    @property
    def scores(self) -> tuple[str, ...]:
        return CrossEntropy.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return {BACKBONE + name: value.detach().clone() for name, value in self.model.named_parameters()}

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FeedForward`.

        Args:
            batch: `inputs` and `targets` are tokens `[T, N, L]`, each target the token after its input; no
                sequence is shorter than L.
        """
        weights = {
            name.removeprefix(BACKBONE): value for name, value in meta.items() if name.startswith(BACKBONE)
        }
        tasks = [self._of_task(weights, task) for task in batch.split(1)]
        losses, scores = zip(*tasks, strict=True)
        return torch.cat(losses), {name: torch.cat([s[name] for s in scores]) for name in self.scores}

    def _of_task(self, weights: Tensors, task: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scores of one task, `[1]` each."""
        query = task.query
        prompt = self._prompt(task)  # [P]
        inputs = torch.cat([prompt.expand(query["inputs"].shape[1], -1), query["inputs"][0]], dim=1)
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            recompute_blocks=self.recompute_blocks,
            holds_back_head=True,
            head=self.head,
        )
        features, head, tensors = run_model(
            self.model,
            self.structure,
            weights,
            inputs,
            forward_pass,
            attachments={},
            attach=nothing_attached,
        )
        assert head is not None, "the head was held back"
        # Of the prompt no next token is asked for.
        own = features[:, len(prompt) :]  # [Q, L, D]
        logits = head(own.flatten(0, 1)[None], *tensors)
        logits = logits.view(1, *own.shape[:2], -1)  # [1, Q, L, V]
        examples = read(
            Readout(logits),
            query["targets"],
            query.get("weights"),
            Reading(CrossEntropy(), self.head),
            head_chunk=None,
            derivative="once",
        )
        return examples.loss(), examples.mean_scores()

    def _prompt(self, task: TaskBatch) -> Tensor:
        """The task's last support sequences, each with the token after it, one behind the other."""
        support = task.support
        sequences = torch.cat([support["inputs"][0], support["targets"][0][:, -1:]], dim=1)  # [S, L + 1]
        if "weights" in support:
            sequences = sequences[support["weights"][0] != 0]
        return sequences[-self.num_shown :].flatten()
