"""Finding NVML, starting it and telling GPUs apart: each way it fails in the field, on the fake driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama_gpu as lg
from support.fake_nvml import (
    DRIVER_NOT_LOADED,
    GIB,
    GPU_IS_LOST,
    GPU_NOT_FOUND,
    LIB_RM_VERSION_MISMATCH,
    MIB,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    UNKNOWN,
    FakeGpu,
    FakeNvml,
    default_uuid,
    only_gpu,
)

GARBAGE = 17592186044134 * MIB  # an underflow that an interposed library really reported


def snapshot_in_child(folders: list[Path]) -> str:
    """What a process prints that looks for the library by itself."""
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}
    environment.pop("LLAMA_GPU_NVML_LIBRARY", None)
    program = (
        "import llama_gpu as lg; s = lg.snapshot_gpus(); print([g.total_bytes for g in s], s.driver_version)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


class TestStarting:
    def test_the_library_is_found_by_the_linkers_path(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.set_gpus([FakeGpu(total_bytes=8 * GIB)])
        found = snapshot_in_child([fake_nvml.library_path.parent])
        assert found == f"[{8 * GIB}] {fake_nvml.driver_version}"

    def test_a_stub_that_does_not_start_does_not_hide_the_driver_behind_it(
        self, fake_nvml_library: Path, tmp_path: Path
    ) -> None:
        for folder in ("stub", "driver"):
            (tmp_path / folder).mkdir()
        stub = FakeNvml(fake_nvml_library, tmp_path / "stub")
        stub.errors = {"nvmlInit_v2": DRIVER_NOT_LOADED}
        stub.write()
        driver = FakeNvml(fake_nvml_library, tmp_path / "driver")
        driver.set_gpus([FakeGpu(total_bytes=6 * GIB)])
        driver.library_path.rename(tmp_path / "driver" / "libnvidia-ml.so")
        found = snapshot_in_child([tmp_path / "stub", tmp_path / "driver"])
        assert found == f"[{6 * GIB}] {driver.driver_version}"

    def test_a_file_that_is_no_library_is_told_as_the_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = tmp_path / "libnvidia-ml.so.1"
        wrong.write_bytes(b"\x7fELF\x01 of the wrong class")
        monkeypatch.setenv("LLAMA_GPU_NVML_LIBRARY", str(wrong))
        error = lg.snapshot_gpus().error
        assert error is not None
        assert f"could not be loaded: {wrong}" in error

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (DRIVER_NOT_LOADED, "the NVIDIA kernel module is not loaded (NVML error 9, DRIVER_NOT_LOADED)"),
            (LIB_RM_VERSION_MISMATCH, "was updated under a running kernel module"),
            (LIB_RM_VERSION_MISMATCH, "reload the module or reboot"),
            (NO_PERMISSION, "/dev/nvidiactl"),
            (UNKNOWN, "restart the container"),
            (GPU_NOT_FOUND, "NVML error 28, GPU_NOT_FOUND"),
            (77, "does not start (NVML error 77)"),
        ],
    )
    def test_a_driver_that_refuses_is_a_result_with_cause_and_next_step(
        self, fake_nvml: FakeNvml, code: int, words: str
    ) -> None:
        fake_nvml.errors = {"nvmlInit_v2": code}
        fake_nvml.write()
        snapshot = lg.snapshot_gpus()
        assert snapshot.gpus == ()
        assert snapshot.error is not None
        assert words in snapshot.error

    def test_a_failed_start_is_not_remembered(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.errors = {"nvmlInit_v2": DRIVER_NOT_LOADED}
        fake_nvml.set_gpus([FakeGpu()])
        assert lg.snapshot_gpus().error is not None
        fake_nvml.errors = {}
        fake_nvml.write()
        snapshot = lg.snapshot_gpus()
        assert (snapshot.error, len(snapshot)) == (None, 1)

    def test_nvml_is_started_once_and_handles_are_taken_anew(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.set_gpus([FakeGpu()])
        for _ in range(5):
            assert len(lg.snapshot_gpus()) == 1
        calls = fake_nvml.calls()
        assert calls.count("nvmlInit_v2") == 1
        assert calls.count("nvmlDeviceGetHandleByIndex_v2") == 2 * 5  # asked whether it exists, then taken
        assert len({thread for _, thread, _, _ in fake_nvml.journal()}) == 1

    def test_a_session_that_breaks_is_started_anew(self, fake_nvml: FakeNvml) -> None:
        fake_nvml.set_gpus([FakeGpu()])
        assert len(lg.snapshot_gpus()) == 1
        fake_nvml.errors = {"nvmlDeviceGetCount_v2": UNKNOWN}
        fake_nvml.write()
        broken = lg.snapshot_gpus()
        assert broken.error is not None
        assert "restart the container" in broken.error
        fake_nvml.errors = {}
        fake_nvml.write()
        assert len(lg.snapshot_gpus()) == 1
        assert fake_nvml.calls().count("nvmlInit_v2") == 2


class TestWhichGpuIsWhich:
    @pytest.mark.parametrize("code", [NO_PERMISSION, 8, 11, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN])
    def test_a_gpu_that_cannot_be_opened_is_listed_and_hides_no_other(
        self, fake_nvml: FakeNvml, code: int
    ) -> None:
        closed = FakeGpu(errors={"nvmlDeviceGetHandleByIndex_v2": code})
        fake_nvml.set_gpus([closed, FakeGpu(total_bytes=8 * GIB)])
        bad, good = lg.snapshot_gpus()
        assert (bad.index, bad.health, bad.total_bytes, bad.accepts_models) == (0, "lost", None, False)
        assert bad.health_reason is not None
        assert f"NVML error {code}" in bad.health_reason
        assert (good.index, good.health, good.total_bytes) == (1, "ok", 8 * GIB)

    def test_a_known_gpu_that_fails_by_index_is_asked_by_uuid(self, fake_nvml: FakeNvml) -> None:
        assert only_gpu(fake_nvml, FakeGpu()).health == "ok"
        fake_nvml.update(0, errors={"nvmlDeviceGetHandleByIndex_v2": UNKNOWN})
        (gpu,) = lg.snapshot_gpus()
        assert (gpu.uuid, gpu.health) == (default_uuid(0), "ok")

    def test_gpus_are_known_by_uuid_when_their_order_changes(self, fake_nvml: FakeNvml) -> None:
        first = FakeGpu(uuid="GPU-a", total_bytes=8 * GIB, pci_bus_id="00000000:01:00.0")
        second = FakeGpu(uuid="GPU-b", total_bytes=16 * GIB, pci_bus_id="00000000:02:00.0")
        fake_nvml.set_gpus([first, second])
        assert [(gpu.index, gpu.uuid) for gpu in lg.snapshot_gpus()] == [(0, "GPU-a"), (1, "GPU-b")]
        fake_nvml.set_gpus([second, first])
        read = [(gpu.index, gpu.uuid, gpu.total_bytes) for gpu in lg.snapshot_gpus()]
        assert read == [(0, "GPU-b", 16 * GIB), (1, "GPU-a", 8 * GIB)]

    def test_cuda_visible_devices_hides_nothing(
        self, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        assert only_gpu(fake_nvml, FakeGpu()).accepts_models

    def test_a_name_that_is_no_utf8_is_unknown_and_costs_nothing_else(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(name="NVIDIA \udcff\udcfe"))
        assert (gpu.name, gpu.health, gpu.free_bytes) == (None, "ok", 24 * GIB)

    def test_hardware_of_the_future_is_read(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(name="NVIDIA Next", compute_capability=(37, 4)))
        assert (gpu.compute_capability, gpu.health) == ((37, 4), "ok")

    def test_a_uuid_that_is_refused_leaves_a_gpu_without_identity(self, fake_nvml: FakeNvml) -> None:
        gpu = only_gpu(fake_nvml, FakeGpu(errors={"nvmlDeviceGetUUID": NOT_SUPPORTED}))
        assert gpu.uuid == "unidentified-0"
        assert gpu.free_bytes == 24 * GIB
        assert gpu.health == "lost"
        assert gpu.health_reason is not None
        assert "UUID" in gpu.health_reason


def test_a_library_without_nvmls_symbols_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int nothing_of_nvml;\n")
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([shutil.which("cc") or "cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LLAMA_GPU_NVML_LIBRARY", str(library))
    error = lg.snapshot_gpus().error
    assert error is not None
    assert "is no NVIDIA driver library" in error
