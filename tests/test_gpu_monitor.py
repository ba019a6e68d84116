"""The monitor: callers never wait for the driver, and one bad GPU hides no other."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_gpu as lg
from support.fake_nvml import (
    DRIVER_NOT_LOADED,
    GIB,
    GPU_IS_LOST,
    UNKNOWN,
    FakeGpu,
    FakeNvml,
    default_uuid,
)

FAST = {"interval_seconds": 0.02, "deadline_seconds": 0.3}


def until(condition: Callable[[], Any], *, seconds: float = 10.0) -> Any:
    """Waits until something holds, and returns it; fails when it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)
    return value


def healths(snapshot: lg.GpuSnapshot) -> list[str]:
    return [gpu.health for gpu in snapshot]


@pytest.fixture
def monitor(fake_nvml: FakeNvml) -> Iterator[lg.Monitor]:
    fake_nvml.set_gpus([FakeGpu(name="first"), FakeGpu(name="second", total_bytes=8 * GIB)])
    with lg.Monitor(**FAST) as monitor:
        yield monitor
        fake_nvml.set_gpus([])  # lets every hanging call return


def test_the_first_reading_comes_by_itself(monitor: lg.Monitor) -> None:
    snapshot = until(lambda: monitor.age_seconds is not None and monitor.snapshot())
    assert [gpu.name for gpu in snapshot] == ["first", "second"]
    assert snapshot.error is None
    assert set(monitor.ages) == {default_uuid(0), default_uuid(1)}


def test_before_the_first_reading_the_snapshot_says_so(fake_nvml: FakeNvml) -> None:
    fake_nvml.hangs = ["nvmlInit_v2"]
    fake_nvml.write()
    with lg.Monitor(**FAST) as monitor:
        assert monitor.snapshot() == lg.GpuSnapshot(error="the GPUs have not been read yet")
        assert monitor.age_seconds is None
        assert monitor.ages == {}
        fake_nvml.hangs = []
        fake_nvml.write()


def test_what_changes_is_seen_without_asking(monitor: lg.Monitor, fake_nvml: FakeNvml) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    fake_nvml.update(1, free_bytes=GIB)
    until(lambda: monitor.snapshot().gpus[1].free_bytes == GIB)


def test_refresh_reads_what_is_true_now(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    with lg.Monitor(interval_seconds=3600) as monitor:
        assert monitor.refresh().gpus[0].free_bytes == 24 * GIB
        fake_nvml.update(0, free_bytes=3 * GIB)
        assert monitor.snapshot().gpus[0].free_bytes == 24 * GIB
        assert monitor.refresh().gpus[0].free_bytes == 3 * GIB


def test_one_thread_makes_every_call(monitor: lg.Monitor, fake_nvml: FakeNvml) -> None:
    for _ in range(5):
        monitor.refresh()
    assert len({thread for _, thread, _, _ in fake_nvml.journal()}) == 1


def test_a_gpu_that_hangs_is_lost_keeps_its_values_and_hides_no_other(
    monitor: lg.Monitor, fake_nvml: FakeNvml
) -> None:
    until(lambda: healths(monitor.snapshot()) == ["ok", "ok"])
    fake_nvml.hang(0)
    stuck = until(lambda: healths(monitor.snapshot()) == ["lost", "ok"] and monitor.snapshot()).gpus[0]
    assert (stuck.uuid, stuck.free_bytes, stuck.accepts_models) == (default_uuid(0), 24 * GIB, False)
    assert "does not answer" in stuck.health_reason

    fake_nvml.update(1, free_bytes=2 * GIB)
    until(lambda: monitor.snapshot().gpus[1].free_bytes == 2 * GIB)
    ages = monitor.ages
    assert ages[default_uuid(0)] > ages[default_uuid(1)]

    fake_nvml.bring_back(0)
    until(lambda: healths(monitor.snapshot()) == ["ok", "ok"])
    assert max(monitor.ages.values()) < 1


def test_callers_never_wait_for_a_gpu_that_hangs(monitor: lg.Monitor, fake_nvml: FakeNvml) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    fake_nvml.hang(0)
    fake_nvml.hang(1)

    def ask() -> float:
        started = time.perf_counter()
        monitor.snapshot()
        return time.perf_counter() - started

    times = [ask()]
    while healths(monitor.snapshot()) != ["lost", "lost"]:
        times.append(ask())
    assert statistics.median(times) < 0.01


def test_a_gpu_that_hangs_from_the_start_is_listed(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(hangs=["*"]), FakeGpu(hangs=["nvmlDeviceGetMemoryInfo_v2"]), FakeGpu()])
    with lg.Monitor(**FAST) as monitor:
        snapshot = until(lambda: healths(monitor.snapshot()) == ["lost", "lost", "ok"] and monitor.snapshot())
        assert snapshot.gpus[0].uuid == "unidentified-0"
        fake_nvml.set_gpus([FakeGpu(), FakeGpu(), FakeGpu()])
        until(lambda: healths(monitor.snapshot()) == ["ok"] * 3)
        assert [gpu.uuid for gpu in monitor.snapshot()] == [default_uuid(index) for index in range(3)]


def test_a_slow_gpu_is_read_when_it_is_done(monitor: lg.Monitor, fake_nvml: FakeNvml) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    fake_nvml.update(0, slow={"nvmlDeviceGetPowerUsage": 100}, free_bytes=GIB)
    until(lambda: monitor.snapshot().gpus[0].free_bytes == GIB)
    assert healths(monitor.snapshot()) == ["ok", "ok"]


def test_a_start_that_hangs_is_told_and_recovers(fake_nvml: FakeNvml) -> None:
    fake_nvml.hangs = ["nvmlInit_v2"]
    fake_nvml.set_gpus([FakeGpu()])
    with lg.Monitor(**FAST) as monitor:
        error = until(lambda: "does not answer" in monitor.snapshot().error and monitor.snapshot().error)
        assert "dmesg" in error
        fake_nvml.hangs = []
        fake_nvml.write()
        until(lambda: healths(monitor.snapshot()) == ["ok"])
        assert monitor.snapshot().error is None


def test_a_driver_that_hangs_as_a_whole_is_told_and_its_gpus_are_lost(
    monitor: lg.Monitor, fake_nvml: FakeNvml
) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    fake_nvml.hangs = ["nvmlDeviceGetCount_v2"]
    fake_nvml.write()
    until(lambda: healths(monitor.snapshot()) == ["lost", "lost"])
    assert "does not answer" in (monitor.snapshot().error or "")
    fake_nvml.hangs = []
    fake_nvml.write()
    until(lambda: healths(monitor.snapshot()) == ["ok", "ok"])


def test_a_driver_loaded_later_is_found(fake_nvml: FakeNvml) -> None:
    fake_nvml.errors = {"nvmlInit_v2": DRIVER_NOT_LOADED}
    fake_nvml.set_gpus([FakeGpu()])
    with lg.Monitor(**FAST) as monitor:
        until(lambda: "kernel module is not loaded" in (monitor.snapshot().error or ""))
        fake_nvml.errors = {}
        fake_nvml.write()
        until(lambda: healths(monitor.snapshot()) == ["ok"])


def test_attempts_to_start_a_missing_driver_grow_rarer(fake_nvml: FakeNvml) -> None:
    fake_nvml.errors = {"nvmlInit_v2": DRIVER_NOT_LOADED}
    fake_nvml.write()
    with lg.Monitor(interval_seconds=0.01, deadline_seconds=1) as monitor:
        started = time.monotonic()
        until(lambda: fake_nvml.calls().count("nvmlInit_v2") >= 6)
        assert time.monotonic() - started > 0.01 * (1 + 2 + 4 + 8)
        assert monitor.snapshot().gpus == ()


def test_a_container_that_loses_its_devices_keeps_their_identity(
    monitor: lg.Monitor, fake_nvml: FakeNvml
) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    fake_nvml.errors = {"*": UNKNOWN}
    fake_nvml.write()
    snapshot = until(lambda: healths(monitor.snapshot()) == ["lost", "lost"] and monitor.snapshot())
    assert "restart the container" in snapshot.error
    assert [(gpu.name, gpu.free_bytes) for gpu in snapshot] == [("first", None), ("second", None)]
    fake_nvml.errors = {}
    fake_nvml.write()
    until(lambda: healths(monitor.snapshot()) == ["ok", "ok"])


def test_a_gpu_that_is_no_longer_listed_is_lost_until_it_is_back(
    monitor: lg.Monitor, fake_nvml: FakeNvml
) -> None:
    until(lambda: len(monitor.snapshot()) == 2)
    first, second = fake_nvml.gpus
    first = FakeGpu(uuid=default_uuid(0), name="first", pci_bus_id="00000000:01:00.0")
    second = FakeGpu(uuid=default_uuid(1), name="second", pci_bus_id="00000000:02:00.0")
    fake_nvml.set_gpus([second])

    def by_name() -> dict[str | None, str]:
        return {gpu.name: gpu.health for gpu in monitor.snapshot()}

    until(lambda: by_name() == {"first": "lost", "second": "ok"})
    fake_nvml.set_gpus([first, second])
    until(lambda: by_name() == {"first": "ok", "second": "ok"})
    until(lambda: [gpu.index for gpu in monitor.snapshot()] == [0, 1])


def test_a_lost_gpu_is_lost_and_its_slices_with_it(fake_nvml: FakeNvml) -> None:
    slices = {slot: FakeGpu(uuid=f"MIG-{slot}", total_bytes=5 * GIB) for slot in (0, 1)}
    parent = FakeGpu(uuid="GPU-parent", mig_slots=7, migs=slices)
    fake_nvml.set_gpus([parent, FakeGpu()])
    with lg.Monitor(**FAST) as monitor:
        until(lambda: healths(monitor.snapshot()) == ["ok"] * 3)
        fake_nvml.update(0, errors={"*": GPU_IS_LOST})
        until(lambda: healths(monitor.snapshot()) == ["lost", "lost", "ok"])
        assert [gpu.uuid for gpu in monitor.snapshot()][:2] == ["MIG-0", "MIG-1"]
        fake_nvml.update(0, errors={})
        until(lambda: healths(monitor.snapshot()) == ["ok"] * 3)


def test_close_shuts_nvml_down_and_says_so(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    monitor = lg.Monitor(**FAST)
    monitor.refresh()
    assert monitor.close()
    calls = fake_nvml.calls()
    assert (calls.count("nvmlInit_v2"), calls.count("nvmlShutdown")) == (1, 1)
    assert calls[-1] == "nvmlShutdown"
    assert str(fake_nvml.library_path) not in Path("/proc/self/maps").read_text()
    assert monitor.snapshot().error == "the GPU monitor is closed"
    assert monitor.refresh().error == "the GPU monitor is closed"
    assert monitor.close()


def test_a_monitor_that_is_dropped_shuts_nvml_down(fake_nvml: FakeNvml) -> None:
    monitor = lg.Monitor(**FAST)
    monitor.refresh()
    del monitor
    until(lambda: fake_nvml.calls().count("nvmlShutdown") == 1)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf")])
def test_refuses_times_that_cannot_be(wrong: float) -> None:
    with pytest.raises(ValueError, match="interval_seconds is a number of seconds above 0"):
        lg.Monitor(interval_seconds=wrong)
    with pytest.raises(ValueError, match="deadline_seconds is a number of seconds above 0"):
        lg.Monitor(deadline_seconds=wrong)


def run_program(program: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def test_a_forked_child_starts_anew_and_leaves_its_parents_session_alone(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(), FakeGpu()])
    read, parent, child = run_program(
        """
import json, os, llama_gpu as lg
monitor = lg.Monitor(interval_seconds=0.02)
lg.snapshot_gpus(), monitor.refresh()
inbox, outbox = os.pipe()
child = os.fork()
if child == 0:
    seen = [len(lg.snapshot_gpus()), len(monitor.refresh()), monitor.close()]
    os.write(outbox, json.dumps(seen).encode())
    os._exit(0)
os.waitpid(child, 0)
seen = json.loads(os.read(inbox, 100)) + [len(lg.snapshot_gpus()), len(monitor.refresh()), monitor.close()]
print(json.dumps([seen, os.getpid(), child]))
"""
    )
    assert read == [2, 2, True, 2, 2, True]
    starts = [process for process, _, call, _ in fake_nvml.journal() if call == "nvmlInit_v2"]
    assert starts == [parent, parent, child, child]


def test_a_process_with_a_hanging_gpu_ends_cleanly(fake_nvml: FakeNvml) -> None:
    fake_nvml.set_gpus([FakeGpu(hangs=["*"]), FakeGpu()])
    seconds = run_program(
        """
import json, time, llama_gpu as lg
monitor = lg.Monitor(interval_seconds=0.02, deadline_seconds=0.2)
while len(monitor.snapshot()) < 2: time.sleep(0.01)
started = time.monotonic()
monitor.close()
print(json.dumps(time.monotonic() - started))
"""
    )
    assert seconds < 2


def test_waiting_for_the_driver_leaves_the_interpreter_free(fake_nvml: FakeNvml) -> None:
    fake_nvml.hangs = ["nvmlInit_v2"]
    fake_nvml.write()
    ticks, seconds = run_program(
        """
import json, threading, time, llama_gpu as lg
monitor = lg.Monitor(interval_seconds=3600, deadline_seconds=0.3)
thread = threading.Thread(target=monitor.refresh)
started = time.monotonic()
thread.start()
ticks = 0
while thread.is_alive():
    ticks += 1
    time.sleep(0.001)
print(json.dumps([ticks, time.monotonic() - started]))
"""
    )
    assert seconds > 0.25
    assert ticks > 50
