"""The host's memory: what is left of it, who leaves for it, and how it is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu import host
from llama_gpu.budget import Claim, HostMemory, HostUse, available_host_bytes
from llama_gpu.catalog import ModelEntry, scan
from llama_gpu.config import load_config
from llama_gpu.host_room import HostRoom, default_cache_ram_bytes, host_need
from llama_gpu.launch import host_caches
from llama_gpu.residents import ResidentView
from support import ground_truth
from support.gguf_builder import write_sparse

MIB = 1 << 20
GIB = 1 << 30


def test_a_claim_counts_once_whether_its_server_loads_or_holds_it() -> None:
    claims = [Claim(host_bytes=6 * GIB, server="a")]
    before = HostMemory(32 * GIB, 20 * GIB)
    assert available_host_bytes(before, claims) == 14 * GIB
    # It has read its weights (4 GiB, which the kernel may drop) and filled its cache (2 GiB).
    after = HostMemory(32 * GIB, 18 * GIB, {"a": HostUse(6 * GIB, 2 * GIB)})
    assert available_host_bytes(after, claims) == 14 * GIB


def test_a_server_that_holds_more_than_its_claim_counts_with_what_it_holds() -> None:
    host = HostMemory(32 * GIB, 10 * GIB, {"a": HostUse(6 * GIB, 6 * GIB)})
    assert available_host_bytes(host, [Claim(host_bytes=GIB, server="a")]) == 10 * GIB


def test_the_limit_bounds_all_claims_together() -> None:
    roomy = HostMemory(64 * GIB, 60 * GIB)
    claims = [Claim(host_bytes=3 * GIB, server="a"), Claim(host_bytes=2 * GIB, server="b")]
    assert available_host_bytes(roomy, claims, limit_bytes=8 * GIB) == 3 * GIB
    assert available_host_bytes(roomy, claims, limit_bytes=4 * GIB) == -GIB


def view(server: str, held: int, busy: bool) -> ResidentView:
    return ResidentView(server, server, {}, busy, idle_seconds=1.0, reload_seconds=held / 10, host_bytes=held)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=6),
    need=st.integers(1, 80),
    available=st.integers(-10, 40),
    headroom=st.integers(0, 5),
)
def test_just_enough_idle_servers_leave_and_nobody_where_that_would_not_help(
    sizes: list[tuple[int, bool]], need: int, available: int, headroom: int
) -> None:
    views = [view(str(number), held, busy) for number, (held, busy) in enumerate(sizes)]
    room = HostRoom(1000, available, headroom)
    idle = {one.server: one.host_bytes for one in views if not one.busy}
    short = need + headroom - available
    leavers = room.leavers(need, views)
    if short > sum(idle.values()):
        assert leavers is None
        assert room.refusal("m", need, views).short_by_bytes == min(need, short - sum(idle.values()))
        return
    assert leavers is not None
    assert idle.keys() >= set(leavers)
    freed = sum(idle[name] for name in leavers)
    assert freed >= short
    for spared in leavers:
        assert freed - idle[spared] < short, "nobody leaves in vain"


def test_who_leaves_for_a_gpu_anyway_frees_host_memory_too() -> None:
    views = [view("gpu", 5, busy=False), view("other", 9, busy=False)]
    room = HostRoom(100, available_bytes=0, headroom_bytes=0)
    assert room.leavers(5, views, first=["gpu"]) == ("gpu",)
    assert room.leavers(6, views, first=["gpu"]) == ("gpu", "other")


def entry_of(folder: Path, **options: object) -> ModelEntry:
    config = load_config(None, {f"defaults.{name}": value for name, value in options.items()}, environment={})
    (entry,) = scan([folder], config).models
    return entry


def test_weights_caches_the_prompt_cache_and_checkpoints_are_counted(tmp_path: Path) -> None:
    write_sparse(tmp_path / "plain.gguf", layers=4)
    entry = entry_of(tmp_path)
    said = lg.estimate(entry.header or "", devices=0, context_length=8192)
    options = {"parallel": 4, "cache_ram_bytes": GIB}
    need = host_need(entry, options, said)
    assert (need.total_bytes, need.context_checkpoints) == (said.host.total_bytes + GIB, None)
    windowed = lg.MemoryEstimate(
        devices=[], host=said.host, basis="exact", context_length=8192, checkpoint_bytes=100 * MIB
    )
    need = host_need(entry, options, windowed)
    assert need.context_checkpoints == 2, "a gibibyte holds two for each of four slots"
    assert need.total_bytes == said.host.total_bytes + GIB + 8 * 100 * MIB
    assert host_need(entry, {**options, "parallel": 1}, windowed).context_checkpoints == 10
    unknown = host_need(entry, options, None)
    assert unknown.total_bytes == entry.file_bytes + GIB


def test_flags_that_pass_through_win_over_both_caches() -> None:
    assert host_caches(GIB, 8, ()) == (GIB, 8)
    assert host_caches(GIB, 8, ("--cache-ram", "0", "--ctx-checkpoints", "1")) == (0, 1)
    assert host_caches(GIB, None, ("-ctxcp", "4")) == (GIB, None)
    assert host_caches(GIB, 8, ("-cram", "-1")) == (GIB, 8)


def test_a_small_host_gets_small_prompt_caches() -> None:
    assert default_cache_ram_bytes(None) == default_cache_ram_bytes(64 * GIB) == GIB
    assert default_cache_ram_bytes(4 * GIB) == 256 * MIB


def test_a_checkpoint_is_the_window_of_sliding_layers_or_a_slot_s_state(tmp_path: Path) -> None:
    def estimate(model: str, **options: Any) -> lg.MemoryEstimate:
        path = ground_truth.write_model(model, tmp_path)
        return lg.estimate(path, **{"context_length": 8192, **options})

    layers, window, heads, length = 12, 128, 8, 64
    assert estimate("gpt-oss-20b-mxfp4").checkpoint_bytes == layers * window * 2 * heads * length * 2
    assert estimate("gpt-oss-20b-mxfp4", swa_full=True).checkpoint_bytes == 0
    states = estimate("mamba2-dense", parallel=4)
    assert states.checkpoint_bytes == sum(device.context_bytes for device in states.devices) // 4
    assert lg.estimate(write_sparse(tmp_path / "plain.gguf"), context_length=8192).checkpoint_bytes == 0


# -- reading ----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 GiB of which 48 can be had, in no container; control groups are read below the folder."""
    memory = SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def write_group(folder: Path, limit: object, used: int, names: tuple[str, str], stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
VERSION_2 = ("memory.max", "memory.current")


def test_without_a_container_the_machine_s_memory_counts(machine: Path) -> None:
    assert host.host_memory() == HostMemory(64 * GIB, 48 * GIB)
    (machine / "own").write_text("0::/user.slice\n")
    write_group(machine / "cgroup" / "user.slice", "max", 10 * GIB, VERSION_2, "")
    assert host.host_memory() == HostMemory(64 * GIB, 48 * GIB)


def test_a_container_s_limit_counts_less_what_cannot_be_dropped_in_it(machine: Path) -> None:
    (machine / "own").write_text("0::/outer/inner\n")
    stat = f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}\n"
    write_group(machine / "cgroup" / "outer", 8 * GIB, 6 * GIB, VERSION_2, stat)
    write_group(machine / "cgroup" / "outer" / "inner", "max", GIB, VERSION_2, "")
    assert host.host_memory() == HostMemory(8 * GIB, 5 * GIB)


def test_the_older_interface_is_read_too(machine: Path) -> None:
    (machine / "own").write_text("9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    stat = f"total_inactive_file {GIB}\ninactive_file 7\n"
    write_group(machine / "cgroup" / "memory" / "box", 4 * GIB, 3 * GIB, VERSION_1, stat)
    write_group(machine / "cgroup" / "memory", 2**63 - 4096, 9 * GIB, VERSION_1, "")
    assert host.host_memory() == HostMemory(4 * GIB, 2 * GIB)


def test_memory_that_cannot_be_read_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise host.psutil.Error

    monkeypatch.setattr(host.psutil, "virtual_memory", fails)
    assert host.host_memory() is None


def test_this_machine_has_memory_and_this_process_holds_some() -> None:
    read = host.host_memory({"us": os.getpid(), "gone": 2**22 + 1})
    assert read is not None
    assert 0 < read.available_bytes <= read.total_bytes
    assert 0 < read.used_by["us"].private_bytes < read.used_by["us"].resident_bytes
    assert read.used_by["gone"] == HostUse()
