"""What a load took, from the proxy to the next estimate and the next placement."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llama_gpu as lg
from llama_gpu.memory.record import Record
from llama_gpu.memory.store import MemoryStore
from support.fake_nvml import FakeGpu, FakeNvml, FakeProcess
from support.gguf_builder import write_llama, write_sparse
from support.proxy import Proxy, running_proxy

MIB = 1 << 20
OPTIONS: dict[str, Any] = {"context_length": 2048, "parallel": 1, "kv_unified": False, "micro_batch": 64}
CONFIG = {"defaults": {**OPTIONS, "threads": 1}, "gpu": {"headroom_bytes": 0}}
FAKE_SERVER = Path(__file__).parent / "support" / "fake_llama_server.py"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_llama(folder / "small.gguf", layers=2, context=2048)


def loaded_once(proxy: Proxy, store: Path, model: str = "small") -> Record:
    """Load, and wait until it is remembered."""
    answer = proxy.chat(model)
    assert answer.status_code == 200, answer.text
    found: list[Record] = []

    def remembered(_health: object) -> bool:
        found[:] = [r for r in MemoryStore(store).records() if r.taken is not None and r.name == model]
        return bool(found)

    proxy.wait_until(remembered)
    return found[0]


def best(model: Path, **changes: Any) -> lg.MemoryEstimate:
    return lg.estimate(model, tier="best", **{**OPTIONS, **changes})


# --- the real engine, on the CPU -------------------------------------------------------


@pytest.fixture
def after_a_load(model: Path, memory_file: Path, tmp_path: Path) -> Record:
    """The real engine has loaded the model once, on the CPU; the proxy is gone."""
    with running_proxy(model.parent, config=CONFIG, folder=tmp_path) as proxy:
        return loaded_once(proxy, memory_file)


def test_after_a_real_load_the_next_estimate_is_what_the_load_took(model: Path, after_a_load: Record) -> None:
    estimate = best(model, devices=0)
    assert estimate.basis == "measured"
    assert after_a_load.taken is not None
    assert estimate.host.total_bytes == after_a_load.taken.host.logged_bytes > 0
    assert estimate.devices == ()
    # The installed engine is known to keep no more logits than it has slots, and says so itself.
    analytic = lg.estimate(model, devices=0, max_outputs=1, **OPTIONS)
    assert after_a_load.taken.max_outputs == 1
    assert estimate.host.context_bytes == pytest.approx(analytic.host.context_bytes, abs=MIB // 100)
    assert after_a_load.analytic == analytic, "what was said is kept beside what was taken"


def test_a_moved_file_is_still_known(model: Path, after_a_load: Record) -> None:
    moved = model.rename(model.with_name("renamed.gguf"))
    assert best(moved, devices=0) == after_a_load.measured


def test_another_option_another_place_and_a_changed_file_fall_back(model: Path, after_a_load: Record) -> None:
    assert best(model, devices=0) == after_a_load.measured
    assert best(model, devices=0, context_length=1024).basis == "exact"
    assert best(model, devices=0, cache_type_k="f32").basis == "exact"
    assert best(model, devices=1).basis == "exact", "on a GPU it was never loaded"
    write_llama(model, layers=2, context=2048, seed=9)
    assert best(model, devices=0).basis == "exact"


def test_without_the_engine_s_build_nothing_measured_counts(
    model: Path, after_a_load: Record, memory_file: Path
) -> None:
    mark = MemoryStore(memory_file).engine()
    assert mark is not None
    assert mark.build == after_a_load.case.build
    memory_file.unlink()
    store = MemoryStore(memory_file)
    store.put(after_a_load)
    assert best(model, devices=0).basis == "exact", "nobody says which llama.cpp is in use"
    store.set_engine(mark)
    assert best(model, devices=0).basis == "measured"


def test_a_file_that_cannot_be_written_costs_one_warning(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    unusable = {"LLAMA_GPU_MEMORY_FILE": str(tmp_path / "a-file" / "memory.sqlite3")}
    with running_proxy(model.parent, config=CONFIG, folder=tmp_path, environment=unusable) as proxy:
        assert proxy.chat("small").status_code == 200
        proxy.wait_for_line("measured memory: .* cannot be written")
        shutil.copy(model, model.with_name("other.gguf"))
        assert proxy.chat("other").status_code == 200
        assert proxy.log.count("measured memory: ") == 1


# --- a scripted server, on GPUs of a fake driver ---------------------------------------


@dataclass(frozen=True)
class Machine:
    """A GPU, and servers that log what they are told to have allocated."""

    nvml: FakeNvml
    program: Path
    model: Path
    folder: Path
    file: Path

    def script(self, **buffers_mib: float) -> None:
        """What the model's next load logs on its device, by kind, in MiB."""
        lines = {
            "model": "load_tensors:        CUDA0 model buffer size = {:8.2f} MiB",
            "KV": "llama_kv_cache:      CUDA0 KV buffer size = {:8.2f} MiB",
            "compute": "sched_reserve:      CUDA0 compute buffer size = {:8.2f} MiB",
        }
        script = {"log_lines": [lines[kind].format(mib) for kind, mib in buffers_mib.items()]}
        Path(f"{self.model}.fake.json").write_text(json.dumps(script))

    def proxy(self) -> Any:
        config = {**CONFIG, "engine": {"path": str(self.program)}}
        return running_proxy(self.model.parent, config=config, folder=self.folder)


@pytest.fixture
def machine(model: Path, fake_nvml: FakeNvml, tmp_path: Path, memory_file: Path) -> Machine:
    program = tmp_path / "llama-server"
    program.write_text(FAKE_SERVER.read_text().replace("#!/usr/bin/env python3", f"#!{sys.executable}", 1))
    program.chmod(0o755)
    fake_nvml.set_gpus([FakeGpu(total_bytes=2048 * MIB)])
    return Machine(fake_nvml, program, model, tmp_path, memory_file)


def test_where_the_driver_tells_nothing_buffer_lines_are_the_measure(machine: Machine) -> None:
    machine.script(model=600.0)
    with machine.proxy() as proxy:
        record = loaded_once(proxy, machine.file)
    estimate = best(machine.model)
    (said,) = lg.estimate(machine.model, **OPTIONS).devices
    (device,) = estimate.devices
    assert estimate.basis == "measured"
    # The stand-in logs 10 + 2 + 1.5 MiB by itself.
    assert device.weights_bytes == 610 * MIB
    assert device.context_bytes == 2 * MIB
    assert device.compute_bytes == 1.5 * MIB
    assert device.overhead_bytes == said.overhead_bytes
    assert record.case.layers == (said.layers,)


def test_a_log_that_comes_behind_the_first_answers_counts_in_full(machine: Machine) -> None:
    Path(f"{machine.model}.fake.json").write_text(json.dumps({"load_log": "late"}))
    with machine.proxy() as proxy:
        loaded_once(proxy, machine.file)
    (device,) = best(machine.model).devices
    assert (device.weights_bytes, device.compute_bytes) == (10 * MIB, 1.5 * MIB)


def test_of_a_load_whose_log_does_not_come_nothing_is_remembered(machine: Machine) -> None:
    lines = ["load_tensors:        CUDA0 model buffer size =     1.00 MiB"]
    Path(f"{machine.model}.fake.json").write_text(json.dumps({"load_log": "never", "log_lines": lines}))
    with machine.proxy() as proxy:
        assert proxy.chat("small").status_code == 200
    assert best(machine.model).basis == "exact"


def test_the_next_placement_claims_what_the_last_load_took(machine: Machine) -> None:
    machine.script(model=600.0)
    with machine.proxy() as proxy:
        loaded_once(proxy, machine.file)
    (device,) = best(machine.model).devices
    with machine.proxy() as proxy:
        proxy.wait_for_line("memory of earlier loads is known: 1")
        proxy.chat("small")
        proxy.wait_for_line("load small: .*measured: ")
        (server,) = proxy.get("/health")["servers"]
        assert server["gpu_assignment"]["estimated_vram_required_bytes"] == device.total_bytes


def claimed_bytes(proxy: Proxy, model: str) -> int:
    assert proxy.chat(model).status_code == 200
    servers = {server["model_id"]: server for server in proxy.get("/health")["servers"]}
    return int(servers[model]["gpu_assignment"]["estimated_vram_required_bytes"])


def test_what_a_load_says_of_its_logits_is_known_of_all_later_ones_of_that_build(machine: Machine) -> None:
    for name in ("other", "third"):
        write_sparse(machine.model.with_name(f"{name}.gguf"), layers=2)
    script = {"log_lines": ["llama_context: n_outputs_max         = 1"]}
    Path(f"{machine.model}.fake.json").write_text(json.dumps(script))
    whole = lg.estimate(machine.model.with_name("other.gguf"), **OPTIONS).total_device_bytes
    slots = lg.estimate(machine.model.with_name("third.gguf"), max_outputs=1, **OPTIONS).total_device_bytes
    assert slots < whole
    with machine.proxy() as proxy:
        assert claimed_bytes(proxy, "other") == whole, "nothing is known of version 0"
        loaded_once(proxy, machine.file)
        assert claimed_bytes(proxy, "third") == slots
    write_sparse(machine.model.with_name("fourth.gguf"), layers=2)
    with machine.proxy() as proxy:
        proxy.wait_for_line("memory of earlier loads is known: ")
        assert claimed_bytes(proxy, "fourth") == slots, "the next process knows it, too"


def test_plan_goes_by_what_a_load_took_as_the_proxy_does(machine: Machine) -> None:
    machine.script(model=600.0)
    with machine.proxy() as proxy:
        loaded_once(proxy, machine.file)
    (device,) = best(machine.model).devices
    command = [sys.executable, "-m", "llama_gpu", "plan", str(machine.model.parent), "--json"]
    told = subprocess.run(
        [*command, "--config", str(machine.folder / "config.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    (planned,) = json.loads(told.stdout)["models"]
    assert device.total_bytes in planned["placement"]["bytes_by_gpu"].values()
    assert "measured: " in planned["placement"]["reason"]


def test_the_driver_s_word_on_the_process_is_what_the_load_took(machine: Machine) -> None:
    gate = machine.folder / "gate"
    os.mkfifo(gate)
    Path(f"{machine.model}.fake.json").write_text(json.dumps({"load_gate": str(gate)}))
    with machine.proxy() as proxy:
        asking = threading.Thread(target=proxy.chat, args=("small",))
        asking.start()
        proxy.wait_until(lambda state: state["servers"] and state["servers"][0]["process"])
        pid = proxy.pid_of("small")
        machine.nvml.update(0, processes=[FakeProcess(pid=pid, used_bytes=777 * MIB)], used_bytes=777 * MIB)
        gate.open("wb").close()
        asking.join()
        loaded_once(proxy, machine.file)
    assert best(machine.model).devices[0].total_bytes == 777 * MIB


def test_a_load_that_is_known_to_take_more_than_there_is_goes_elsewhere(machine: Machine) -> None:
    (said,) = lg.estimate(machine.model, **OPTIONS).devices
    machine.nvml.set_gpus([FakeGpu(total_bytes=said.total_bytes + 100 * MIB)])
    machine.script(model=600.0)
    with machine.proxy() as proxy:
        loaded_once(proxy, machine.file)
    with machine.proxy() as proxy:
        proxy.wait_for_line("memory of earlier loads is known: 1")
        answer = proxy.chat("small")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "does_not_fit"
    machine.nvml.set_gpus([FakeGpu(total_bytes=said.total_bytes + 700 * MIB)])
    with machine.proxy() as proxy:
        assert proxy.chat("small").status_code == 200


def test_another_kind_of_gpu_or_another_build_falls_back(machine: Machine) -> None:
    machine.script(model=600.0)
    with machine.proxy() as proxy:
        loaded_once(proxy, machine.file)
    assert best(machine.model).basis == "measured"
    machine.nvml.set_gpus([FakeGpu(total_bytes=2048 * MIB, name="Another GPU")])
    assert best(machine.model).basis == "exact"
    machine.nvml.set_gpus([FakeGpu(total_bytes=2048 * MIB)])
    assert best(machine.model).basis == "measured"
    same = machine.program.read_text()
    machine.program.write_text(f"{same}\n")
    assert best(machine.model).basis == "measured", "written anew, but the same version"
    machine.program.write_text(same.replace("version: ", "version: 9"))
    assert best(machine.model).basis == "exact"
    machine.program.unlink()
    assert best(machine.model).basis == "exact"
