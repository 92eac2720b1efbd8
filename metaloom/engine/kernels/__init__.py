"""torch's functions in forms that can be differentiated twice, in reverse and forward mode, or are faster."""

from metaloom.engine.kernels.activations import gelu, silu, written_out_mish, written_out_silu
from metaloom.engine.kernels.attention import attention, written_out_attention
from metaloom.engine.kernels.linear import linear
from metaloom.engine.kernels.low_rank import low_rank_update
from metaloom.engine.kernels.norms import weighted_batch_norm, written_out_group_norm

__all__ = [
    "attention",
    "gelu",
    "linear",
    "low_rank_update",
    "silu",
    "weighted_batch_norm",
    "written_out_attention",
    "written_out_group_norm",
    "written_out_mish",
    "written_out_silu",
]
