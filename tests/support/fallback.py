"""What having no GPU costs: ``python -m support.fallback [ROUNDS]`` (``make bench-fallback``).

The same proxy five times, each with the real engine on a small model: GPU code switched off, and every way
in which a machine has no GPU. They take turns in short rounds, so that whatever else the machine does
befalls all of them. The ratios are medians over rounds, with the range in which 95 of 100 such medians
lie; fails when one costs surely more than two percent.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from support.fake_nvml import LIB_RM_VERSION_MISMATCH, FakeGpu, FakeNvml, build
from support.gguf_builder import write_llama
from support.proxy import Proxy, running_proxy

ROUNDS = 300
REQUESTS = 20
ALLOWED_FRACTION = 0.02
BASELINE = "gpu.enabled: false"
BODY = json.dumps({"model": "ant", "content": "Hello"})


@dataclass
class Contender:
    """One proxy and what its rounds took: seconds by the clock, seconds of its processor time."""

    proxy: Proxy
    connection: http.client.HTTPConnection
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def run(self, requests: int) -> None:
        busy, began = self._processor_seconds(), time.perf_counter()
        for _ in range(requests):
            self.connection.request("POST", "/tokenize", BODY, {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            answer.read()
            assert answer.status == http.client.OK
        self.clock.append(time.perf_counter() - began)
        self.processor.append(self._processor_seconds() - busy)

    def _processor_seconds(self) -> float:
        tasks = Path(f"/proc/{self.proxy.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@dataclass(frozen=True)
class Gain:
    """How much quicker than the baseline, as a fraction: the median over rounds and its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, base: Sequence[float], own: Sequence[float]) -> Gain:
        ratios = [b / o - 1 for b, o in zip(base, own, strict=True)]
        chance = random.Random(1)
        drawn = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
        return cls(median(ratios), drawn[25], drawn[974])

    def __str__(self) -> str:
        return f"{self.median:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def compare(folder: Path, rounds: int) -> dict[str, Contender]:
    """Run every way to have no GPU in turns; the contenders by name."""
    models = folder / "models"
    models.mkdir()
    write_llama(models / "ant.gguf", seed=1)
    library = build(folder / "library")
    empty, broken = (FakeNvml(library, _made(folder / name)) for name in ("empty", "broken"))
    broken.errors = {"nvmlInit_v2": LIB_RM_VERSION_MISMATCH}
    broken.set_gpus([FakeGpu()])
    ways: dict[str, tuple[dict[str, Any], Mapping[str, str]]] = {
        BASELINE: ({"enabled": False}, {}),
        "gpu.enable_gpu_monitoring: false": ({"enable_gpu_monitoring": False}, {}),
        "no driver": ({}, {"LLAMA_GPU_NVML_LIBRARY": "/nonexistent/libnvidia-ml.so.1"}),
        "a driver without GPUs": ({}, empty.environment),
        "a broken driver": ({}, broken.environment),
    }
    with contextlib.ExitStack() as stack:
        contenders = {}
        for number, (name, (gpu, environment)) in enumerate(ways.items()):
            config = {"defaults": {"context_length": 512, "threads": 1}, "gpu": gpu}
            own = _made(folder / str(number))
            proxy = stack.enter_context(
                running_proxy(models, config=config, environment=environment, folder=own)
            )
            host, port = proxy.url.removeprefix("http://").split(":")
            contenders[name] = Contender(proxy, http.client.HTTPConnection(host, int(port), timeout=60))
        turns = list(contenders.values())
        for contender in turns:
            contender.run(REQUESTS)
            contender.clock.clear()
            contender.processor.clear()
        for _ in range(rounds):
            random.shuffle(turns)
            for contender in turns:
                contender.run(REQUESTS)
        return contenders


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main(rounds: int) -> int:
    """Run and print; 1 when a way to have no GPU costs more than is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = compare(Path(folder), rounds)
    base = contenders[BASELINE]
    code = 0
    for name, contender in contenders.items():
        clock = Gain.of(base.clock, contender.clock)
        processor = Gain.of(base.processor, contender.processor)
        too_slow = max(clock.high, processor.high) < -ALLOWED_FRACTION
        code |= too_slow
        print(
            f"{name:34s} {REQUESTS / median(contender.clock):6.0f} requests/s {clock}   "
            f"{median(contender.processor) / REQUESTS * 1e6:5.0f} µs of processor each {processor}"
            f"{'   TOO SLOW' if too_slow else ''}"
        )
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
