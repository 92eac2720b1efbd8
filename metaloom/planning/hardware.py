"""What computes and what connects it: a small table, from the makers' public data sheets.

Rates are peaks without sparsity; the shares of them that are reached are assumptions, see docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from metaloom.errors import RecipeError

GB = 1e9
MIB, GIB = 2.0**20, 2.0**30
TERA = 1e12
HERE = "here"

# What a rank's process takes of a GPU beside its tensors: context, kernels, cuBLAS's workspaces, NCCL's
# buffers.
GPU_RESERVED = 2.0 * GIB
# Blocks of the caching allocator that are free and do not fit what is asked for.
GPU_UNUSABLE = 0.10
# The share of a wire's bandwidth that collectives reach.
LINK_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Device:
    """One rank's processor.

    Attributes:
        name: for people.
        memory_bytes: that tensors and the process share.
        flops_per_s: peak of matrix products, by the format that the recipe computes in.
        bandwidth: bytes per second between the processor and its memory.
        operation_s: time of the host for one operation, whatever its size.
        is_asynchronous: whether the host runs ahead of the device, so that the longer of both counts, not
            the sum.
        efficiency: the share of `flops_per_s` that is reached.
        bandwidth_efficiency: the share of `bandwidth` that is reached.
        process_bytes: what the process takes beside tensors.
        unusable: what the allocator holds beside tensors, as a share of them.
        unusable_bytes: what it holds beside that, however large they are.
        node_bandwidth: bytes per second that one device sends to others of its node.
        node_efficiency: the share of it that collectives reach.
        has_host_memory: whether the host's memory is another than the device's own.
    """

    name: str
    memory_bytes: float
    flops_per_s: Mapping[str, float]
    bandwidth: float
    operation_s: float
    is_asynchronous: bool
    efficiency: float
    bandwidth_efficiency: float
    process_bytes: float
    unusable: float
    unusable_bytes: float
    node_bandwidth: float
    node_efficiency: float
    has_host_memory: bool

    def slowed(self, factor: float) -> Device:
        """The same where all computing takes `factor` times as long; what is sent takes as long as before."""
        return dataclasses.replace(
            self,
            flops_per_s={name: rate / factor for name, rate in self.flops_per_s.items()},
            bandwidth=self.bandwidth / factor,
            operation_s=self.operation_s * factor,
        )


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects nodes.

    Attributes:
        bandwidth: bytes per second, one way.
        is_shared: whether the devices of a node share it, or have one each.
    """

    name: str
    bandwidth: float
    is_shared: bool


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Nodes of devices.

    Attributes:
        devices_per_node: ranks of one node.
        link_efficiency: the share of the bandwidth between nodes that collectives reach.
        latency_s: of one message.
    """

    device: Device
    link: Link
    devices_per_node: int
    link_efficiency: float = LINK_EFFICIENCY
    latency_s: float = 10e-6

    def bandwidth_among(self, num_ranks: int) -> float:
        """Bytes per second that a rank of a ring over the first `num_ranks` ranks sends at most."""
        in_node = self.device.node_bandwidth * self.device.node_efficiency
        if num_ranks <= self.devices_per_node:
            return in_node
        share = self.devices_per_node if self.link.is_shared else 1
        return min(in_node, self.link.bandwidth / share * self.link_efficiency)


def _gpu(
    name: str,
    *,
    memory_gb: float,
    float64: float,
    float32: float,
    half: float,
    bandwidth_gb: float,
    node_gb: float,
) -> Device:
    return Device(
        name=name,
        memory_bytes=memory_gb * GB,
        # torch's default keeps float32 products in float32: TF32 is not counted on.
        flops_per_s={
            "float64": float64 * TERA,
            "float32": float32 * TERA,
            "bfloat16": half * TERA,
            "float16": half * TERA,
        },
        bandwidth=bandwidth_gb * GB,
        operation_s=10e-6,
        is_asynchronous=True,
        efficiency=0.5,
        bandwidth_efficiency=0.8,
        process_bytes=GPU_RESERVED,
        unusable=GPU_UNUSABLE,
        unusable_bytes=0.0,
        node_bandwidth=node_gb * GB,
        node_efficiency=LINK_EFFICIENCY,
        has_host_memory=True,
    )


# NVLink is given for one way: half of what data sheets add up.
DEVICES: Mapping[str, Device] = {
    # NVIDIA A100 Tensor Core GPU data sheet, SXM: FP64 and BF16 of tensor cores; NVLink 600 GB/s.
    "a100-40": _gpu(
        "A100 40 GB",
        memory_gb=40,
        float64=19.5,
        float32=19.5,
        half=312,
        bandwidth_gb=1555,
        node_gb=300,
    ),
    "a100-80": _gpu(
        "A100 80 GB",
        memory_gb=80,
        float64=19.5,
        float32=19.5,
        half=312,
        bandwidth_gb=2039,
        node_gb=300,
    ),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: BF16 1979 TFLOPS with sparsity, half without; NVLink 900
    # GB/s.
    "h100": _gpu(
        "H100 80 GB",
        memory_gb=80,
        float64=67,
        float32=67,
        half=989,
        bandwidth_gb=3350,
        node_gb=450,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM.
    "h200": _gpu(
        "H200 141 GB",
        memory_gb=141,
        float64=67,
        float32=67,
        half=989,
        bandwidth_gb=4800,
        node_gb=450,
    ),
    # NVIDIA DGX B200 data sheet: 1440 GB in 8 GPUs; HGX B200 at 1000 W: BF16 2250 TFLOPS dense; NVLink 1800
    # GB/s.
    "b200": _gpu(
        "B200 180 GB",
        memory_gb=180,
        float64=40,
        float32=80,
        half=2250,
        bandwidth_gb=8000,
        node_gb=900,
    ),
    # NVIDIA L40S data sheet: BF16 733 TFLOPS with sparsity; FP64 a 64th of FP32; PCIe 4.0 x16, no NVLink.
    "l40s": _gpu(
        "L40S 48 GB",
        memory_gb=48,
        float64=1.4,
        float32=91.6,
        half=362,
        bandwidth_gb=864,
        node_gb=32,
    ),
}
LINKS: Mapping[str, Link] = {
    "hdr": Link("InfiniBand HDR, 200 Gb/s for each device", 25 * GB, is_shared=False),
    "ndr": Link("InfiniBand NDR, 400 Gb/s for each device", 50 * GB, is_shared=False),
    "100gbe": Link("100 Gb/s Ethernet for each node", 12.5 * GB, is_shared=True),
}


def device_named(name: str) -> Device:
    """The device of the table.

    Raises:
        RecipeError: there is none of that name.
    """
    return DEVICES[_one_of("--hardware", name, (*DEVICES, HERE))]


def link_named(name: str) -> Link:
    """The link of the table.

    Raises:
        RecipeError: there is none of that name.
    """
    return LINKS[_one_of("--link", name, tuple(LINKS))]


def _one_of(option: str, name: str, names: tuple[str, ...]) -> str:
    if name in names:
        return name
    meant = next(iter(difflib.get_close_matches(name, names, n=1)), None)
    hint = "choose one of them" if meant is None else f"did you mean {meant!r}?"
    raise RecipeError(f"{option}: {name!r} is not one of {', '.join(names)}; {hint}")
