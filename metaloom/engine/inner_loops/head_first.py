"""Adapting the head alone, before all fast weights."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from metaloom.engine.inner_loops.base import InnerRule, Tensors
from metaloom.engine.inner_loops.gradient_terms import ANCHOR

Updated = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class HeadFirst:
    """The first inner steps move the head alone; then all fast weights move, by the rule started anew.

    Linear probing, then fine-tuning (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution", section 3.3), inside a task. In the head's steps the rule is that of
    the head
    alone: nothing of the others has a part in it, not in the norm that is clipped, nor do they, or what the
    rule remembers of them, move, by weight decay or otherwise. At the first step of all the rule forgets what
    it has remembered of the head's steps (momentum, moments, their count), but for where a proximal term
    pulls to, phi_0.

    Attributes:
        names: of the head's fast weights.
        num_steps: steps of the head alone, at least 1.
    """

    names: frozenset[str]
    num_steps: int

    def update(
        self, rule: InnerRule, fast: Tensors, state: Tensors, grads: Tensors, rates: Tensors, step: int
    ) -> Updated:
        """(phi', s') of inner step `step`; arguments as for `InnerRule.update`."""
        if step > self.num_steps:
            return rule.update(fast, state, grads, rates)
        if step == self.num_steps:
            anchors = {name: value for name, value in state.items() if name.startswith(ANCHOR)}
            return rule.update(fast, rule.init_state(fast) | anchors, grads, rates)
        others = {name for name in fast if name not in self.names}
        moved, new_state = rule.update(
            self._of_head(fast),
            {name: value for name, value in state.items() if name.partition("/")[2] not in others},
            self._of_head(grads),
            rates,
        )
        # A view: the next gradient is by what stayed, and not by what the head came from through it.
        stayed = {name: fast[name].view_as(fast[name]) for name in others}
        return (
            {name: moved[name] if name in moved else stayed[name] for name in fast},
            {name: new_state.get(name, value) for name, value in state.items()},
        )

    def _of_head(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name: value for name, value in tensors.items() if name in self.names}
