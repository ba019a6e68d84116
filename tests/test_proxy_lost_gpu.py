"""A GPU falls off the bus, or hangs, under a model that answers: the real engine, a fake driver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from support.fake_nvml import DRIVER_NOT_LOADED, GIB, FakeGpu, FakeNvml, default_uuid
from support.gguf_builder import write_llama
from support.proxy import Proxy, chat_body, endless_body, running_proxy

HW_THERMAL_SLOWDOWN = 0x40  # nvmlClocksThrottleReasonHwThermalSlowdown

CONFIG = {
    "defaults": {"context_length": 32768, "threads": 1, "parallel": 1},
    "gpu": {"monitoring_interval": 0.2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "ant.gguf", seed=1, context=32768)
    return folder


@pytest.fixture
def proxy(models: Path, fake_nvml: FakeNvml, tmp_path: Path) -> Iterator[Proxy]:
    """Two GPUs; the smaller one fits best."""
    fake_nvml.set_gpus([FakeGpu(total_bytes=8 * GIB), FakeGpu(total_bytes=24 * GIB)])
    with running_proxy(models, config=CONFIG, folder=tmp_path) as running:
        yield running


def gpu(state: dict[str, Any], index: int) -> dict[str, Any]:
    return state["gpu_pool_status"]["gpu_list"][index]


def gpus_of(proxy: Proxy, model: str) -> list[int]:
    assignment = proxy.servers()[model]["gpu_assignment"]
    return assignment["gpu_ids"] if assignment else []


def lose_while_it_streams(proxy: Proxy, nvml: FakeNvml) -> str:
    """Loses GPU 0 under an answer; the last line that the client got."""
    with (
        proxy.client as client,
        client.stream("POST", "/v1/chat/completions", json=endless_body("ant")) as busy,
    ):
        lines = busy.iter_lines()
        assert next(lines).startswith("data: ")
        nvml.lose(0)
        return [line for line in lines if line][-1]


def test_a_gpu_lost_under_a_stream_ends_it_with_an_error_and_the_model_moves_on(
    proxy: Proxy, fake_nvml: FakeNvml
) -> None:
    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [0]
    error = json.loads(lose_while_it_streams(proxy, fake_nvml).removeprefix("data: "))["error"]
    assert error["code"] == "server_exited"
    assert "GPU 0 is lost" in error["message"]

    state = proxy.wait_until(lambda state: state["status"] == "degraded")
    assert gpu(state, 0)["health"] == "lost"
    assert gpu(state, 0)["state"] == "error"
    assert gpu(state, 0)["health_reason"] in " ".join(state["reasons"])
    assert state["mode"] == "gpu"
    assert state["gpu_pool_status"]["available_gpus"] == 1

    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [1]

    fake_nvml.bring_back(0)
    state = proxy.wait_until(lambda state: state["status"] == "ok")
    assert gpu(state, 0)["health"] == "ok"
    assert state["reasons"] == []
    fake_nvml.lose(1)
    proxy.wait_until(lambda state: not state["servers"])
    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [0], "it is used again"


def test_with_every_gpu_lost_a_model_goes_to_the_cpu_where_its_policy_allows_it(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    config = {**CONFIG, "gpu": {**CONFIG["gpu"], "cpu_fallback": True}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy:
        assert proxy.chat("ant").status_code == 200
        lose_while_it_streams(proxy, fake_nvml)
        assert proxy.chat("ant").status_code == 200
        state = proxy.get("/health")
        assert state["status"] == "degraded"
        assert state["mode"] == "cpu"
        assert [server["gpu_assignment"] for server in state["servers"]] == [None]
        environment = Path(f"/proc/{proxy.pid_of('ant')}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=" in environment


def test_requests_that_wait_for_a_server_on_a_lost_gpu_are_served_by_the_next(
    proxy: Proxy, fake_nvml: FakeNvml
) -> None:
    with (
        proxy.client as client,
        client.stream("POST", "/v1/chat/completions", json=chat_body("ant", stream=True)) as answer,
    ):
        assert answer.status_code == 200
        fake_nvml.lose(0)
        assert proxy.chat("ant").status_code == 200
    proxy.wait_until(lambda state: gpu(state, 0)["health"] == "lost")
    proxy.wait_for_line("unload ant: GPU 0 is lost")
    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [1]


@pytest.mark.parametrize("trouble", [{"temperature": 95}, {"throttle": HW_THERMAL_SLOWDOWN}], ids=str)
def test_a_gpu_that_is_hot_or_slowed_down_is_avoided_while_there_is_another(
    proxy: Proxy, fake_nvml: FakeNvml, trouble: dict[str, int]
) -> None:
    fake_nvml.update(0, **trouble)
    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [1]
    state = proxy.get("/health")
    assert state["status"] == "ok", "it could still be used"
    assert (gpu(state, 0)["health"] == "degraded") == ("throttle" in trouble)
    fake_nvml.lose(1)
    proxy.wait_until(lambda state: not state["servers"])
    assert proxy.chat("ant").status_code == 200
    assert gpus_of(proxy, "ant") == [0], "where there is no choice it is used"


def test_a_driver_library_that_fails_as_a_whole_ends_no_server(proxy: Proxy, fake_nvml: FakeNvml) -> None:
    assert proxy.chat("ant").status_code == 200
    served_by = proxy.pid_of("ant")
    fake_nvml.errors = {"nvmlInit_v2": DRIVER_NOT_LOADED, "nvmlDeviceGetCount_v2": DRIVER_NOT_LOADED}
    fake_nvml.write()
    state = proxy.wait_until(lambda state: state["status"] == "degraded")
    assert state["reasons"]
    assert proxy.chat("ant").status_code == 200
    assert proxy.pid_of("ant") == served_by
    fake_nvml.errors = {}
    fake_nvml.write()
    proxy.wait_until(lambda state: state["status"] == "ok")
    assert proxy.pid_of("ant") == served_by


def test_a_gpu_that_hangs_keeps_health_quick_the_others_fresh_and_the_end_clean(
    proxy: Proxy, fake_nvml: FakeNvml
) -> None:
    fake_nvml.hang(0)
    try:
        state = proxy.wait_until(lambda state: gpu(state, 0)["health"] == "lost")
        took = []
        with proxy.client as client:
            for _ in range(200):
                began = time.perf_counter()
                answer = client.get("/health")
                took.append(time.perf_counter() - began)
                state = answer.json()
                assert answer.status_code == 200
                assert gpu(state, 0)["total_memory_bytes"] == 8 * GIB, "the last values stay"
        print(f"/health with a hanging GPU: median {median(took) * 1e3:.2f} ms, worst {max(took) * 1e3:.2f}")
        assert gpu(state, 0)["age_seconds"] > gpu(state, 1)["age_seconds"]
        assert gpu(state, 0)["uuid"] == default_uuid(0)
        seen = gpu(state, 1)["temperature"]
        fake_nvml.update(1, temperature=seen + 1)
        proxy.wait_until(lambda state: gpu(state, 1)["temperature"] == seen + 1)
        assert proxy.chat("ant").status_code == 200
        assert gpus_of(proxy, "ant") == [1]
        assert proxy.terminate() == 0
        assert "Traceback" not in proxy.log
    finally:
        fake_nvml.bring_back(0)
