"""Degradation and host memory end to end: a fake driver, the fake engine, /proc as witness."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import llama_gpu as lg
from llama_gpu.memory.store import FILE_VARIABLE
from support.fake_nvml import FakeGpu, FakeNvml
from support.gguf_builder import write_llama
from support.proxy import Proxy, running_proxy

FAKE_ENGINE = Path(__file__).parent / "support" / "fake_llama_server.py"
MIB = 1 << 20
OPTIONS: dict[str, Any] = {"context_length": 32768, "parallel": 2, "kv_unified": False, "micro_batch": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("big", "other")):
        write_llama(folder / f"{name}.gguf", layers=8, heads=2, context=32768, seed=seed)
    return folder


@contextmanager
def proxy_with(
    served_from: Path, folder: Path, *, options: dict[str, Any] | None = None, **sections: Any
) -> Iterator[Proxy]:
    config = {
        "engine": {"path": str(FAKE_ENGINE)},
        "defaults": {**OPTIONS, **(options or {})},
        "gpu": {"headroom_bytes": 0},
        **sections,
    }
    with running_proxy(served_from, config=config, folder=folder) as proxy:
        yield proxy


def needed(models: Path, **options: Any) -> int:
    return lg.estimate(models / "big.gguf", **{**OPTIONS, **options}).devices[0].total_bytes


def flag(proxy: Proxy, model: str, name: str) -> str:
    arguments = Path(f"/proc/{proxy.pid_of(model)}/cmdline").read_bytes().decode().split("\0")
    return arguments[arguments.index(name) + 1]


def metrics(proxy: Proxy) -> str:
    with proxy.client as client:
        return client.get("/metrics").text


def served(proxy: Proxy, model: str) -> httpx2.Response:
    answer = proxy.chat(model)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_model_that_fits_only_with_less_is_started_with_less_and_everybody_is_told(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    quantised = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    fake_nvml.set_gpus([FakeGpu(total_bytes=needed(models, context_length=12288))])
    degrade = [{"context_length": 4096}, quantised, "cpu"]
    with proxy_with(models, tmp_path, options={"degrade": degrade}) as proxy:
        said = "context_length 32768 -> 12288"
        assert served(proxy, "big").headers["x-llama-gpu-degraded"] == said
        assert flag(proxy, "big", "-c") == "12288"
        assert flag(proxy, "big", "-ctk") == "f16"
        proxy.wait_for_line(rf"\[warning.*big is degraded to get a place: {said}")
        state = proxy.get("/health")
        (server,) = state["servers"]
        assert (state["status"], server["degraded"]) == ("ok", [said])
        assert 'llama_gpu_degradations_total{kind="context_length"} 1.0' in metrics(proxy)
        assert server["gpu_assignment"]["estimated_vram_required_bytes"] == needed(
            models, context_length=12288
        )


def test_steps_add_up_to_the_cpu_and_none_of_them_is_silent(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    quantised = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    fake_nvml.set_gpus([FakeGpu(total_bytes=needed(models, context_length=4096, **quantised))])
    degrade = [{"context_length": 4096}, quantised, "cpu"]
    with proxy_with(models, tmp_path, options={"degrade": degrade}) as proxy:
        header = served(proxy, "big").headers["x-llama-gpu-degraded"]
        assert header == "context_length 32768 -> 4096, cache_type_k f16 -> q8_0, cache_type_v f16 -> q8_0"
        assert (flag(proxy, "big", "-c"), flag(proxy, "big", "-ctv")) == ("4096", "q8_0")
        fake_nvml.set_gpus([FakeGpu(total_bytes=MIB)])
        header = served(proxy, "other").headers["x-llama-gpu-degraded"]
        assert header.endswith("all layers on the CPU")
        assert flag(proxy, "other", "-ngl") == "0"
        proxy.wait_for_line(r"\[warning.*other is degraded .* all layers on the CPU")
        assert 'llama_gpu_degradations_total{kind="cpu"} 1.0' in metrics(proxy)


def test_without_a_word_in_its_configuration_a_model_gives_nothing_up(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([FakeGpu(total_bytes=needed(models) - MIB)])
    with proxy_with(models, tmp_path, models={"other": {"degrade": [{"parallel": 1}]}}) as proxy:
        error = proxy.chat("big").json()["error"]
        assert (error["code"], error["degradations_tried"]) == ("does_not_fit", [])
        assert error["short_by_bytes"] >= MIB
        assert proxy.servers() == {}
        fake_nvml.set_gpus([FakeGpu(total_bytes=needed(models) // 2)])
        tried = proxy.chat("other").json()["error"]["degradations_tried"]
        assert len(tried) == 1
        assert re.fullmatch(r"parallel 2 -> 1 \(\d+ MiB short\)", tried[0])


def test_a_model_that_others_left_room_for_again_is_not_degraded(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([FakeGpu(total_bytes=needed(models) + MIB)])
    with proxy_with(models, tmp_path, options={"degrade": [{"context_length": 256}]}) as proxy:
        served(proxy, "big")
        assert "x-llama-gpu-degraded" not in served(proxy, "other").headers
        assert proxy.servers().keys() == {"other"}


# -- the host's memory ------------------------------------------------------------------------


def host_bytes(proxy: Proxy, model: str) -> int:
    size: int = proxy.servers()[model]["estimated_host_memory_bytes"]
    return size


def test_on_a_host_with_room_for_one_model_the_idle_one_leaves(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml.set_gpus([])
    options = {"cache_ram_bytes": 64 * MIB}
    with proxy_with(models, tmp_path, options=options) as proxy:
        served(proxy, "big")
        served(proxy, "other")
        one = host_bytes(proxy, "big")
        assert proxy.servers().keys() == {"big", "other"}, "a host with room for both has both"
        host = proxy.get("/health")["host_memory"]
        assert 0 < host["available_memory_bytes"] < host["total_memory_bytes"]
        assert host["ours_memory_bytes"] > 0
        assert proxy.get("/api/gpus")["host"]["total_memory_bytes"] == host["total_memory_bytes"]
        told = re.search(r"^llama_gpu_host_memory_total_bytes (\S+)$", metrics(proxy), re.MULTILINE)
        assert told is not None
        assert float(told[1]) == host["total_memory_bytes"]
    # Without what the fake engine said that it took a claim is the estimate again.
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "nothing-yet.sqlite3"))
    memory = {"host_limit_bytes": one + 32 * MIB, "host_headroom_bytes": 0}
    with proxy_with(models, tmp_path, options=options, memory=memory) as proxy:
        served(proxy, "big")
        served(proxy, "other")
        proxy.wait_for_line("unload big: makes room for other")
        assert proxy.servers().keys() == {"other"}
        assert proxy.get("/health")["status"] == "ok"


def test_a_host_that_is_too_small_refuses_instead_of_swapping(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([])
    memory = {"host_limit_bytes": 80 * MIB, "host_headroom_bytes": 60 * MIB}
    degrade = [{"context_length": 256}, {"cache_ram_bytes": 0}]
    with proxy_with(models, tmp_path, models={"other": {"degrade": degrade}}, memory=memory) as proxy:
        answer = proxy.chat("big")
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "does_not_fit"
        assert error["free_bytes_by_gpu"] == {"host": 20 * MIB}
        assert error["required_bytes"] - 20 * MIB == error["short_by_bytes"] > 0
        assert "memory.host_headroom_bytes" in error["message"]
        assert served(proxy, "other").headers["x-llama-gpu-degraded"].startswith("context_length 32768 -> ")


def test_more_than_four_small_models_run_on_a_cpu_that_has_memory_for_them(
    fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([])
    folder = tmp_path / "models"
    folder.mkdir()
    for seed in range(5):
        write_llama(folder / f"m{seed}.gguf", seed=seed)
    with proxy_with(folder, tmp_path, options={"context_length": 256, "cache_ram_bytes": MIB}) as proxy:
        for seed in range(5):
            served(proxy, f"m{seed}")
        assert len(proxy.servers()) == 5
