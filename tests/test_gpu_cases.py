"""What a GPU tells, and does not tell: each case that is met in the field, on the fake driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llama_gpu as lg
from support.fake_nvml import (
    FUNCTION_NOT_FOUND,
    GIB,
    GPU_IS_LOST,
    MIB,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    UNKNOWN,
    FakeGpu,
    FakeNvml,
    FakeProcess,
    build,
    default_uuid,
    only_gpu,
)

GARBAGE = 17592186044134 * MIB  # an underflow that an interposed library really reported


def driver_of(symbols: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A driver that lacks some symbols."""
    library = build(folder / "built", symbols)
    fake = FakeNvml(library, folder)
    monkeypatch.setenv("LLAMA_GPU_NVML_LIBRARY", str(fake.library_path))
    return fake


class TestMemory:
    def test_reserved_memory_is_not_used_memory(self, fake_nvml: FakeNvml) -> None:
        idle_t4 = FakeGpu(total_bytes=15360 * MIB, reserved_bytes=448 * MIB, free_bytes=14912 * MIB)
        gpu = only_gpu(fake_nvml, idle_t4)
        assert (gpu.reserved_bytes, gpu.used_bytes, gpu.free_bytes) == (448 * MIB, 0, 14912 * MIB)

    @pytest.mark.parametrize("code", [FUNCTION_NOT_FOUND, 25, UNKNOWN])
    def test_version_1_is_asked_where_version_2_is_refused(self, fake_nvml: FakeNvml, code: int) -> None:
        refused = FakeGpu(
            total_bytes=10 * GIB,
            reserved_bytes=GIB,
            used_bytes=2 * GIB,
            errors={"nvmlDeviceGetMemoryInfo_v2": code},
        )
        gpu = only_gpu(fake_nvml, refused)
        assert (gpu.total_bytes, gpu.free_bytes, gpu.used_bytes) == (10 * GIB, 7 * GIB, 3 * GIB)
        assert gpu.reserved_bytes is None

    def test_a_driver_before_510_has_no_version_2_and_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = driver_of("-DOLD_DRIVER", tmp_path, monkeypatch)
        fake.driver_version = "470.256.02"
        gpu = only_gpu(
            fake,
            FakeGpu(
                total_bytes=10 * GIB,
                reserved_bytes=GIB,
                used_bytes=2 * GIB,
                processes=[FakeProcess(pid=8, used_bytes=2 * GIB)],
            ),
        )
        assert (gpu.free_bytes, gpu.used_bytes, gpu.reserved_bytes) == (7 * GIB, 3 * GIB, None)
        assert gpu.processes == (lg.GpuProcess(8, 2 * GIB),)
        assert gpu.health == "ok"

    @pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 5090", "NVIDIA GB100"])
    def test_not_supported_on_a_discrete_gpu_is_unknown_and_not_the_systems_memory(
        self, fake_nvml: FakeNvml, name: str
    ) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(name=name, total_bytes=None))
        assert (gpu.total_bytes, gpu.free_bytes, gpu.unified) == (None, None, False)
        assert (gpu.health, gpu.accepts_models) == ("degraded", False)

    def test_a_gb10_shares_the_systems_memory(self, fake_nvml: FakeNvml) -> None:
        processes = [FakeProcess(pid=5, used_bytes=GIB), FakeProcess(pid=6, used_bytes=2 * GIB)]
        gpu = only_gpu(fake_nvml, FakeGpu(name="NVIDIA GB10", total_bytes=None, processes=processes))
        assert gpu.unified
        assert gpu.health == "ok"
        assert gpu.total_bytes is not None
        assert gpu.free_bytes is not None
        assert 0 < gpu.free_bytes <= gpu.total_bytes
        assert gpu.used_bytes == 3 * GIB

    def test_zeros_with_success_are_not_supported(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(name="Orin (nvgpu)", total_bytes=0))
        assert gpu.unified
        assert gpu.total_bytes

    def test_impossible_sizes_are_unknown(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(total_bytes=8 * GIB, free_bytes=4 * GIB, used_bytes=GARBAGE))
        assert (gpu.total_bytes, gpu.free_bytes, gpu.used_bytes) == (8 * GIB, 4 * GIB, None)
        gpu = only_gpu(fake_nvml, FakeGpu(total_bytes=8 * GIB, free_bytes=GARBAGE, used_bytes=0))
        assert gpu.free_bytes is None
        assert not gpu.accepts_models

    def test_memory_that_fails_leaves_the_rest_of_the_gpu(self, fake_nvml: FakeNvml) -> None:
        errors = {"nvmlDeviceGetMemoryInfo_v2": UNKNOWN, "nvmlDeviceGetMemoryInfo": UNKNOWN}
        gpu = only_gpu(fake_nvml, FakeGpu(errors=errors, temperature=55))
        assert (gpu.health, gpu.free_bytes, gpu.temperature) == ("degraded", None, 55)


class TestProcesses:
    def test_memory_that_is_not_told_is_unknown_and_the_process_stays(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(processes=[FakeProcess(pid=31, used_bytes=None)]))
        assert gpu.processes == (lg.GpuProcess(31, None),)

    def test_a_process_in_both_lists_counts_once_with_the_larger_value(self, fake_nvml: FakeNvml) -> None:
        processes = [
            FakeProcess(pid=9, used_bytes=2 * GIB),
            FakeProcess(pid=9, used_bytes=3 * GIB, kind="graphics"),
            FakeProcess(pid=9, used_bytes=None),
        ]
        assert only_gpu(fake_nvml, FakeGpu(processes=processes)).processes == (lg.GpuProcess(9, 3 * GIB),)

    def test_a_process_that_is_gone_is_no_error(self, fake_nvml: FakeNvml) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        gpu = only_gpu(fake_nvml, FakeGpu(processes=[FakeProcess(pid=gone.pid, used_bytes=1)]))
        assert gpu.processes == (lg.GpuProcess(gone.pid, 1),)

    def test_a_list_that_grows_while_it_is_read_is_read_again(self, fake_nvml: FakeNvml) -> None:
        processes = [FakeProcess(pid=pid, used_bytes=pid) for pid in range(1, 31)]
        gpu = only_gpu(fake_nvml, FakeGpu(processes=processes, growth=(10, 2)))
        assert gpu.processes is not None
        assert [process.pid for process in gpu.processes] == list(range(1, 31))

    @pytest.mark.parametrize("driver", ["535.43.02", "535.54.03", "535.85"])
    def test_drivers_that_scramble_version_3_are_asked_for_version_2(
        self, fake_nvml: FakeNvml, driver: str
    ) -> None:
        fake_nvml.driver_version = driver
        processes = [FakeProcess(pid=pid, used_bytes=pid * MIB) for pid in range(100, 140)]
        gpu = only_gpu(fake_nvml, FakeGpu(processes=processes))
        assert gpu.processes == tuple(lg.GpuProcess(pid, pid * MIB) for pid in range(100, 140))
        assert "nvmlDeviceGetComputeRunningProcesses_v3" not in fake_nvml.calls()

    def test_the_driver_that_repaired_version_3_is_asked_for_it(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.driver_version = "535.86.05"
        assert only_gpu(fake_nvml, FakeGpu(processes=[FakeProcess(pid=1, used_bytes=1)])).processes
        assert "nvmlDeviceGetComputeRunningProcesses_v3" in fake_nvml.calls()

    def test_process_ids_that_cannot_be_are_dropped(self, fake_nvml: FakeNvml) -> None:
        pids = [0, 7, 4_000_000_000]
        gpu = only_gpu(fake_nvml, FakeGpu(processes=[FakeProcess(pid=pid, used_bytes=1) for pid in pids]))
        assert gpu.processes == (lg.GpuProcess(7, 1),)

    @pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, UNKNOWN])
    def test_a_list_that_is_refused_is_unknown_and_not_empty(self, fake_nvml: FakeNvml, code: int) -> None:
        errors = {
            f"nvmlDeviceGet{kind}RunningProcesses_{version}": code
            for kind in ("Compute", "Graphics")
            for version in ("v2", "v3")
        }
        gpu = only_gpu(fake_nvml, FakeGpu(errors=errors))
        assert (gpu.processes, gpu.health) == (None, "ok")
        assert only_gpu(fake_nvml, FakeGpu()).processes == ()

    def test_memory_of_a_process_beyond_the_gpus_is_unknown(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(processes=[FakeProcess(pid=3, used_bytes=GARBAGE)]))
        assert gpu.processes == (lg.GpuProcess(3, None),)


class TestMig:
    def slice_of(self, slot: int, **changes: object) -> FakeGpu:
        return FakeGpu(
            uuid=f"MIG-{slot}",
            name="NVIDIA A100-SXM4-40GB MIG 1g.5gb",
            total_bytes=5 * GIB,
            utilization=None,
            temperature=None,
            power_watts=None,
            **changes,  # type: ignore[arg-type]
        )

    def parent(self, **changes: object) -> FakeGpu:
        return FakeGpu(
            uuid="GPU-parent",
            name="NVIDIA A100-SXM4-40GB",
            compute_capability=(8, 0),
            mig_slots=7,
            **changes,  # type: ignore[arg-type]
        )

    def test_mig_devices_stand_in_place_of_their_gpu_with_holes_between_them(
        self, fake_nvml: FakeNvml
    ) -> None:
        slices = {slot: self.slice_of(slot) for slot in (0, 2, 6)}
        fake_nvml.set_gpus([FakeGpu(uuid="GPU-plain"), self.parent(migs=slices)])
        plain, *read = lg.snapshot_gpus()
        assert (plain.mig, plain.parent_uuid) == (False, None)
        assert [gpu.uuid for gpu in read] == ["MIG-0", "MIG-2", "MIG-6"]
        for gpu in read:
            assert (gpu.mig, gpu.parent_uuid, gpu.index) == (True, "GPU-parent", 1)
            assert (gpu.total_bytes, gpu.utilization, gpu.compute_capability) == (5 * GIB, None, (8, 0))
            assert gpu.health == "ok"

    def test_a_parent_that_may_not_be_asked_does_not_hide_its_slices(self, fake_nvml: FakeNvml) -> None:
        errors = dict.fromkeys(
            (
                "nvmlDeviceGetMemoryInfo_v2",
                "nvmlDeviceGetMemoryInfo",
                "nvmlDeviceGetComputeRunningProcesses_v3",
            ),
            NO_PERMISSION,
        )
        gpu = only_gpu(fake_nvml, self.parent(errors=errors, migs={3: self.slice_of(3)}))
        assert (gpu.uuid, gpu.free_bytes, gpu.health) == ("MIG-3", 5 * GIB, "ok")

    def test_uuids_of_drivers_before_470_are_taken_as_they_are(self, fake_nvml: FakeNvml) -> None:
        old = "MIG-GPU-11111111-2222-3333-4444-555555555555/7/0"
        fake_nvml.set_gpus([self.parent(migs={0: FakeGpu(uuid=old, total_bytes=5 * GIB)})])
        assert [gpu.uuid for gpu in lg.snapshot_gpus()] == [old]

    def test_mig_without_devices_is_a_gpu_that_takes_no_model_and_says_why(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, self.parent())
        assert (gpu.uuid, gpu.mig, gpu.accepts_models, gpu.health) == ("GPU-parent", False, False, "degraded")
        assert gpu.health_reason is not None
        assert "nvidia-smi mig" in gpu.health_reason

    def test_mig_devices_come_and_go(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.set_gpus([self.parent(migs={0: self.slice_of(0)})])
        assert [gpu.uuid for gpu in lg.snapshot_gpus()] == ["MIG-0"]
        fake_nvml.set_gpus([self.parent(migs={1: self.slice_of(1), 2: self.slice_of(2)})])
        assert [gpu.uuid for gpu in lg.snapshot_gpus()] == ["MIG-1", "MIG-2"]
        fake_nvml.update(0, mig_slots=0, migs={})
        assert [gpu.uuid for gpu in lg.snapshot_gpus()] == ["GPU-parent"]


class TestFailingGpus:
    @pytest.mark.parametrize(
        ("code", "words"), [(GPU_IS_LOST, "fallen off the bus"), (RESET_REQUIRED, "needs a reset")]
    )
    def test_a_lost_gpu_keeps_its_identity_takes_no_model_and_comes_back(
        self, fake_nvml: FakeNvml, code: int, words: str
    ) -> None:
        fake_nvml.set_gpus([FakeGpu(free_bytes=GIB), FakeGpu(name="other")])
        assert [gpu.health for gpu in lg.snapshot_gpus()] == ["ok", "ok"]
        fake_nvml.update(0, errors={"*": code})
        lost, other = lg.snapshot_gpus()
        assert (lost.uuid, lost.name, lost.total_bytes) == (default_uuid(0), "NVIDIA Fake 4090", 24 * GIB)
        assert (lost.health, lost.free_bytes, lost.accepts_models) == ("lost", None, False)
        assert lost.health_reason is not None
        assert words in lost.health_reason
        assert other.health == "ok"
        fake_nvml.bring_back(0)
        assert [gpu.health for gpu in lg.snapshot_gpus()] == ["ok", "ok"]

    @pytest.mark.parametrize(
        "call",
        [
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetName",
            "nvmlDeviceGetTemperature",
        ],
    )
    def test_a_gpu_lost_between_two_calls_is_lost(self, fake_nvml: FakeNvml, call: str) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(errors={call: GPU_IS_LOST}))
        assert (gpu.uuid, gpu.health, gpu.free_bytes) == (default_uuid(0), "lost", None)

    def test_a_null_handle_is_not_used(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.set_gpus([FakeGpu(null_handle=True), FakeGpu()])
        lost, good = lg.snapshot_gpus()
        assert (lost.health, good.health) == ("lost", "ok")

    @pytest.mark.parametrize(
        ("call", "field"),
        [
            ("nvmlDeviceGetPowerUsage", "power_watts"),
            ("nvmlDeviceGetTemperature", "temperature"),
            ("nvmlDeviceGetUtilizationRates", "utilization"),
            ("nvmlDeviceGetCudaComputeCapability", "compute_capability"),
            ("nvmlDeviceGetPciInfo_v3", "pci_bus_id"),
            ("nvmlDeviceGetName", "name"),
        ],
    )
    def test_a_value_that_is_not_supported_costs_that_value_only(
        self, fake_nvml: FakeNvml, call: str, field: str
    ) -> None:
        whole = only_gpu(fake_nvml, FakeGpu(utilization=0)).fields()
        errors = {call: UNKNOWN}
        fake_nvml.update(0, errors=errors)
        (gpu,) = lg.snapshot_gpus()
        expected = {**whole, field: None}
        if field == "pci_bus_id":
            expected = whole  # remembered from before
        assert gpu.fields() == expected

    def test_zero_is_a_value_and_not_unknown(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(utilization=0, temperature=0, power_watts=0.0, used_bytes=0))
        assert (gpu.utilization, gpu.temperature, gpu.power_watts, gpu.used_bytes) == (0, 0, 0.0, 0)

    def test_garbage_with_success_is_unknown(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(power_watts=3_700_000, utilization=4000, temperature=65_000))
        assert (gpu.power_watts, gpu.utilization, gpu.temperature) == (None, None, None)
        assert gpu.health == "ok"

    def test_the_temperature_is_read_where_its_old_call_is_gone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = driver_of("-DWITHOUT_TEMPERATURE", tmp_path, monkeypatch)
        assert only_gpu(fake, FakeGpu(temperature=66)).temperature == 66

    @pytest.mark.parametrize(
        ("throttle", "words"), [(0x20, "too hot"), (0x40, "too hot"), (0x80, "power supply")]
    )
    def test_a_gpu_that_slows_itself_down_is_degraded_and_usable(
        self, fake_nvml: FakeNvml, throttle: int, words: str
    ) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(throttle=throttle, temperature=93))
        assert (gpu.health, gpu.accepts_models) == ("degraded", True)
        assert gpu.health_reason is not None
        assert words in gpu.health_reason

    def test_an_idle_clock_or_a_power_cap_is_no_fault(self, fake_nvml: FakeNvml) -> None:
        assert only_gpu(fake_nvml, FakeGpu(throttle=0x1 | 0x4)).health == "ok"

    def test_wsl2_tells_little_and_is_used(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(
            fake_nvml,
            FakeGpu(
                total_bytes=8 * GIB,
                free_bytes=6 * GIB,
                utilization=None,
                errors={"nvmlDeviceGetMemoryInfo_v2": UNKNOWN},
                processes=[FakeProcess(pid=44, used_bytes=None)],
            ),
        )
        assert (gpu.free_bytes, gpu.used_bytes, gpu.utilization) == (6 * GIB, 2 * GIB, None)
        assert gpu.processes == (lg.GpuProcess(44, None),)
        assert gpu.accepts_models
