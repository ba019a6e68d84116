"""Which GGUF model runs on which GPU, and who leaves.

The base package needs nothing but the standard library; the proxy lives in the
``serve`` extra and is not imported from here.
"""

from llama_gpu._core import (
    DeviceMemory,
    Gpu,
    GpuProcess,
    GpuSnapshot,
    Header,
    MemoryEstimate,
    Metadata,
    MetadataArray,
    Monitor,
    Shard,
    Tensor,
    __version__,
    estimate,
    read_header,
    snapshot_gpus,
)

__all__ = [
    "DeviceMemory",
    "Gpu",
    "GpuProcess",
    "GpuSnapshot",
    "Header",
    "MemoryEstimate",
    "Metadata",
    "MetadataArray",
    "Monitor",
    "Shard",
    "Tensor",
    "__version__",
    "estimate",
    "read_header",
    "snapshot_gpus",
]
