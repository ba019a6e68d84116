"""What NVIDIA's own Python bindings read, in the fields of a snapshot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import llama_gpu as lg

READ_WITH_NVIDIA_ML_PY = """
import json, pynvml as nvml
nvml.nvmlInit()

def read(handle, parent=None):
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    listed += nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    return {
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "name": nvml.nvmlDeviceGetName(handle),
        "total_bytes": memory.total,
        "free_bytes": memory.free,
        "used_bytes": memory.used,
        "reserved_bytes": memory.reserved,
        "utilization": nvml.nvmlDeviceGetUtilizationRates(handle).gpu if parent is None else None,
        "temperature": nvml.nvmlDeviceGetTemperature(parent or handle, nvml.NVML_TEMPERATURE_GPU),
        "power_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000 if parent is None else None,
        "compute_capability": list(nvml.nvmlDeviceGetCudaComputeCapability(parent or handle)),
        "processes": sorted([process.pid, process.usedGpuMemory] for process in listed),
        "parent_uuid": parent and nvml.nvmlDeviceGetUUID(parent),
        "pci_bus_id": nvml.nvmlDeviceGetPciInfo(parent or handle).busId,
        "nvlink_peers": [] if parent else peers(handle),
    }

def peers(handle):
    found = set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                found.add(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)
        except nvml.NVMLError:
            break
    return sorted(found)

def slices(handle):
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
        except nvml.NVMLError_NotFound:
            continue

gpus = []
for index in range(nvml.nvmlDeviceGetCount()):
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if nvml.nvmlDeviceGetMigMode(handle)[0]:
        gpus += [{"index": index, **read(each, handle)} for each in slices(handle)]
    else:
        gpus.append({"index": index, **read(handle)})
print(json.dumps({"driver_version": nvml.nvmlSystemGetDriverVersion(), "gpus": gpus}))
nvml.nvmlShutdown()
"""


def read_with_nvidia_ml_py(environment: Mapping[str, str] | None = None) -> Any:
    """Reads in a child, since the library is found through the environment a process starts with."""
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_NVIDIA_ML_PY],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def as_they_tell(gpu: lg.Gpu, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our GPU in the fields, and the JSON types, of what they read."""
    ours: dict[str, Any] = {field: value for field, value in gpu.fields().items() if field in theirs}
    ours["compute_capability"] = list(ours["compute_capability"])
    ours["nvlink_peers"] = list(ours["nvlink_peers"])
    ours["processes"] = [[process.pid, process.used_bytes] for process in ours["processes"]]
    return ours
