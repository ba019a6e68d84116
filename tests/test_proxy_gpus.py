"""Placement end to end: a fake driver with two unequal GPUs, the real engine, /proc as witness."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import llama_gpu as lg
from support.fake_nvml import FakeGpu, FakeNvml, FakeProcess, default_uuid
from support.gguf_builder import write_llama, write_sparse
from support.proxy import Proxy, running_proxy, wait_until_gone

MIB = 1 << 20
# A small micro batch keeps the copies of the inputs small that llama.cpp makes on several devices.
OPTIONS = {"context_length": 32768, "parallel": 1, "kv_unified": False, "micro_batch": 32}
CONFIG = {"defaults": {**OPTIONS, "threads": 1}, "gpu": {"headroom_bytes": 0}}


@dataclass(frozen=True)
class Machine:
    proxy: Proxy
    nvml: FakeNvml
    models: Path

    def launched(self, model: str) -> tuple[dict[str, str], list[str]]:
        """Environment and command line of the child, as the kernel has them."""
        folder = Path(f"/proc/{self.proxy.pid_of(model)}")
        pairs = [item.decode() for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item]
        arguments = [item.decode() for item in (folder / "cmdline").read_bytes().split(b"\0")][:-1]
        return dict(pair.split("=", 1) for pair in pairs), arguments


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "small.gguf", layers=2, context=32768, seed=1)
    write_llama(folder / "other.gguf", layers=2, context=32768, seed=2)
    write_llama(folder / "large.gguf", layers=24, context=32768, seed=3)
    write_sparse(folder / "huge.gguf", layers=80, embedding=8192, feed_forward=28672, heads=64)
    return folder


@pytest.fixture
def machine(models: Path, fake_nvml: FakeNvml, tmp_path: Path) -> Iterator[Machine]:
    """GPU 0 holds the small model with a little to spare, both together the large one."""
    small = lg.estimate(models / "small.gguf", **OPTIONS).devices[0].total_bytes
    large = lg.estimate(models / "large.gguf", **OPTIONS).devices[0]
    cache_and_weights = large.weights_bytes + large.context_bytes
    tight = small + 56 * MIB
    roomy = large.total_bytes - cache_and_weights // 4
    assert tight < roomy < large.total_bytes, "the models must be small, large and too large"
    fake_nvml.set_gpus([FakeGpu(total_bytes=tight), FakeGpu(total_bytes=roomy)])
    with running_proxy(models, config=CONFIG, folder=tmp_path) as proxy:
        yield Machine(proxy, fake_nvml, models)


def test_a_model_that_fits_one_gpu_goes_to_the_one_that_fits_best(machine: Machine) -> None:
    assert machine.proxy.chat("small").status_code == 200
    environment, arguments = machine.launched("small")
    assert environment["CUDA_VISIBLE_DEVICES"] == default_uuid(0)
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "-ts" not in arguments
    assert arguments[arguments.index("--fit") + 1] == "off"
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assignment = machine.proxy.servers()["small"]["gpu_assignment"]
    assert assignment["gpu_ids"] == [0]
    assert assignment["gpu_uuids"] == [default_uuid(0)]


def test_a_larger_model_goes_to_both_gpus_with_a_split_computed_from_its_layers(machine: Machine) -> None:
    assert machine.proxy.chat("large").status_code == 200
    environment, arguments = machine.launched("large")
    assert environment["CUDA_VISIBLE_DEVICES"] == f"{default_uuid(0)},{default_uuid(1)}"
    split = [float(part) for part in arguments[arguments.index("-ts") + 1].split(",")]
    assert len(split) == 2
    assert 0 < split[0] < split[1], "the larger GPU gets more layers"
    planned = lg.estimate(machine.models / "large.gguf", devices=2, tensor_split=split, **OPTIONS)
    health = machine.proxy.get("/health")
    (server,) = health["servers"]
    assert server["gpu_assignment"]["gpu_ids"] == [0, 1]
    assert server["gpu_assignment"]["tensor_splits"] == split
    assert server["gpu_assignment"]["estimated_vram_required_bytes"] == planned.total_device_bytes
    for gpu, device in zip(health["gpu_pool_status"]["gpu_list"], planned.devices, strict=True):
        assert gpu["assigned_models"] == ["large"]
        assert gpu["available_memory_bytes"] == gpu["total_memory_bytes"] - device.total_bytes


def test_a_model_that_is_too_large_is_refused_with_the_bytes_it_needs_and_those_there_are(
    machine: Machine,
) -> None:
    answer = machine.proxy.chat("huge")
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "does_not_fit"
    assert error["required_bytes"] > (machine.models / "huge.gguf").stat().st_size
    free = {gpu.uuid: gpu.free_bytes for gpu in lg.snapshot_gpus().gpus}
    assert error["free_bytes_by_gpu"] == free
    assert machine.proxy.chat("small").status_code == 200, "nobody else suffers"


def test_an_idle_model_leaves_the_gpu_that_another_needs(machine: Machine) -> None:
    assert machine.proxy.chat("small").status_code == 200
    assert machine.proxy.chat("large").status_code == 200
    assert machine.proxy.servers().keys() == {"large"}
    machine.proxy.wait_for_line("unload small: makes room for large")


def places_of(proxy: Proxy, words: str) -> list[int]:
    """Where in the log these words stand."""
    return [place for place, line in enumerate(proxy.lines) if words in line]


def test_two_models_asked_for_at_once_load_side_by_side_on_gpus_of_their_own(machine: Machine) -> None:
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(machine.proxy.chat, ("small", "other")))
    assert [answer.status_code for answer in answers] == [200, 200]
    used = [server["gpu_assignment"]["gpu_ids"] for server in machine.proxy.servers().values()]
    assert sorted(used) == [[0], [1]]
    assert max(places_of(machine.proxy, " load ")) < min(places_of(machine.proxy, " is ready after "))


def test_two_models_asked_for_at_once_that_cannot_stand_together_are_served_in_turn(machine: Machine) -> None:
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(machine.proxy.chat, ("small", "large")))
    assert [answer.status_code for answer in answers] == [200, 200]
    loads, unloads = places_of(machine.proxy, " load "), places_of(machine.proxy, " unload ")
    assert (len(loads), len(unloads)) == (2, 1)
    assert loads[0] < unloads[0] < loads[1]


def test_a_newcomer_is_started_once_the_memory_of_who_left_is_back(machine: Machine) -> None:
    assert machine.proxy.chat("small").status_code == 200
    pid = machine.proxy.pid_of("small")
    tight, roomy = lg.snapshot_gpus().gpus
    held = lg.estimate(machine.models / "small.gguf", **OPTIONS).devices[0].total_bytes
    empty = [FakeGpu(total_bytes=gpu.total_bytes) for gpu in (tight, roomy)]
    left = (tight.total_bytes or 0) - held
    process = FakeProcess(pid=pid, used_bytes=held)
    full = FakeGpu(total_bytes=tight.total_bytes, free_bytes=left, used_bytes=held, processes=[process])
    machine.nvml.set_gpus([full, empty[1]])
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(machine.proxy.chat, "large")
        machine.proxy.wait_for_line("unload small: makes room for large")
        assert wait_until_gone(pid, 10)
        assert places_of(machine.proxy, " load large") == [], "its memory is not back yet"
        machine.nvml.set_gpus(empty)
        assert answer.result().status_code == 200
    assert machine.proxy.servers().keys() == {"large"}


def test_memory_that_others_take_is_not_promised(machine: Machine) -> None:
    gpus = [FakeGpu(total_bytes=gpu.total_bytes) for gpu in lg.snapshot_gpus().gpus]
    taken = [FakeGpu(total_bytes=gpu.total_bytes, free_bytes=MIB) for gpu in gpus]
    machine.nvml.set_gpus(taken)
    assert machine.proxy.chat("small").status_code == 503
    machine.nvml.set_gpus(gpus)
    assert machine.proxy.chat("small").status_code == 200


def test_health_shows_the_gpus_and_who_sits_where(machine: Machine) -> None:
    machine.proxy.chat("small")
    state = machine.proxy.get("/health")
    pool = state["gpu_pool_status"]
    assert state["mode"] == "gpu"
    assert pool["total_gpus"] == 2
    assert pool["allocation_strategy"] == "single-gpu-preferred"
    assert [gpu["assigned_models"] for gpu in pool["gpu_list"]] == [["small"], []]
    assert pool["gpu_list"][0]["compute_capability"] == "8.9"
    assert pool["gpu_list"][1]["total_memory"] == pytest.approx(
        pool["gpu_list"][1]["total_memory_bytes"] / (1 << 30)
    )


def test_switched_off_gpus_are_not_used_and_it_is_said_once(
    models: Path, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.set_gpus([FakeGpu()])
    config = {**CONFIG, "gpu": {"enabled": False}}
    with running_proxy(models, config=config, folder=tmp_path) as proxy:
        assert proxy.chat("small").status_code == 200
        assert proxy.chat("other").status_code == 200
        assert proxy.get("/health")["mode"] == "cpu"
        assert proxy.log.count("serving on the CPU") == 1
        environment = Path(f"/proc/{proxy.pid_of('small')}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=" in environment
