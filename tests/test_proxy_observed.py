"""What can be seen of a running proxy: GPUs, events, metrics and the document that describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.fake_nvml import GIB, FakeGpu, FakeNvml, FakeProcess, default_uuid
from support.gguf_builder import write_llama
from support.proxy import Proxy, endless_body, running_proxy

CONFIG = {
    "defaults": {"context_length": 32768, "threads": 1, "parallel": 1},
    "gpu": {"monitoring_interval": 0.2},
}
DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "ant.gguf", seed=1, context=32768)
    write_llama(folder / "bee.gguf", seed=2, context=32768)
    return folder


@pytest.fixture
def proxy(models: Path, fake_nvml: FakeNvml, tmp_path: Path) -> Iterator[Proxy]:
    others = FakeProcess(pid=1, used_bytes=2 * GIB)
    fake_nvml.set_gpus([FakeGpu(used_bytes=2 * GIB, processes=[others], utilization=37), FakeGpu()])
    with running_proxy(models, config=CONFIG, folder=tmp_path) as running:
        yield running


def metrics(proxy: Proxy) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample by name and labels."""
    with proxy.client as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of_gpu(samples: dict[tuple[tuple[str, str], ...], float], index: int, **labels: str) -> float:
    wanted = {"gpu": str(index), **labels}.items()
    (value,) = [value for key, value in samples.items() if wanted <= dict(key).items()]
    return value


def test_the_metrics_say_what_gpus_models_and_decisions_do(proxy: Proxy) -> None:
    assert proxy.chat("ant", max_tokens=8, ignore_eos=True).status_code == 200
    assert proxy.chat("nobody").status_code == 404
    seen = metrics(proxy)
    assert of_gpu(seen["llama_gpu_gpu_memory_total_bytes"], 0) == 24 * GIB
    used = of_gpu(seen["llama_gpu_gpu_memory_used_bytes"], 0)
    ours = of_gpu(seen["llama_gpu_gpu_memory_ours_bytes"], 0)
    assert of_gpu(seen["llama_gpu_gpu_memory_others_bytes"], 0) == used - ours
    assert of_gpu(seen["llama_gpu_gpu_utilization_fraction"], 0) == pytest.approx(0.37)
    assert of_gpu(seen["llama_gpu_gpu_health"], 1, health="ok") == 1
    assert of_gpu(seen["llama_gpu_gpu_temperature_celsius"], 1) == 40
    assert of_gpu(seen["llama_gpu_gpu_age_seconds"], 1) >= 0
    ant = (("model", "ant"),)
    assigned = proxy.servers()["ant"]["gpu_assignment"]
    assert seen["llama_gpu_model_estimated_vram_bytes"][ant] == assigned["estimated_vram_required_bytes"]
    assert seen["llama_gpu_model_state"][(("model", "ant"), ("state", "ready"))] == 1
    assert seen["llama_gpu_model_state"][(("model", "bee"), ("state", "unloaded"))] == 1
    assert seen["llama_gpu_model_requests_total"][(("model", "ant"), ("status", "200"))] == 1
    assert seen["llama_gpu_model_generated_tokens_total"][ant] == 8
    assert seen["llama_gpu_model_prompt_tokens_total"][ant] > 0
    assert seen["llama_gpu_load_seconds_count"][ant] == 1
    assert seen["llama_gpu_load_seconds_sum"][ant] > 0
    assert seen["llama_gpu_decision_seconds_count"][(("outcome", "load"),)] == 1
    assert seen["llama_gpu_waiting_requests"][()] == 0


def test_failures_and_evictions_are_counted_by_kind(proxy: Proxy, fake_nvml: FakeNvml) -> None:
    assert proxy.chat("ant").status_code == 200
    (index,) = proxy.servers()["ant"]["gpu_assignment"]["gpu_ids"]
    fake_nvml.lose(index)
    proxy.wait_until(lambda state: state["status"] == "degraded" and not state["servers"])
    fake_nvml.lose(1 - index)
    proxy.wait_until(lambda state: state["mode"] == "cpu")
    assert proxy.chat("ant").status_code == 503
    seen = metrics(proxy)
    assert seen["llama_gpu_evictions_total"] == {(("reason", "gpu_lost"),): 1}
    assert seen["llama_gpu_failures_total"] == {(("kind", "does_not_fit"),): 1}
    assert of_gpu(seen["llama_gpu_gpu_health"], index, health="lost") == 1
    lost = [dict(key)["gpu"] for key in seen.get("llama_gpu_gpu_temperature_celsius", {})]
    assert lost == [], "what is not known is left out"


def test_gpus_are_listed_with_whose_memory_they_hold(proxy: Proxy) -> None:
    state = proxy.get("/api/gpus")
    first = state["gpus"][0]
    assert first["uuid"] == default_uuid(0)
    assert first["ours_memory_bytes"] == 0
    assert first["others_memory_bytes"] == first["used_memory_bytes"] == 2 * GIB
    assert first["state"] == "available"
    assert state["driver_version"]
    assert state["error"] is None


def next_event(lines: Iterator[str]) -> dict[str, Any]:
    return json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))


def test_events_tell_how_a_model_comes_and_how_a_lost_gpu_takes_it_along(
    proxy: Proxy, fake_nvml: FakeNvml
) -> None:
    with proxy.client as client, client.stream("GET", "/api/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        present = [next_event(lines), next_event(lines)]
        assert [(event["id"], event["state"]) for event in present] == [(0, "available"), (1, "available")]
        assert proxy.chat("ant").status_code == 200
        coming = [next_event(lines) for _ in range(3)]
        assert [event["state"] for event in coming] == ["assigned", "starting", "running"]
        index = coming[0]["id"]
        assert coming[1]["gpu_ids"] == [index]
        fake_nvml.lose(index)
        leaving = [next_event(lines) for _ in range(3)]
        servers = [event for event in leaving if event["kind"] == "server"]
        gpus = [event for event in leaving if event["kind"] == "gpu"]
        assert [(event["previous"], event["state"]) for event in servers] == [
            ("running", "error"),
            ("error", "stopped"),
        ]
        assert f"GPU {index} is lost" in servers[0]["reason"]
        assert [(event["id"], event["previous"], event["state"]) for event in gpus] == [
            (index, "assigned", "error")
        ]
        fake_nvml.bring_back(index)
        assert (next_event(lines)["state"]) == "available"


def test_the_event_stream_ends_when_the_proxy_does(proxy: Proxy) -> None:
    with proxy.client as client, client.stream("GET", "/api/events") as answer:
        lines = answer.iter_lines()
        next_event(lines)
        proxy.process.terminate()
        for line in lines:
            assert line.startswith((":", "event:", "data:")) or not line
    assert proxy.process.wait(timeout=20) == 0


def test_health_with_a_busy_server_satisfies_the_published_schema(proxy: Proxy) -> None:
    with (
        proxy.client as client,
        client.stream("POST", "/v1/chat/completions", json=endless_body("ant")) as busy,
    ):
        lines = busy.iter_lines()
        assert next(lines).startswith("data: ")
        state = proxy.get("/health")
    (server,) = state["servers"]
    assert server["active_requests"] == 1
    assert server["gpu_assignment"]["n_gpu_layers"] > 0


def test_the_document_names_our_routes_and_the_page_shows_them_without_the_internet(proxy: Proxy) -> None:
    document = proxy.get("/openapi.json")
    assert set(document["paths"]) == {
        "/health", "/v1/models", "/v1/models/{id}", "/api/gpus", "/api/plan", "/api/events", "/metrics",
    }  # fmt: skip
    health = document["components"]["schemas"]["GpuHealth"]["properties"]
    assert health["id"]["minimum"] == 0
    assert {"maximum": 100, "minimum": 0, "type": "number"} in health["utilization"]["anyOf"]
    port = document["components"]["schemas"]["ServerHealth"]["properties"]["port"]
    assert (port["minimum"], port["maximum"]) == (1, 65535)
    with proxy.client as client:
        page = client.get("/docs")
        unknown = client.get("/v1/models/nobody")
    assert page.headers["content-type"].startswith("text/html")
    assert "GET /api/gpus" in page.text
    assert not re.search(r"(src|href)=.https?:", page.text)
    assert unknown.status_code == 404
    assert set(unknown.json()["error"]["known_models"]) == {"ant", "bee"}


def test_the_dashboard_asks_only_for_metrics_that_there_are(proxy: Proxy, fake_nvml: FakeNvml) -> None:
    assert proxy.chat("ant").status_code == 200
    fake_nvml.lose(proxy.servers()["ant"]["gpu_assignment"]["gpu_ids"][0])
    proxy.wait_until(lambda state: not state["servers"])
    assert proxy.chat("bee").status_code == 200
    with proxy.client as client:
        kinds = {line.split()[2] for line in client.get("/metrics").text.splitlines() if line[:6] == "# TYPE"}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 15
    for query in queries:
        asked = set(re.findall(r"llama_gpu_\w+", query))
        assert asked, query
        for name in asked:
            stem = re.sub(r"_(bucket|count|sum)$", "", name)
            assert {name, stem} & kinds, f"{query} asks for {name}, which is not there"


def test_metrics_need_the_key_and_health_does_not(models: Path, tmp_path: Path) -> None:
    with running_proxy(models, config={"server": {"api_keys": ["k"]}}, folder=tmp_path) as proxy:
        assert httpx2.get(f"{proxy.url}/metrics").status_code == 401
        assert httpx2.get(f"{proxy.url}/metrics", headers={"Authorization": "Bearer k"}).status_code == 200
        assert httpx2.get(f"{proxy.url}/health").status_code == 200
