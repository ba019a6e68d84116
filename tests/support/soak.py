"""A day in minutes: a proxy asked for its health while GPUs come, go, hang and fill up and servers crash.

``python -m support.soak [CHECKS]`` (``make soak``) prints the figures and fails when a limit is exceeded.
The proxy is a process, the driver a fake library, the servers are scripted ones.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from pydantic import ValidationError

from llama_gpu.api.health import Health
from support.fake_nvml import GIB, MIB, FakeGpu, FakeNvml, build
from support.gguf_builder import write_llama
from support.proxy import Proxy, chat_body, running_proxy

CHECKS_IN_A_DAY = 17_280
CHECKS_PER_SECOND = 150.0
P99_SECONDS = 0.010
GROWTH_BYTES = 5_000_000
WARM_UP = 0.2
"""The part of the run after which memory is expected to stay."""

FAKE_SERVER = Path(__file__).with_name("fake_llama_server.py")
SERVERS = {
    "steady": {},
    "crashes": {"exit_after_answers": 3},
    "cut": {"exit_after_tokens": 4},
    "never": {"exit_at_load": 3},
    "slow": {"load_seconds": 0.5, "ignore_term": True},
}
EXPECTED = (200, 429, 502, 503, 504)


@dataclass
class Figures:
    """What came of a run. Times in seconds, sizes in bytes."""

    took: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def p99(self) -> float:
        return quantiles(self.took, n=100)[98]

    @property
    def growth(self) -> int:
        """From the end of the warm-up to the end, both smoothed."""
        begin = int(len(self.memory) * WARM_UP)
        part = max(1, len(self.memory) // 20)
        return round(median(self.memory[-part:]) - median(self.memory[begin : begin + part]))

    def __str__(self) -> str:
        return (
            f"{len(self.took)} health checks, {len(self.wrong)} wrong; "
            f"median {median(self.took) * 1e3:.2f} ms, "
            f"p99 {self.p99 * 1e3:.2f} ms, worst {max(self.took) * 1e3:.1f} ms; "
            f"memory {self.growth / 1e6:+.2f} MB\n{dict(sorted(self.happened.items()))}"
        )


class Weather:
    """What befalls the GPUs; the same for the same seed."""

    def __init__(self, nvml: FakeNvml, seed: int) -> None:
        self._nvml = nvml
        self._random = random.Random(seed)
        self._all = [FakeGpu(total_bytes=size * GIB) for size in (8, 24, 24, 80)]
        nvml.set_gpus(self._all)

    def change(self) -> str:
        """One thing happens to one GPU; its name."""
        gpus = len(self._nvml.gpus)
        index = self._random.randrange(gpus)
        kinds: dict[str, Callable[[], None]] = {
            "lost": lambda: self._nvml.lose(index),
            "hangs": lambda: self._nvml.hang(index),
            "well": lambda: self._nvml.bring_back(index),
            "fills up": lambda: self._nvml.update(index, free_bytes=self._random.randrange(64) * MIB),
            "empties": lambda: self._nvml.update(index, free_bytes=None, used_bytes=None),
            "hot": lambda: self._nvml.update(index, temperature=self._random.choice((40, 70, 95))),
            "silent": lambda: self._nvml.update(index, utilization=None, power_watts=None),
            "goes": lambda: self._nvml.set_gpus(self._nvml.gpus[: max(1, gpus - 1)]),
            "comes": lambda: self._nvml.set_gpus(self._nvml.gpus + self._all[gpus : gpus + 1]),
            "all well": lambda: self._nvml.set_gpus(self._all),
        }
        kind = self._random.choice(sorted(kinds))
        kinds[kind]()
        return kind

    def clear(self) -> None:
        """Everything is well again; a call that hangs returns."""
        self._nvml.set_gpus(self._all)


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[tuple[Proxy, FakeNvml]]:
    """A proxy over four fake GPUs and five models whose servers behave as ``SERVERS`` says."""
    models = folder / "models"
    models.mkdir()
    for seed, (name, script) in enumerate(SERVERS.items()):
        path = write_llama(models / f"{name}.gguf", seed=seed)
        Path(f"{path}.fake.json").write_text(json.dumps(script))
    nvml = FakeNvml(build(folder / "library"), folder)
    nvml.set_gpus([FakeGpu()])
    config = {
        "engine": {"path": str(FAKE_SERVER)},
        "gpu": {"monitoring_interval": 0.1},
        "server_pool": {"stop_timeout": 0.2, "queue_timeout": 5, "health_timeout": 20},
        "log": {"level": "error"},
    }
    with running_proxy(models, config=config, environment=nvml.environment, folder=folder) as proxy:
        yield proxy, nvml


def soak(proxy: Proxy, nvml: FakeNvml, *, checks: int, per_second: float | None, seed: int = 1) -> Figures:
    """Ask ``/health`` so many times while the weather changes and clients come and go."""
    figures = Figures()
    weather = Weather(nvml, seed)
    over = threading.Event()
    clients = threading.Thread(target=_chat_until, args=(over, proxy, figures, seed))
    host, port = proxy.url.removeprefix("http://").split(":")
    deaf = _never_reads(host, int(port))
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    clients.start()
    try:
        began = time.monotonic()
        for number in range(checks):
            if number % 60 == 0:
                figures.happened[f"GPU {weather.change()}"] += 1
            if number % 100 == 0:
                figures.memory.append(_resident_bytes(proxy.process.pid))
                _read(connection, "/metrics", figures)
            _check(connection, figures)
            if per_second is not None:
                over.wait(max(0.0, began + (number + 1) / per_second - time.monotonic()))
    finally:
        over.set()
        weather.clear()
        clients.join()
        connection.close()
        deaf.close()
    return figures


def _check(connection: http.client.HTTPConnection, figures: Figures) -> None:
    began = time.perf_counter()
    body = _read(connection, "/health", figures)
    figures.took.append(time.perf_counter() - began)
    try:
        state = Health.model_validate_json(body)
    except ValidationError as error:
        figures.wrong.append(str(error))
        return
    figures.happened[f"health {state.status}"] += 1
    if (state.status == "degraded") != bool(state.reasons):
        figures.wrong.append(f"{state.status} with the reasons {state.reasons}")


def _read(connection: http.client.HTTPConnection, path: str, figures: Figures) -> bytes:
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        figures.wrong.append(f"{path}: {answer.status} {body[:200]!r}")
    return body


def _chat_until(over: threading.Event, proxy: Proxy, figures: Figures, seed: int) -> None:
    """One client after the other; a cut answer or a refusal is an answer, a fault of ours is none."""
    chance = random.Random(seed)
    host, port = proxy.url.removeprefix("http://").split(":")
    while not over.wait(0.1):
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        body = json.dumps(chat_body(chance.choice(sorted(SERVERS)), stream=chance.random() < 0.5))
        try:
            connection.request(
                "POST", "/v1/chat/completions", body=body, headers={"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            said = answer.read()
        except (http.client.HTTPException, ConnectionError):
            figures.happened["chat cut"] += 1
        else:
            figures.happened[f"chat {answer.status}"] += 1
            if answer.status not in EXPECTED:
                figures.wrong.append(f"chat: {answer.status} {said[:300]!r}")
        finally:
            connection.close()


def _never_reads(host: str, port: int) -> socket.socket:
    """A listener of events that reads nothing."""
    deaf = socket.create_connection((host, port))
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.sendall(f"GET /api/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return deaf


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(checks: int) -> int:
    """Run and print; 1 when a limit is exceeded."""
    with tempfile.TemporaryDirectory() as folder, machine(Path(folder)) as (proxy, nvml):
        figures = soak(proxy, nvml, checks=checks, per_second=CHECKS_PER_SECOND)
        code = proxy.terminate()
    print(figures)
    faults = figures.wrong[:10]
    if code != 0:
        faults.append(f"the proxy ended with {code}")
    if figures.p99 > P99_SECONDS:
        faults.append(f"p99 is over {P99_SECONDS * 1e3:.0f} ms")
    if figures.growth > GROWTH_BYTES:
        faults.append(f"memory grew by more than {GROWTH_BYTES / 1e6:.0f} MB")
    if figures.wrong:
        print(proxy.log)
    print("\n".join(faults) or "within every limit")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else CHECKS_IN_A_DAY))
