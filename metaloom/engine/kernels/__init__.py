"""Forms of torch's fused functions that can be differentiated twice, by reverse and by forward mode."""

from metaloom.engine.kernels.activations import gelu, silu, written_out_silu
from metaloom.engine.kernels.attention import attention, written_out_attention
from metaloom.engine.kernels.low_rank import low_rank_update

__all__ = ["attention", "gelu", "low_rank_update", "silu", "written_out_attention", "written_out_silu"]
