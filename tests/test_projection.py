"""llama.cpp's dry run: how it is asked, how its answer is read, when it is asked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.launch import Engine, plan_dry_run
from llama_gpu.memory.projection import projected_estimate, projection_tool, read_projection
from support.fake_nvml import FakeGpu, FakeNvml, default_uuid
from support.gguf_builder import write_llama, write_sparse
from support.proxy import Proxy, running_proxy

MIB = 1 << 20
SUPPORT = Path(__file__).parent / "support"
OPTIONS: dict[str, Any] = {"context_length": 2048, "parallel": 1, "kv_unified": False, "micro_batch": 64}
CONFIG = {"defaults": {**OPTIONS, "threads": 1}, "gpu": {"headroom_bytes": 0}}

# As the real tool prints it, spaces at the ends included.
PRINTED = "RPC0 1530 480 122 \nRPC1 1725 416 336 \nHost 399 0 62 \n"


def test_the_answer_is_read_by_device_the_host_last() -> None:
    assert read_projection(PRINTED, 2) == ((1530, 480, 122), (1725, 416, 336), (399, 0, 62))
    assert read_projection("Host 3255 896 262 \n", 0) == ((3255, 896, 262),)


@pytest.mark.parametrize(
    "text", ["", "Host 1 2 \n", "CUDA0 1 2 3 \n", "Host 1 2 3 \nCUDA0 1 2 3 \n", "error: no"]
)
def test_anything_else_is_no_answer(text: str) -> None:
    assert read_projection(text, 1) is None


@given(st.text(), st.integers(0, 4))
def test_no_text_makes_the_reader_fail(text: str, devices: int) -> None:
    rows = read_projection(text, devices)
    assert rows is None or len(rows) == devices + 1


memories = st.builds(
    lg.DeviceMemory,
    weights_bytes=st.integers(0, 1 << 40),
    context_bytes=st.integers(0, 1 << 40),
    compute_bytes=st.integers(0, 1 << 40),
    overhead_bytes=st.integers(0, 1 << 40),
    layers=st.integers(0, 100),
)


@given(memories, memories, st.tuples(*[st.integers(0, 1 << 20)] * 3))
def test_the_projected_tier_is_never_below_what_was_printed_and_the_estimate_where_both_agree(
    said: lg.DeviceMemory, host: lg.DeviceMemory, row: tuple[int, int, int]
) -> None:
    estimate = lg.MemoryEstimate(devices=[said], host=host, basis="exact", context_length=1)
    floor = (host.weights_bytes // MIB, host.context_bytes // MIB, host.compute_bytes // MIB)
    projected = projected_estimate((row, floor), estimate)
    assert projected.basis == "projected"
    assert projected.host == host, "it agrees"
    (device,) = projected.devices
    assert (device.overhead_bytes, device.layers) == (said.overhead_bytes, said.layers)
    for size, mib in zip(
        (device.weights_bytes, device.context_bytes, device.compute_bytes), row, strict=True
    ):
        assert mib * MIB <= size <= (mib + 1) * MIB


@given(memories, memories, st.integers(0, 1 << 20))
def test_where_the_dry_run_agrees_with_the_logits_of_all_tokens_those_of_the_slots_stand(
    slots: lg.DeviceMemory, whole: lg.DeviceMemory, other: int
) -> None:
    said, asked = (
        lg.MemoryEstimate(devices=[], host=memory, basis="exact", context_length=1)
        for memory in (slots, whole)
    )
    row = (whole.weights_bytes // MIB, whole.context_bytes // MIB, whole.compute_bytes // MIB)
    assert projected_estimate([row], said, asked).host == slots
    differs = (row[0], row[1], other)
    (compute,) = {projected_estimate([differs], said, asked).host.compute_bytes}
    assert compute == (slots.compute_bytes if other == row[2] else (other + 1) * MIB)


def test_it_is_asked_with_the_flags_that_the_server_would_get() -> None:
    run = plan_dry_run(
        "/opt/llama-fit-params",
        model_path="m.gguf",
        gpu_uuids=("GPU-a", "GPU-b"),
        gpu_layers=20,
        tensor_split=(3.0, 7.5),
        context_length=4096,
        cache_type_k="q8_0",
        cpu_moe_layers="all",
        kv_offload=False,
        swa_full=True,
    )
    assert run is not None
    assert " ".join(run.argv) == (
        "/opt/llama-fit-params -m m.gguf --fit off -fitp on -ngl 20 -sm layer -ts 3,7.5 -c 4096 -np 1 -b 2048"
        " -ub 512 -fa auto -ctk q8_0 -ctv f16 -cmoe -nkvo --swa-full"
    )
    inherited = {"LLAMA_ARG_CTX_SIZE": "5", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "7"}
    assert run.full_environment(inherited) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_it_is_not_asked_what_it_has_no_flag_for() -> None:
    assert plan_dry_run("t", model_path="m", gpu_uuids=("a",), kv_unified=True, parallel=4) is None
    assert plan_dry_run("t", model_path="m", gpu_uuids=("a",), kv_unified=True, parallel=1) is not None


def test_the_tool_is_the_one_beside_the_server_or_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    server = tmp_path / "build" / "llama-server"
    server.touch()
    link = tmp_path / "llama-server"
    link.symlink_to(server)
    engine = Engine("llama-server", (str(link),), frozenset())
    assert projection_tool(engine) is None
    tool = server.with_name("llama-fit-params")
    tool.touch()
    assert projection_tool(engine) == tool
    assert projection_tool(Engine("embedded", (sys.executable,), frozenset())) is None


# --- through the proxy -----------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, fake_nvml: FakeNvml) -> Path:
    """A model beside which lies what the tool answers; a server and the tool in ``tmp_path``."""
    for name, source in (
        ("llama-server", "fake_llama_server.py"),
        ("llama-fit-params", "fake_fit_params.py"),
    ):
        program = tmp_path / name
        text = (SUPPORT / source).read_text()
        program.write_text(text.replace("#!/usr/bin/env python3", f"#!{sys.executable}", 1))
        program.chmod(0o755)
    fake_nvml.set_gpus([FakeGpu(total_bytes=2048 * MIB)])
    folder = tmp_path / "models"
    folder.mkdir()
    path = write_llama(folder / "small.gguf", layers=2, context=2048)
    Path(f"{path}.fit.txt").write_text("CUDA0 700 0 1 \nHost 0 0 0 \n")
    return path


def proxy_with(folder: Path, **memory: Any) -> Any:
    config = {
        **CONFIG,
        "engine": {"path": str(folder / "llama-server")},
        "memory": memory,
        "log": {"level": "debug"},
    }
    return running_proxy(folder / "models", config=config, folder=folder)


def questions(model: Path) -> list[dict[str, Any]]:
    asked = Path(f"{model}.asked")
    return [json.loads(line) for line in asked.read_text().splitlines()] if asked.exists() else []


def wait_for_the_answer(proxy: Proxy) -> None:
    proxy.wait_for_line("small: .* bytes projected")


def test_before_the_first_load_the_dry_run_s_answer_is_the_best_estimate_and_it_is_asked_once(
    model: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with proxy_with(tmp_path) as proxy:
            proxy.wait_for_line("small: .* bytes projected|memory of earlier loads is known: 1")
    estimate = lg.estimate(model, tier="best", **OPTIONS)
    assert estimate.basis == "projected"
    assert estimate.devices[0].weights_bytes == 701 * MIB, "rounded down when printed"
    with proxy_with(tmp_path) as proxy:
        proxy.wait_for_line("memory of earlier loads is known: 1")
        assert proxy.chat("small").status_code == 200
        proxy.wait_for_line("load small: .*projected: ")
        (server,) = proxy.get("/health")["servers"]
        claim = server["gpu_assignment"]["estimated_vram_required_bytes"]
        assert claim == estimate.total_device_bytes
    (question,) = questions(model)
    assert question["gpus"] == default_uuid(0)
    assert question["nice"] > os.nice(0)


def test_logits_of_slots_alone_are_taken_off_what_the_dry_run_says(model: Path, tmp_path: Path) -> None:
    write_sparse(model, layers=2, vocabulary=128_000)
    server = tmp_path / "llama-server"
    server.write_text(server.read_text().replace("version: 0 (fake)", "version: 11000 (fake)"))
    whole = lg.estimate(model, **OPTIONS).devices[0]
    slots = lg.estimate(model, max_outputs=1, **OPTIONS).devices[0]
    assert whole.compute_bytes - slots.compute_bytes > MIB
    sizes = (700, whole.context_bytes // MIB, whole.compute_bytes // MIB)
    Path(f"{model}.fit.txt").write_text(f"CUDA0 {' '.join(map(str, sizes))} \nHost 0 0 0 \n")
    with proxy_with(tmp_path) as proxy:
        wait_for_the_answer(proxy)
    projected = lg.estimate(model, tier="best", **OPTIONS).devices[0]
    assert projected.weights_bytes == 701 * MIB, "the dry run's word"
    assert projected.compute_bytes == slots.compute_bytes


def test_a_load_puts_the_measure_before_the_projection(model: Path, tmp_path: Path) -> None:
    with proxy_with(tmp_path) as proxy:
        wait_for_the_answer(proxy)
        assert proxy.chat("small").status_code == 200
        proxy.wait_for_line("small took ")
    assert lg.estimate(model, tier="best", **OPTIONS).basis == "measured"


def test_a_tool_that_fails_is_asked_once_and_harms_nobody(model: Path, tmp_path: Path) -> None:
    Path(f"{model}.fit.txt").unlink()
    with proxy_with(tmp_path) as proxy:
        proxy.wait_for_line("the dry run does not say what small takes")
        assert proxy.chat("small").status_code == 200
    assert len(questions(model)) == 1


def test_a_load_ends_a_question_that_is_under_way_and_it_is_asked_again(model: Path, tmp_path: Path) -> None:
    gate = Path(f"{model}.fit.gate")
    os.mkfifo(gate)
    with proxy_with(tmp_path) as proxy:
        proxy.wait_until(lambda _: questions(model))
        assert proxy.chat("small").status_code == 200
        proxy.wait_until(lambda _: lg.estimate(model, tier="best", **OPTIONS).basis == "measured")


def test_switched_off_or_without_a_gpu_nobody_is_asked(
    model: Path, tmp_path: Path, fake_nvml: FakeNvml
) -> None:
    with proxy_with(tmp_path, projection=False) as proxy:
        assert proxy.chat("small").status_code == 200
    fake_nvml.set_gpus([])
    with proxy_with(tmp_path) as proxy:
        assert proxy.chat("small").status_code == 200
    assert questions(model) == []
