"""DeepSpeed's configuration, made from the recipe. Read by the recipe's rules too: hence no torch here.

DeepSpeed takes what its configuration does not say from defaults, some of which change what is computed
(gradients are clipped to a norm of 1 and averaged over ranks) or take memory by the gigabyte (buckets of
5e8 elements). So everything that stages 1 and 2 read is written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ZERO = "zero_optimization"
# Elements of one bucket, of which DeepSpeed allocates the whole: 128 MiB in float32.
LARGEST_BUCKET = 2**25

_TASKS = "outer.tasks_per_step and outer.micro_batch say what a step is made of"
_PRECISION = "precision.compute says in which format is computed; gradients and states are float32"
_MEAN = "gradients are added, and divided by outer.tasks_per_step once"
_OPTIMIZER = "outer.optimizer names the optimizer"
_TRACKING = "tracking says where the run is recorded"
_CHECKPOINT = "checkpoint says when checkpoints are written; they are metaloom's own"
_NO_MODEL = "DeepSpeed runs no model here: it is given gradients, and moves the meta-parameters"
_LAYOUT = "checkpoints are put together from the order of parameters as it is without this"
_STAGE_3 = "it is of stage 3, and sharding.stage is 1 or 2"

# What the recipe decides: why an extra key of that name is refused.
DECIDED: Mapping[str, str] = {
    "train_batch_size": _TASKS,
    "train_micro_batch_size_per_gpu": _TASKS,
    "gradient_accumulation_steps": _TASKS,
    "managed_gradient_accumulation": _TASKS,
    "gradient_clipping": "outer.clip_norm says how long a gradient may be",
    "gradient_allreduce_op": _MEAN,
    "gradient_predivide_factor": _MEAN,
    "prescale_gradients": _MEAN,
    "communication_data_type": _PRECISION,
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "optimizer": _OPTIMIZER,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "scheduler": "outer.schedule is the course of the learning rate",
    "tensorboard": _TRACKING,
    "wandb": _TRACKING,
    "csv_monitor": _TRACKING,
    "comet": _TRACKING,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "activation_checkpointing": "memory.recompute_blocks says what is computed again",
    "tensor_parallel": _NO_MODEL,
    "expert_parallel": _NO_MODEL,
    "sequence_parallel_size": _NO_MODEL,
    "data_parallel_size": _NO_MODEL,
    "pipeline": _NO_MODEL,
    "hybrid_engine": _NO_MODEL,
    "compile": _NO_MODEL,
    "flops_profiler": _NO_MODEL,
    "autotuning": _NO_MODEL,
    "data_efficiency": _NO_MODEL,
    "weight_quantization": _NO_MODEL,
    f"{ZERO}.stage": "sharding.stage says so",
    f"{ZERO}.offload_optimizer": "sharding.offload_optimizer says so",
    f"{ZERO}.cpu_offload": "sharding.offload_optimizer says so",
    f"{ZERO}.cpu_offload_use_pin_memory": "sharding.offload_optimizer says so",
    f"{ZERO}.compute_grad_norm": "by its norm DeepSpeed too sees that a gradient is not finite",
    f"{ZERO}.ignore_unused_parameters": "every meta-parameter has a gradient",
    f"{ZERO}.round_robin_gradients": _LAYOUT,
    f"{ZERO}.parameter_alignment": _LAYOUT,
    f"{ZERO}.zenflow": "its steps are late by one, and so other steps",
    f"{ZERO}.elastic_checkpoint": _CHECKPOINT,
    f"{ZERO}.load_from_fp32_weights": _CHECKPOINT,
    f"{ZERO}.legacy_stage1": "DeepSpeed has none any more",
    **{
        f"{ZERO}.{key}": _STAGE_3
        for key in (
            "offload_param",
            "cpu_offload_param",
            "sub_group_size",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "save_muon_momentum_buffer_in_memory",
            "leaf_module",
        )
    },
}


def refused_keys(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(key, reason)` for each extra key that the recipe decides; keys of the ZeRO section with its name."""
    for key, value in extra.items():
        if key != ZERO:
            if key in DECIDED:
                yield key, DECIDED[key]
        elif not isinstance(value, Mapping):
            yield key, "it is a section of keys"
        else:
            for inner in value:
                if inner.startswith("stage3_"):
                    yield f"{ZERO}.{inner}", _STAGE_3
                elif f"{ZERO}.{inner}" in DECIDED:
                    yield f"{ZERO}.{inner}", DECIDED[f"{ZERO}.{inner}"]


def deepspeed_config(
    *, stage: int, offload_optimizer: bool, pin_memory: bool, num_elements: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What DeepSpeed is given.

    Args:
        stage: 1 or 2.
        offload_optimizer: whether master weights and optimizer states are in the host's memory.
        pin_memory: whether that memory is page-locked, for faster copies to a GPU.
        num_elements: of all meta-parameters together: no bucket is larger.
        extra: further keys, over those below; none of `refused_keys`.
    """
    bucket = min(LARGEST_BUCKET, num_elements + num_elements % 2)
    offload: dict[str, Any] = {"device": "none"}
    if offload_optimizer:
        offload = {"device": "cpu", "pin_memory": pin_memory}
    config: dict[str, Any] = {
        # One backward pass, of the summed gradients, is a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        # The gradients of all ranks are added; the combiner divides, the outer optimizer clips.
        "gradient_allreduce_op": "sum",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_clipping": 0.0,
        # float32 throughout: half precision is the matter of the forward passes.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # Torch's own optimizers, fused: they need no compiler. Both act on each element by itself.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        ZERO: {
            "stage": stage,
            "offload_optimizer": offload,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "compute_grad_norm": True,
            "ignore_unused_parameters": False,
            "round_robin_gradients": False,
            "parameter_alignment": False,
        },
        # Nothing is printed, timed or collected.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
    }
    own = {key: value for key, value in extra.items() if key != ZERO}
    return config | own | {ZERO: config[ZERO] | extra.get(ZERO, {})}
