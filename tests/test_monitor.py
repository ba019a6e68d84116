"""Snapshots on the event loop, from a fake driver that also hangs."""

from __future__ import annotations

import asyncio

from llama_gpu import GpuSnapshot
from llama_gpu.monitor import GpuMonitor
from support.fake_nvml import FakeGpu, FakeNvml

FREE = 5 << 30


def test_a_refresh_sees_what_changed_before_it_was_asked_for(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    seen: list[GpuSnapshot] = []

    async def watch() -> None:
        monitor = GpuMonitor(interval_seconds=3600, on_snapshot=seen.append)
        await monitor.start()
        fake_nvml.update(0, free_bytes=FREE)
        assert await monitor.refresh()
        assert monitor.snapshot.gpus[0].free_bytes == FREE
        assert monitor.age_seconds < 3600
        monitor.close()

    asyncio.run(watch())
    assert seen[-1].gpus[0].free_bytes == FREE


def test_a_driver_that_hangs_keeps_nobody_waiting_and_the_last_snapshot_stays(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(free_bytes=FREE)])

    async def watch() -> None:
        monitor = GpuMonitor(interval_seconds=3600)
        await monitor.start()
        fake_nvml.hang(0)
        try:
            assert not await monitor.refresh(timeout_seconds=0.1)
            assert monitor.snapshot.gpus[0].free_bytes == FREE
        finally:
            fake_nvml.bring_back(0)
            monitor.close()

    asyncio.run(watch())


def test_switched_off_the_driver_is_never_called(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu()])

    async def watch() -> None:
        monitor = GpuMonitor(off_reason="switched off")
        await monitor.start()
        assert await monitor.refresh()
        assert monitor.snapshot == GpuSnapshot([], error="switched off")
        assert monitor.age_seconds == 0

    asyncio.run(watch())
    assert fake_nvml.calls() == []
