"""GPUs as values, and what is said where there are none."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import llama_gpu as lg

GIB = 1 << 30


def test_a_gpu_needs_only_an_index() -> None:
    gpu = lg.Gpu(index=3)
    assert (gpu.index, gpu.uuid, gpu.health) == (3, "GPU-3", "ok")
    assert gpu.total_bytes is None
    assert gpu.processes is None
    assert not gpu.accepts_models


def test_used_is_derived_from_total_free_and_reserved() -> None:
    gpu = lg.Gpu(index=0, total_bytes=24 * GIB, free_bytes=20 * GIB, reserved_bytes=GIB)
    assert gpu.used_bytes == 3 * GIB
    assert gpu.accepts_models


def test_replace_changes_what_it_is_told_and_derives_used_anew() -> None:
    gpu = lg.Gpu(index=0, total_bytes=10, free_bytes=10)
    fuller = gpu.replace(free_bytes=4, health="degraded", health_reason="hot")
    assert (fuller.used_bytes, fuller.health, fuller.health_reason) == (6, "degraded", "hot")
    assert fuller.replace(health="ok").health_reason is None
    assert gpu.free_bytes == 10


@pytest.mark.parametrize(
    "value",
    [
        lg.GpuProcess(12, None),
        lg.Gpu(
            index=1,
            uuid="MIG-1",
            name="NVIDIA A100 MIG 1g.5gb",
            total_bytes=5 * GIB,
            free_bytes=4 * GIB,
            utilization=7,
            temperature=40,
            power_watts=61.5,
            compute_capability=(8, 0),
            processes=[lg.GpuProcess(4, 100)],
            parent_uuid="GPU-1",
            health="lost",
            health_reason="gone",
            pci_bus_id="00000000:01:00.0",
        ),
        lg.GpuSnapshot([lg.Gpu(index=0), lg.Gpu(index=1)], "580.95.05"),
        lg.GpuSnapshot(error="no driver"),
    ],
    ids=["process", "gpu", "snapshot", "no driver"],
)
def test_values_survive_pickling_copying_and_repr(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value
    names = {"GpuProcess": lg.GpuProcess, "Gpu": lg.Gpu, "GpuSnapshot": lg.GpuSnapshot}
    assert eval(repr(value), names) == value


def test_values_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        lg.Gpu(index=0).free_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total_bytes": 1, "free_bytes": 2}, "more than total_bytes"),
        ({"utilization": 101}, "0 to 100"),
        ({"health": "fine"}, "degraded"),
        ({"health": "ok", "health_reason": "hot"}, "no health_reason"),
    ],
)
def test_refuses_values_that_cannot_be(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lg.Gpu(index=0, **wrong)  # type: ignore[arg-type]


def test_replace_refuses_a_field_that_is_not_there() -> None:
    with pytest.raises(TypeError, match="no field vram"):
        lg.Gpu(index=0).replace(vram=1)


def test_a_snapshot_is_a_sequence_of_gpus() -> None:
    gpus = (lg.Gpu(index=0), lg.Gpu(index=1))
    snapshot = lg.GpuSnapshot(gpus)
    assert tuple(snapshot) == snapshot.gpus == gpus
    assert len(snapshot) == 2


def test_a_library_that_is_not_there_is_a_result_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_GPU_NVML_LIBRARY", "/no/such/libnvidia-ml.so.1")
    snapshot = lg.snapshot_gpus()
    assert snapshot.gpus == ()
    assert snapshot.driver_version is None
    assert snapshot.error is not None
    assert "the NVIDIA driver library could not be loaded: /no/such/libnvidia-ml.so.1" in snapshot.error
    assert "LLAMA_GPU_NVML_LIBRARY" in snapshot.error


def test_importing_does_not_load_the_driver_library() -> None:
    program = "import llama_gpu; print('nvidia-ml' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_whether_process_ids_are_the_hosts_is_read_from_the_pid_namespace() -> None:
    namespace = Path("/proc/self/ns/pid").readlink().name
    assert lg.has_host_pids() == (namespace == "pid:[4026531836]")
