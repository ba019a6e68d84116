"""``GET /metrics`` for Prometheus: states are read when asked for, from where they are kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from llama_gpu import __version__
from llama_gpu.api.gpus import GpuHealth, HostHealth, host_health, listed_gpus
from llama_gpu.residents import ResidentState, model_state
from llama_gpu.server import Server
from llama_gpu.supervisor import Supervisor

__all__ = ["MEDIA_TYPE", "Metrics"]

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4

ENGINE_DEADLINE_SECONDS = 0.5
"""What an engine does not tell within this time is left out of one scrape."""

# tools/server/server-context.cpp, /metrics
_TOKENS = re.compile(rb"^llamacpp:(prompt_tokens|tokens_predicted)_total ([0-9.e+]+)$", re.MULTILINE)

_GPU_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("memory_total_bytes", "All memory", "total_memory_bytes"),
    ("memory_free_bytes", "Memory that the driver calls free", "free_memory_bytes"),
    ("memory_used_bytes", "Memory in use by anybody", "used_memory_bytes"),
    ("memory_reserved_bytes", "Memory that the driver keeps for itself", "reserved_memory_bytes"),
    ("memory_ours_bytes", "Memory that our servers hold", "ours_memory_bytes"),
    ("memory_others_bytes", "Memory that other programs hold", "others_memory_bytes"),
    ("memory_available_bytes", "Memory that may still be claimed", "available_memory_bytes"),
    ("temperature_celsius", "Temperature of the die", "temperature"),
    ("power_watts", "Power draw", "power_usage"),
    ("age_seconds", "Time since the GPU answered", "age_seconds"),
)


@dataclass(frozen=True)
class Tokens:
    """An engine's own counters; they start anew with the server."""

    prompt: float
    generated: float


class Metrics:
    """Everything that is known, as Prometheus text."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def scrape(self) -> bytes:
        """The metrics in the text format that every Prometheus reads."""
        held = self._supervisor.residents().values()
        servers = [(resident.resident.model, resident.server) for resident in held]
        tokens = await _all_tokens(self._supervisor.session, servers)
        registry = CollectorRegistry()
        registry.register(_States(self._supervisor, tokens))
        registry.register(_Joined(self._supervisor.counts.registry))
        return generate_latest(registry)


class _Joined(Collector):
    """The metrics of another registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()


class _States(Collector):
    """GPUs, models and the queue as they are at this moment."""

    def __init__(self, supervisor: Supervisor, tokens: Mapping[str, Tokens]) -> None:
        self._supervisor = supervisor
        self._tokens = tokens

    def collect(self) -> Iterator[Metric]:
        supervisor = self._supervisor
        yield _one("llama_gpu_info", "The version that runs", 1, {"version": __version__})
        yield _one("llama_gpu_waiting_requests", "Queue length", supervisor.scheduler.waiting_count())
        age = supervisor.monitor.age_seconds
        yield _one("llama_gpu_snapshot_age_seconds", "Time since the GPUs were looked at", age)
        yield from _about_gpus(listed_gpus(supervisor))
        yield from _about_host(host_health(supervisor))
        yield from self._about_models()

    def _about_models(self) -> Iterator[Metric]:
        scheduler = self._supervisor.scheduler
        state = _gauge("model_state", "1 for the state that a model is in", "model", "state")
        said = _gauge("model_estimated_vram_bytes", "VRAM that a model was estimated to take", "model")
        on_host = _gauge("model_estimated_host_bytes", "Host memory that a model is promised", "model")
        held = _gauge("model_measured_vram_bytes", "VRAM that a model was measured to hold", "model")
        count = _gauge("model_servers", "Servers that load, run or stop", "model")
        active = _gauge("model_active_requests", "Requests being answered", "model")
        waiting = _gauge("model_waiting_requests", "Requests that wait for the model", "model")
        for entry in self._supervisor.catalog.models:
            model, servers = entry.id, scheduler.servers_of(entry.id)
            now = model_state(servers)
            for known in ("unloaded", *ResidentState):
                state.add_metric([model, str(known)], float(now == known))
            waiting.add_metric([model], scheduler.waiting_count(model))
            count.add_metric([model], sum(r.state is not ResidentState.MAKING_ROOM for r in servers))
            if servers:
                active.add_metric([model], sum(len(resident.active) for resident in servers))
                said.add_metric([model], sum(_bytes(r.assignment.bytes_by_gpu) for r in servers))
                on_host.add_metric([model], sum(r.assignment.host_bytes for r in servers))
                measured = [r.measured_by_gpu for r in servers if r.measured_by_gpu is not None]
                if measured:
                    held.add_metric([model], sum(map(_bytes, measured)))
        yield from (state, count, said, on_host, held, active, waiting)
        prompt = _counter("model_prompt_tokens", "Tokens of prompts, as the engine counts them", "model")
        generated = _counter("model_generated_tokens", "Tokens generated, as the engine counts them", "model")
        for model, tokens in self._tokens.items():
            prompt.add_metric([model], tokens.prompt)
            generated.add_metric([model], tokens.generated)
        yield from (prompt, generated)


def _about_gpus(listed: Sequence[GpuHealth]) -> Iterator[Metric]:
    labels = {gpu.uuid: [str(gpu.id), gpu.uuid, gpu.name or ""] for gpu in listed}
    for suffix, text, field in _GPU_GAUGES:
        gauge = _gauge(f"gpu_{suffix}", text, "gpu", "uuid", "name")
        for gpu in listed:
            if (value := getattr(gpu, field)) is not None:
                gauge.add_metric(labels[gpu.uuid], value)
        yield gauge
    busy = _gauge("gpu_utilization_fraction", "Share of time in which a kernel ran", "gpu", "uuid", "name")
    health = _gauge("gpu_health", "1 for the health that a GPU is in", "gpu", "uuid", "name", "health")
    for gpu in listed:
        if gpu.utilization is not None:
            busy.add_metric(labels[gpu.uuid], gpu.utilization / 100)
        for known in ("ok", "degraded", "lost"):
            health.add_metric([*labels[gpu.uuid], known], float(gpu.health == known))
    yield from (busy, health)


def _about_host(host: HostHealth | None) -> Iterator[Metric]:
    if host is not None:
        total, available, ours = host.total_memory_bytes, host.available_memory_bytes, host.ours_memory_bytes
        yield _one("llama_gpu_host_memory_total_bytes", "All memory of the host, or the container", total)
        yield _one("llama_gpu_host_memory_available_bytes", "Host memory that may be claimed", available)
        yield _one("llama_gpu_host_memory_ours_bytes", "Host memory that our servers hold", ours)


def _bytes(by_gpu: Mapping[str, int]) -> int:
    return sum(by_gpu.values())


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llama_gpu_{name}", text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"llama_gpu_{name}", text, labels=labels)


def _one(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=list(labels or {}))
    gauge.add_metric(list((labels or {}).values()), value)
    return gauge


async def _all_tokens(
    session: aiohttp.ClientSession, servers: Sequence[tuple[str, Server | None]]
) -> dict[str, Tokens]:
    """What the servers of each model have counted together."""
    ready = [(model, server) for model, server in servers if server and server.state == "ready"]
    answers = await asyncio.gather(*(_tokens(session, server) for _, server in ready))
    found: dict[str, Tokens] = {}
    for (model, _), tokens in zip(ready, answers, strict=True):
        if tokens is not None:
            before = found.get(model, Tokens(0, 0))
            found[model] = Tokens(before.prompt + tokens.prompt, before.generated + tokens.generated)
    return found


async def _tokens(session: aiohttp.ClientSession, server: Server) -> Tokens | None:
    headers = {"Authorization": f"Bearer {server.api_key}", "Accept-Encoding": "identity"}
    timeout = aiohttp.ClientTimeout(total=ENGINE_DEADLINE_SECONDS)
    try:
        async with session.get(f"{server.base_url}/metrics", headers=headers, timeout=timeout) as answer:
            text = await answer.read() if answer.status == HTTPStatus.OK else b""
        found = {name: float(value) for name, value in _TOKENS.findall(text)}
        return Tokens(found[b"prompt_tokens"], found[b"tokens_predicted"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
        return None
