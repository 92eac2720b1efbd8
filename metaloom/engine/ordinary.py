"""The gradient of ordinary (not meta-) training: of a loss by a model's own weights.

Shape letters: N samples, L tokens, P numbers of a regression's target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.model import Readout, Shards, Structure, nothing_attached, run_model
from metaloom.engine.draws import Draws
from metaloom.engine.examples import Reading, read
from metaloom.engine.forward_pass import Bottleneck, ForwardPass
from metaloom.engine.losses import Criterion, CrossEntropy
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import leaves


def ordinary_gradient(
    model: nn.Module,
    structure: Structure,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    precision: Precision,
    *,
    draws: Draws | None,
    scale: float,
    num_dummies: int = 0,
    recompute_blocks: bool,
    shards: Shards | None,
    criterion: Criterion | None = None,
    head: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of `scale` times the summed loss of N samples, and the sums of `loss` and the scores. A
    stochastic layer gives its means.

    Args:
        weights: all parameters of the model by name; this rank's shards of them with `shards`, whose ranks
            must all call then.
        batch: `inputs` `[N, ...]` and `targets` `[N]`, `[N, L]` or, of a regression, `[N, P]`.
        draws: dropout's, one "task" for each sample, so that the world size changes none; None for no
            dropout.
        num_dummies: how many of the last samples do not count.
        recompute_blocks: keep the inputs of blocks alone.
        criterion: the loss of a target; the cross-entropy where None.
        head: which output is trained, of a model that has several; the weights of others get zeros.
    """
    reading = Reading(criterion or CrossEntropy(), head)
    parameters = leaves(weights)
    device = next(iter(parameters.values())).device
    inputs, targets = (precision.on_device(batch[name], device) for name in ("inputs", "targets"))
    forward_pass = ForwardPass(
        precision, device, draws=draws, recompute_blocks=recompute_blocks, head=head, bottleneck=Bottleneck()
    )
    with torch.enable_grad():
        output, _, _ = run_model(
            model,
            structure,
            parameters,
            inputs,
            forward_pass,
            attachments={},
            attach=nothing_attached,
            shards=shards,
        )
        samples = read(
            Readout(output[None]), targets[None], None, reading, head_chunk=None, derivative="once"
        )
        num_real = len(inputs) - num_dummies
        # A dummy's loss has the weight 0, and is no constant: its backward pass takes part.
        counts = (torch.arange(len(inputs), device=device) < num_real).to(samples.losses.dtype)
        loss = (counts * samples.losses[0]).sum()
    grads = torch.autograd.grad(scale * loss, list(parameters.values()), materialize_grads=True)
    totals = {"loss": loss.detach().double()}
    totals |= {name: values[0, :num_real].sum() for name, values in samples.scores.items()}
    return dict(zip(parameters, grads, strict=True)), totals
