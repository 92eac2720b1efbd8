"""The gradient of ordinary (not meta-) training: of a loss by a model's own weights.

Shape letters: N samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.model import Shards, Structure, nothing_attached, run_model
from metaloom.engine.draws import Draws
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.losses import cross_entropy, example_means, is_right
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
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of `scale` times the summed loss of N samples, and the sums of `loss` and `accuracy`.

    Args:
        weights: all parameters of the model by name; this rank's shards of them with `shards`, whose ranks
            must all call then.
        batch: `inputs` `[N, ...]` and `targets` `[N]` or `[N, L]`.
        draws: dropout's, one "task" for each sample, so that the world size changes none; None for no
            dropout.
        num_dummies: how many of the last samples do not count.
        recompute_blocks: keep the inputs of blocks alone.
    """
    parameters = leaves(weights)
    device = next(iter(parameters.values())).device
    targets = batch["targets"].to(device)[None]
    inputs = batch["inputs"].to(device)
    inputs = inputs.to(precision.storage_dtype) if inputs.is_floating_point() else inputs
    forward_pass = ForwardPass(precision, device, draws=draws, recompute_blocks=recompute_blocks)
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
        logits = output[None]
        num_real = len(inputs) - num_dummies
        # A dummy's loss has the weight 0, and is no constant: its backward pass takes part.
        counts = (torch.arange(len(inputs), device=device) < num_real).to(logits.dtype)
        loss = (counts * cross_entropy(logits, targets)[0]).sum()
    grads = torch.autograd.grad(scale * loss, list(parameters.values()))
    totals = {
        "loss": loss.detach().double(),
        "accuracy": example_means(is_right(logits, targets).double())[0, :num_real].sum(),
    }
    return dict(zip(parameters, grads, strict=True)), totals
