"""Our snapshot against nvidia-smi and nvidia-ml-py, on a real GPU."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import llama_gpu as lg
from support.fake_nvml import MIB
from support.nvidia_ml_py import as_they_tell, read_with_nvidia_ml_py

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not lg.snapshot_gpus().gpus, reason=f"no GPU here: {lg.snapshot_gpus().error}"),
]

# What moves while two programs read it one after the other, and by how much it may.
MOVING = {"utilization": 100, "temperature": 10, "power_watts": 400.0}
MOVING_BYTES = {"free_bytes", "used_bytes"}


def agree(field: str, ours: object, theirs: object) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        if field in MOVING:
            return abs(ours - theirs) <= MOVING[field]
        if field in MOVING_BYTES:
            return abs(ours - theirs) <= 256 * MIB
    return ours == theirs


def test_nvidia_ml_py_agrees_field_by_field() -> None:
    theirs = read_with_nvidia_ml_py()
    snapshot = lg.snapshot_gpus()
    assert snapshot.error is None
    assert snapshot.driver_version == theirs["driver_version"]
    assert len(snapshot) == len(theirs["gpus"])
    for gpu, expected in zip(snapshot, theirs["gpus"], strict=True):
        ours = as_they_tell(gpu, expected)
        wrong = {
            field: (ours[field], value)
            for field, value in expected.items()
            if not agree(field, ours[field], value)
        }
        assert wrong == {}


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no nvidia-smi here")
def test_nvidia_smi_agrees() -> None:
    fields = "index,uuid,name,memory.total,memory.free,compute_cap,driver_version,pci.bus_id"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines()]
    snapshot = lg.snapshot_gpus()
    physical = {gpu.index: gpu for gpu in snapshot if not gpu.mig}
    for index, uuid, name, total, free, capability, driver, pci in rows:
        gpu = physical.get(int(index))
        if gpu is None:
            continue  # sliced into MIG devices, which nvidia-smi does not list here
        assert (gpu.uuid, gpu.name, snapshot.driver_version, gpu.pci_bus_id) == (uuid, name, driver, pci)
        assert gpu.compute_capability == tuple(int(part) for part in capability.split("."))
        assert gpu.total_bytes == int(total) * MIB
        assert gpu.free_bytes is not None
        assert abs(gpu.free_bytes - int(free) * MIB) <= 256 * MIB


def test_the_monitor_reads_the_same_gpus() -> None:
    with lg.Monitor(interval_seconds=0.2) as monitor:
        watched = monitor.refresh()
    assert [gpu.uuid for gpu in watched] == [gpu.uuid for gpu in lg.snapshot_gpus()]
