"""No GPU in all its ways: each time the CPU serves, and one warning says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.fake_nvml import DRIVER_NOT_LOADED, LIB_RM_VERSION_MISMATCH, FakeGpu, FakeNvml
from support.gguf_builder import write_llama
from support.proxy import running_proxy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "ant.gguf", seed=1)
    return folder


def serves_on_the_cpu_and_says_why_once(
    models: Path, folder: Path, reason: str, gpu: Mapping[str, Any], environment: Mapping[str, str]
) -> None:
    config = {"defaults": {"context_length": 512, "threads": 1}, "gpu": gpu}
    with running_proxy(models, config=config, environment=environment, folder=folder) as proxy:
        assert proxy.chat("ant").status_code == 200
        state = proxy.get("/health")
        assert (state["status"], state["mode"]) == ("ok", "cpu")
        assert [server["gpu_assignment"] for server in state["servers"]] == [None]
        assert state["gpu_pool_status"]["gpu_list"] == []
        assert state["gpu_pool_status"]["total_gpus"] == 0
        assert reason in state["gpu_pool_status"]["reason"]
        assert proxy.get("/api/gpus")["gpus"] == []
        assert proxy.terminate() == 0
        warnings = [line for line in proxy.lines if "[warning" in line]
        assert len(warnings) == 1, warnings
        assert "serving on the CPU" in warnings[0]
        assert reason in warnings[0]


def test_no_driver(models: Path, tmp_path: Path) -> None:
    environment = {"LLAMA_GPU_NVML_LIBRARY": "/nonexistent/libnvidia-ml.so.1"}
    reason = "the NVIDIA driver library could not be loaded"
    serves_on_the_cpu_and_says_why_once(models, tmp_path, reason, {}, environment)


def test_a_driver_that_lists_no_gpu(models: Path, fake_nvml: FakeNvml, tmp_path: Path) -> None:
    fake_nvml.set_gpus([])
    serves_on_the_cpu_and_says_why_once(models, tmp_path, "the driver lists no GPU", {}, {})


@pytest.mark.parametrize(
    ("code", "reason"),
    [(LIB_RM_VERSION_MISMATCH, "updated"), (DRIVER_NOT_LOADED, "driver")],
    ids=["updated under a running kernel module", "not loaded"],
)
def test_a_broken_driver(models: Path, fake_nvml: FakeNvml, tmp_path: Path, code: int, reason: str) -> None:
    fake_nvml.errors = {"nvmlInit_v2": code}
    fake_nvml.set_gpus([FakeGpu()])
    serves_on_the_cpu_and_says_why_once(models, tmp_path, reason, {"monitoring_interval": 0.05}, {})


@pytest.mark.parametrize("switch", ["enabled", "enable_gpu_monitoring"])
def test_gpus_switched_off(models: Path, fake_nvml: FakeNvml, tmp_path: Path, switch: str) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    serves_on_the_cpu_and_says_why_once(models, tmp_path, f"gpu.{switch}: false", {switch: False}, {})
    assert fake_nvml.calls() == [], "the driver is not even asked"
