"""torch's functions in forms that can be differentiated twice, in reverse and forward mode, or are faster."""

from metaloom.engine.kernels.activations import gelu, silu, written_out_mish, written_out_silu
from metaloom.engine.kernels.attention import attention, written_out_attention
from metaloom.engine.kernels.linear import linear
from metaloom.engine.kernels.low_rank import low_rank_update
from metaloom.engine.kernels.norms import weighted_batch_norm, written_out_group_norm
from metaloom.engine.kernels.per_task import (
    batch_norm_per_task,
    conv_per_task,
    embedding_per_task,
    group_norm_per_task,
    layer_norm_per_task,
    linear_per_task,
    rms_norm_per_task,
    transposed_linear_per_task,
)

__all__ = [
    "attention",
    "batch_norm_per_task",
    "conv_per_task",
    "embedding_per_task",
    "gelu",
    "group_norm_per_task",
    "layer_norm_per_task",
    "linear",
    "linear_per_task",
    "low_rank_update",
    "rms_norm_per_task",
    "silu",
    "transposed_linear_per_task",
    "weighted_batch_norm",
    "written_out_attention",
    "written_out_group_norm",
    "written_out_mish",
    "written_out_silu",
]
