"""Real loads by a real llama-server: what an estimate says, beside what the load took."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import llama_gpu as lg
from llama_gpu.buffer_lines import LoadedBuffers
from llama_gpu.launch import Engine, plan_launch
from llama_gpu.server import Server

MIB = 1 << 20
# Every line is printed in hundredths of a MiB, and a device has a few of each kind.
ROUNDING = MIB // 16


@dataclass(frozen=True)
class Compared:
    """One device of a load, in bytes; ``driver`` is what NVML says of the process, None where it does not."""

    name: str
    said: lg.DeviceMemory
    weights: int
    context: int
    compute: int
    driver: int | None

    @property
    def logged(self) -> int:
        """All buffers together."""
        return self.weights + self.context + self.compute

    @property
    def said_buffers(self) -> int:
        """The same of the estimate, without what the driver takes."""
        return self.said.weights_bytes + self.said.context_bytes + self.said.compute_bytes

    def wrong(self) -> list[str]:
        """What does not hold: weights and caches equal, sums close, hardly more on the GPU than was said."""
        told = []
        if abs(self.said.weights_bytes - self.weights) > ROUNDING:
            told.append(f"{self.name}: weights {self.said.weights_bytes} said, {self.weights} taken")
        if abs(self.said.context_bytes - self.context) > ROUNDING:
            told.append(f"{self.name}: context {self.said.context_bytes} said, {self.context} taken")
        close = max(8 * MIB, self.logged // 50)
        if abs(self.said_buffers - self.logged) > close:
            told.append(f"{self.name}: buffers {self.said_buffers} said, {self.logged} taken")
        if self.driver is not None and self.driver > self.said.total_bytes * 1.05:
            told.append(f"{self.name}: {self.said.total_bytes} said, {self.driver} on the GPU")
        if self.driver is not None and self.said.total_bytes > self.driver + 768 * MIB:
            told.append(f"{self.name}: {self.said.total_bytes} said, only {self.driver} on the GPU")
        return told

    def __str__(self) -> str:
        driver = "-" if self.driver is None else f"{self.driver / MIB:.0f}"
        return (
            f"{self.name:10} weights {self.said.weights_bytes / MIB:9.2f} {self.weights / MIB:9.2f}"
            f"  context {self.said.context_bytes / MIB:8.2f} {self.context / MIB:8.2f}"
            f"  compute {self.said.compute_bytes / MIB:8.2f} {self.compute / MIB:8.2f}"
            f"  total {self.said.total_bytes / MIB:9.0f} {driver:>8} MiB"
        )


@dataclass(frozen=True)
class Load:
    """A load that got ready: the log's buffers and the driver's word by GPU UUID."""

    buffers: LoadedBuffers
    by_driver: dict[str, int]


def load(
    engine: Engine,
    model: Path,
    gpu_uuids: Sequence[str],
    *,
    environment: dict[str, str] | None = None,
    extra_arguments: Sequence[str] = (),
    **options: Any,
) -> Load:
    """Start ``engine`` as a launch plan says, wait until it is ready, and look at what it took."""
    plan = plan_launch(
        engine=engine,
        model_path=model,
        alias="model",
        api_key="live",
        gpu_uuids=gpu_uuids,
        extra_arguments=extra_arguments,
        **options,
    )

    async def body() -> Load:
        async with aiohttp.ClientSession() as http:
            server = Server(plan, model=model.stem, http=http, start_timeout_seconds=600)
            try:
                await server.start()
                found = {
                    gpu.uuid: process.used_bytes
                    for gpu in lg.snapshot_gpus().gpus
                    for process in gpu.processes or ()
                    if process.pid == server.pid and process.used_bytes is not None
                }
                return Load(server.buffers, found)
            finally:
                await server.stop(0.0)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        return asyncio.run(body())


def compared(taken: Load, said: lg.MemoryEstimate, drivers: Sequence[int | None] = ()) -> list[Compared]:
    """Every device of a load beside the estimate, in device order."""
    names = sorted(taken.buffers.device_bytes)
    assert len(names) == len(said.devices), taken.buffers
    told = [*drivers, *[None] * (len(names) - len(drivers))]
    rows = []
    for name, device, driver in zip(names, said.devices, told, strict=True):
        kinds = taken.buffers.by_device[name]
        context = kinds.get("KV", 0) + kinds.get("RS", 0)
        rows.append(Compared(name, device, kinds.get("model", 0), context, kinds.get("compute", 0), driver))
    return rows
