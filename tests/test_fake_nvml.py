"""The fake driver has NVML's ABI: NVIDIA's own Python bindings read it, and agree with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import llama_gpu as lg
from support.fake_nvml import GIB, MIB, FakeGpu, FakeNvml, FakeProcess

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
    }

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


def read_with_nvidia_ml_py(fake: FakeNvml) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_NVIDIA_ML_PY],
        env={**os.environ, **fake.environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def test_nvidia_ml_py_and_the_snapshot_agree_in_every_field(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus(
        [
            FakeGpu(
                total_bytes=24 * GIB,
                reserved_bytes=480 * MIB,
                free_bytes=20 * GIB,
                utilization=37,
                temperature=61,
                power_watts=287.125,
                processes=[
                    FakeProcess(pid=4242, used_bytes=3 * GIB),
                    FakeProcess(pid=77, used_bytes=None),
                    FakeProcess(pid=5000, used_bytes=90 * MIB, kind="graphics"),
                ],
            ),
            FakeGpu(
                name="NVIDIA A100-SXM4-40GB",
                total_bytes=40 * GIB,
                compute_capability=(8, 0),
                mig_slots=7,
                migs={
                    slot: FakeGpu(
                        name="NVIDIA A100-SXM4-40GB MIG 1g.5gb",
                        total_bytes=5 * GIB,
                        free_bytes=(slot + 1) * GIB,
                        temperature=None,
                        utilization=None,
                        power_watts=None,
                    )
                    for slot in (0, 3)
                },
            ),
        ]
    )
    theirs = read_with_nvidia_ml_py(fake_nvml)
    snapshot = lg.snapshot_gpus()
    assert snapshot.driver_version == theirs["driver_version"]
    assert len(snapshot) == len(theirs["gpus"]) == 3
    for gpu, expected in zip(snapshot, theirs["gpus"], strict=True):
        ours = {field: value for field, value in gpu.fields().items() if field in expected}
        ours["compute_capability"] = list(ours["compute_capability"])
        ours["processes"] = [[process.pid, process.used_bytes] for process in ours["processes"]]
        assert ours == expected
        assert gpu.health == "ok"


def test_a_change_of_the_state_is_seen_by_the_next_reading(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(total_bytes=8 * GIB)])
    assert [gpu.free_bytes for gpu in lg.snapshot_gpus()] == [8 * GIB]
    fake_nvml.update(0, free_bytes=GIB)
    assert [(gpu.free_bytes, gpu.used_bytes) for gpu in lg.snapshot_gpus()] == [(GIB, 7 * GIB)]
    fake_nvml.set_gpus([])
    assert lg.snapshot_gpus() == lg.GpuSnapshot([], fake_nvml.driver_version)
