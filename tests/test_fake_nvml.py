"""The fake driver has NVML's ABI: NVIDIA's own Python bindings read it, and agree with us."""

from __future__ import annotations

import llama_gpu as lg
from support.fake_nvml import GIB, MIB, FakeGpu, FakeNvml, FakeProcess
from support.nvidia_ml_py import as_they_tell, read_with_nvidia_ml_py


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
                nvlinks=["00000000:05:00.0", "00000000:03:00.0", "00000000:05:00.0"],
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
    theirs = read_with_nvidia_ml_py(fake_nvml.environment)
    snapshot = lg.snapshot_gpus()
    assert snapshot.driver_version == theirs["driver_version"]
    assert len(snapshot) == len(theirs["gpus"]) == 3
    for gpu, expected in zip(snapshot, theirs["gpus"], strict=True):
        assert as_they_tell(gpu, expected) == expected
        assert gpu.health == "ok"


def test_a_change_of_the_state_is_seen_by_the_next_reading(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(total_bytes=8 * GIB)])
    assert [gpu.free_bytes for gpu in lg.snapshot_gpus()] == [8 * GIB]
    fake_nvml.update(0, free_bytes=GIB)
    assert [(gpu.free_bytes, gpu.used_bytes) for gpu in lg.snapshot_gpus()] == [(GIB, 7 * GIB)]
    fake_nvml.set_gpus([])
    assert lg.snapshot_gpus() == lg.GpuSnapshot([], fake_nvml.driver_version)
