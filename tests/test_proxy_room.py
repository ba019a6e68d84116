"""Who gets which room when, with real processes: scripted servers on the GPUs of a fake driver."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

import llama_gpu as lg
from support.fake_nvml import FakeGpu, FakeNvml, FakeProcess, default_uuid
from support.gguf_builder import write_llama
from support.proxy import Proxy, chat_body, running_proxy, wait_until_gone

FAKE_ENGINE = Path(__file__).parent / "support" / "fake_llama_server.py"
ANT_LEAVES_FIRST = {"bee": {"priority": 1}, "cat": {"priority": 1}}
OPTIONS: dict[str, Any] = {"context_length": 2048, "parallel": 1, "kv_unified": False}


class Gate:
    """A FIFO that servers wait at; open at both ends, so that nobody here ever waits for them."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._end = os.open(path, os.O_RDWR)

    def let_through(self, tokens: int = 1) -> None:
        os.write(self._end, b"." * tokens)

    def close(self) -> None:
        os.close(self._end)


@dataclass(frozen=True)
class Machine:
    """GPUs that hold one model each, and models whose servers do as their scripts say."""

    nvml: FakeNvml
    folder: Path
    models: Path
    one: int
    """Bytes that one model takes on a GPU."""

    def script(self, model: str, **script: Any) -> None:
        Path(f"{self.models / model}.gguf.fake.json").write_text(json.dumps(script))

    def proxy(self, **sections: Mapping[str, Any]) -> AbstractContextManager[Proxy]:
        sections["defaults"] = {**OPTIONS, "min_resident_seconds": 0, **sections.get("defaults", {})}
        sections["gpu"] = {"headroom_bytes": 0, "monitoring_interval": 0.2, **sections.get("gpu", {})}
        config = {"engine": {"path": str(FAKE_ENGINE)}, "memory": {"projection": False}, **sections}
        return running_proxy(self.models, config=config, folder=self.folder)

    def hold(self, *pids: int) -> None:
        """The driver shows that these processes hold a model each on the first GPU, and nobody else."""
        processes = [FakeProcess(pid=pid, used_bytes=self.one) for pid in pids]
        self.nvml.update(0, processes=processes, used_bytes=self.one * len(pids))


@pytest.fixture
def machine(fake_nvml: FakeNvml, tmp_path: Path) -> Machine:
    folder = tmp_path / "models"
    folder.mkdir()
    for seed, name in enumerate(("ant", "bee", "cat")):
        write_llama(folder / f"{name}.gguf", seed=seed)
    one = lg.estimate(folder / "ant.gguf", **OPTIONS).devices[0].total_bytes
    return Machine(fake_nvml, tmp_path, folder, one)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    gates: list[Gate] = []

    def make(name: str) -> Gate:
        gates.append(Gate(tmp_path / name))
        return gates[-1]

    yield make
    for each in gates:
        each.close()


def resident(proxy: Proxy, model: str) -> int:
    """Load ``model``; the process that serves it."""
    assert proxy.chat(model).status_code == 200
    return proxy.pid_of(model)


def states(state: Mapping[str, Any]) -> dict[str, str]:
    return {server["model_id"]: server["status"] for server in state["servers"]}


def test_loads_on_different_gpus_run_at_the_same_time(machine: Machine, tmp_path: Path) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)] * 2)
    for model in ("ant", "bee"):
        os.mkfifo(tmp_path / f"{model}.gate")
        machine.script(model, load_gate=str(tmp_path / f"{model}.gate"))
    with machine.proxy() as proxy, ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(proxy.chat, model) for model in ("ant", "bee")]
        state = proxy.wait_until(lambda state: len(state["servers"]) == 2)
        assert states(state) == {"ant": "starting", "bee": "starting"}
        used = [server["gpu_assignment"]["gpu_uuids"] for server in state["servers"]]
        assert sorted(used) == [[default_uuid(0)], [default_uuid(1)]]
        for model in ("bee", "ant"):
            (tmp_path / f"{model}.gate").open("wb").close()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_two_models_that_fit_one_after_the_other_are_served_one_after_the_other(machine: Machine) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)])
    with machine.proxy() as proxy:
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(proxy.chat, model) for model in ("ant", "bee")]
            assert [answer.result().status_code for answer in answers] == [200, 200]
        (loads, unloads) = (
            [place for place, line in enumerate(proxy.lines) if word in line]
            for word in (" load ", " unload ")
        )
        assert len(loads) == 2
        assert len(unloads) == 1
        assert loads[0] < unloads[0] < loads[1]


def test_a_newcomer_waits_until_the_memory_of_who_left_for_it_is_back(machine: Machine) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 5 // 2)])
    with machine.proxy(models=ANT_LEAVES_FIRST) as proxy, ThreadPoolExecutor(1) as threads:
        pid, other = resident(proxy, "ant"), resident(proxy, "bee")
        machine.hold(pid, other)
        answer = threads.submit(proxy.chat, "cat")
        proxy.wait_for_line("unload ant: makes room for cat")
        assert wait_until_gone(pid, 10)
        assert states(proxy.get("/health")) == {"ant": "stopping", "bee": "running"}
        (gpu,) = proxy.get("/health")["gpu_pool_status"]["gpu_list"]
        assert gpu["assigned_models"] == ["ant", "bee", "cat"], "ant's claim counts, cat's already"
        machine.hold(other)
        assert answer.result().status_code == 200
        assert states(proxy.get("/health")) == {"bee": "running", "cat": "running"}


def test_memory_that_never_comes_back_is_waited_for_no_longer_than_the_deadline(machine: Machine) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 5 // 2)])
    with machine.proxy(models=ANT_LEAVES_FIRST) as proxy, ThreadPoolExecutor(1) as threads:
        pid, other = resident(proxy, "ant"), resident(proxy, "bee")
        machine.hold(pid, other)
        answer = threads.submit(proxy.chat, "cat")
        proxy.wait_for_line("ant is gone, but its memory is not back after 5 s")
        proxy.wait_for_line("unload bee: makes room for cat")
        machine.hold(pid)
        assert answer.result().status_code == 200


def test_a_model_that_a_busy_one_keeps_out_gets_its_turn_and_nobody_is_cut_off(
    machine: Machine, gate: Callable[[str], Gate]
) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)])
    tokens = gate("tokens")
    machine.script("ant", stream_gate=str(tokens.path))
    with machine.proxy(server_pool={"starvation_timeout": 0.5}) as proxy, ThreadPoolExecutor(2) as threads:
        body = chat_body("ant", stream=True, max_tokens=2)
        with proxy.client as client, client.stream("POST", "/v1/chat/completions", json=body) as stream:
            kept_out = threads.submit(proxy.chat, "bee")
            proxy.wait_until(lambda state: "bee" in str(state["gpu_pool_status"]["gpu_list"]))
            late = threads.submit(proxy.chat, "ant")
            proxy.wait_until(lambda state: state["waiting_requests"] == 2)
            tokens.let_through(2)
            assert "[DONE]" in "".join(stream.iter_text())
        assert kept_out.result().status_code == 200
        assert late.result().status_code == 200
        loads = [line.split(" load ")[1].split(":")[0] for line in proxy.lines if " load " in line]
        assert loads == ["ant", "bee", "ant"]


def test_a_load_that_fails_gives_its_room_back(machine: Machine) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)])
    machine.script("ant", exit_at_load=1)
    with machine.proxy() as proxy:
        assert proxy.chat("ant").status_code == 502
        (gpu,) = proxy.get("/health")["gpu_pool_status"]["gpu_list"]
        assert gpu["assigned_models"] == []
        assert gpu["available_memory_bytes"] == gpu["total_memory_bytes"]
        assert proxy.chat("bee").status_code == 200


# --- several servers of one model --------------------------------------------------------------


def test_a_long_queue_gets_a_second_server_which_leaves_first_when_another_needs_room(
    machine: Machine, gate: Callable[[str], Gate]
) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)] * 2)
    tokens = gate("tokens")
    machine.script("ant", stream_gate=str(tokens.path))
    models = {"ant": {"max_replicas": 2}}
    with machine.proxy(models=models) as proxy, ThreadPoolExecutor(3) as threads:
        body = chat_body("ant", stream=True, max_tokens=2)
        with proxy.client as client, client.stream("POST", "/v1/chat/completions", json=body) as first:
            with client.stream("POST", "/v1/chat/completions", json=body) as second:
                both = proxy.wait_until(lambda state: states(state) and all_running(state, 2))
                assert [server["id"].rpartition(":")[0] for server in both["servers"]] == ["ant", "ant#2"]
                used = [server["gpu_assignment"]["gpu_ids"] for server in both["servers"]]
                assert sorted(used) == [[0], [1]]
                assert proxy.chat("ant").status_code == 200
                assert 'llama_gpu_model_servers{model="ant"} 2.0' in metrics(proxy)
                newcomer = threads.submit(proxy.chat, "bee")
                proxy.wait_until(lambda state: "bee" in str(state["gpu_pool_status"]["gpu_list"]))
                tokens.let_through(4)
                assert "[DONE]" in "".join(second.iter_text())
            assert "[DONE]" in "".join(first.iter_text())
        assert newcomer.result().status_code == 200
        proxy.wait_for_line("unload ant#2: makes room for bee")
        assert "unload ant:" not in proxy.log


def test_a_conversation_goes_on_where_its_cache_is(machine: Machine, gate: Callable[[str], Gate]) -> None:
    machine.nvml.set_gpus([FakeGpu(total_bytes=machine.one * 3 // 2)] * 2)
    tokens = gate("tokens")
    machine.script("ant", stream_gate=str(tokens.path))
    with machine.proxy(models={"ant": {"replicas": 2, "parallel": 2}}) as proxy:
        assert proxy.chat("ant", content="first").status_code == 200
        servers = proxy.wait_until(lambda state: all_running(state, 2))["servers"]
        body = chat_body("ant", stream=True, max_tokens=1)
        with proxy.client as client, client.stream("POST", "/v1/chat/completions", json=body) as busy:
            proxy.wait_until(lambda state: any(server["active_requests"] for server in state["servers"]))
            assert proxy.chat("ant", content="second").status_code == 200
            tokens.let_through()
            assert "[DONE]" in "".join(busy.iter_text())
        for _ in range(3):
            assert proxy.chat("ant", content="second").status_code == 200
        assert [len(requests_of(server)) for server in servers] == [2, 4]


def all_running(state: Mapping[str, Any], count: int) -> bool:
    return [server["status"] for server in state["servers"]] == ["running"] * count


def metrics(proxy: Proxy) -> str:
    with proxy.client as client:
        return client.get("/metrics").text


def requests_of(server: Mapping[str, Any]) -> list[str]:
    """The completions that a scripted server was asked for, by its own count."""
    environment = Path(f"/proc/{server['process']}/environ").read_bytes().split(b"\0")
    (key,) = (item[14:].decode() for item in environment if item.startswith(b"LLAMA_API_KEY="))
    with httpx2.Client(base_url=f"http://{server['host']}:{server['port']}") as client:
        answer = client.get("/fake/requests", headers={"Authorization": f"Bearer {key}"})
    return [path for path in answer.json() if path == "/v1/chat/completions"]
