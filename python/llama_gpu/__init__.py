"""Which GGUF model runs on which GPU, and who leaves.

The base package needs nothing but the standard library; the proxy lives in the
``serve`` extra and is not imported from here.
"""

from llama_gpu._core import (
    Claim,
    DeviceMemory,
    Gpu,
    GpuProcess,
    GpuSnapshot,
    Header,
    Lease,
    Ledger,
    MemoryEstimate,
    Metadata,
    MetadataArray,
    Monitor,
    PlacedDevice,
    Placement,
    Policy,
    Running,
    Shard,
    Tensor,
    __version__,
    estimate,
    has_host_pids,
    place,
    read_header,
    snapshot_gpus,
)

__all__ = [
    "Claim",
    "DeviceMemory",
    "Gpu",
    "GpuProcess",
    "GpuSnapshot",
    "Header",
    "Lease",
    "Ledger",
    "MemoryEstimate",
    "Metadata",
    "MetadataArray",
    "Monitor",
    "PlacedDevice",
    "Placement",
    "Policy",
    "Running",
    "Shard",
    "Tensor",
    "__version__",
    "estimate",
    "has_host_pids",
    "place",
    "read_header",
    "snapshot_gpus",
]
