"""The file that remembers what loads took: what it holds, and what may happen to it."""

from __future__ import annotations

import inspect
import logging
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.memory.case import COMPANIONS, DEFAULTS, Case, gpu_kind, options_text
from llama_gpu.memory.record import (
    DeviceTaken,
    Record,
    Taken,
    estimate_from_json,
    estimate_to_json,
    taken_from_json,
    taken_to_json,
)
from llama_gpu.memory.store import EngineMark, MemoryStore, default_file
from support.gguf_builder import write_llama, write_projector

MIB = 1 << 20
CASE = Case("model", "options", ("a GPU 8.9",), (33,), "a build")
SAID = lg.MemoryEstimate(
    devices=[
        lg.DeviceMemory(weights_bytes=100, context_bytes=20, compute_bytes=3, overhead_bytes=7, layers=33)
    ],
    host=lg.DeviceMemory(weights_bytes=5, overhead_bytes=1),
    basis="exact",
    context_length=4096,
)
TAKEN = Taken(
    (DeviceTaken({"model": 100, "KV": 20, "compute": 4}, 140),), DeviceTaken({"model": 5, "output": 2})
)
RECORD = Record(CASE, "name", "/models/name.gguf", SAID, taken=TAKEN, at=1.0, loads=1)

sizes = st.integers(0, 1 << 50)
memories = st.builds(
    lg.DeviceMemory,
    weights_bytes=sizes,
    context_bytes=sizes,
    compute_bytes=sizes,
    overhead_bytes=sizes,
    layers=st.integers(0, 999),
)
estimates = st.builds(
    lg.MemoryEstimate,
    devices=st.lists(memories, max_size=4),
    host=memories,
    basis=st.sampled_from(["exact", "generic rules", "projected", "measured"]),
    context_length=st.integers(0, 1 << 30),
)
buffers = st.dictionaries(st.sampled_from(["model", "KV", "RS", "compute", "output", "LoRA"]), sizes)
loads = st.builds(
    Taken,
    devices=st.lists(st.builds(DeviceTaken, buffers, st.none() | sizes), max_size=4).map(tuple),
    host=st.builds(DeviceTaken, buffers),
)


@pytest.fixture
def store(memory_file: Path) -> MemoryStore:
    return MemoryStore(memory_file)


@given(estimates)
def test_an_estimate_comes_back_from_its_text(estimate: lg.MemoryEstimate) -> None:
    assert estimate_from_json(estimate_to_json(estimate)) == estimate


@given(loads)
def test_a_load_comes_back_from_its_text(taken: Taken) -> None:
    assert taken_from_json(taken_to_json(taken)) == taken


@given(loads)
def test_the_measured_tier_has_every_byte_that_was_logged_or_told(taken: Taken) -> None:
    said = lg.MemoryEstimate(
        devices=[lg.DeviceMemory(overhead_bytes=11, layers=3)] * len(taken.devices),
        host=lg.DeviceMemory(overhead_bytes=13),
        basis="exact",
        context_length=1,
    )
    measured = taken.as_estimate(said)
    assert measured.basis == "measured"
    assert measured.host.total_bytes == taken.host.logged_bytes
    for device, took in zip(measured.devices, taken.devices, strict=True):
        if took.driver_bytes is None:
            assert device.total_bytes == took.logged_bytes + 11
        else:
            assert device.total_bytes == max(took.driver_bytes, took.logged_bytes)


def test_how_long_the_last_load_of_a_model_took_is_remembered(store: MemoryStore) -> None:
    assert store.load_seconds() == {}
    for model, seconds in (("ant", 9.0), ("bee", 2.0), ("ant", 3.5)):
        store.put_load_seconds(model, seconds)
    assert MemoryStore(store.path).load_seconds() == {"ant": 3.5, "bee": 2.0}


def test_a_file_of_a_version_that_kept_no_load_times_is_gone_on_with(store: MemoryStore) -> None:
    store.put(RECORD)
    assert store.path is not None
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("DROP TABLE load_1")
    assert MemoryStore(store.path).load_seconds() == {}
    assert MemoryStore(store.path).records() == [RECORD]
    store.put_load_seconds("ant", 1.0)
    assert store.load_seconds() == {"ant": 1.0}


def test_what_was_put_is_found_by_model_options_and_build(store: MemoryStore) -> None:
    store.put(RECORD)
    assert store.find("model", "options", "a build") == [RECORD]
    assert store.find("another", "options", "a build") == []
    assert store.find("model", "others", "a build") == []
    assert store.find("model", "options", "another build") == []
    assert store.records() == [RECORD]


def test_a_later_load_replaces_what_was_taken_and_keeps_what_was_projected(store: MemoryStore) -> None:
    projected = lg.MemoryEstimate(
        devices=SAID.devices, host=SAID.host, basis="projected", context_length=SAID.context_length
    )
    store.put(replace(RECORD, taken=None, projected=projected, loads=0))
    store.put(RECORD)
    again = replace(TAKEN, host=DeviceTaken({"model": 6}))
    store.put(replace(RECORD, taken=again, at=2.0))
    (found,) = store.records()
    assert found == replace(RECORD, projected=projected, taken=again, at=2.0, loads=2)
    assert found.best == again.as_estimate(SAID)


def test_the_engine_in_use_is_remembered(store: MemoryStore) -> None:
    assert store.engine() is None
    store.set_engine(EngineMark("one"))
    store.set_engine(EngineMark("two", "/bin/llama-server", 5, 6))
    assert store.engine() == EngineMark("two", "/bin/llama-server", 5, 6)


def test_asking_makes_no_file(store: MemoryStore, memory_file: Path) -> None:
    assert store.records() == []
    assert not memory_file.exists()


@pytest.mark.parametrize("damage", ["text", "header", "middle"])
def test_a_corrupt_file_is_set_aside_and_rebuilt_with_one_warning(
    store: MemoryStore, memory_file: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for number in range(200):
        store.put(replace(RECORD, case=replace(CASE, model=str(number))))
    content = bytearray(memory_file.read_bytes())
    if damage == "text":
        content[:] = b"nothing like a database, but long enough to be read as one" * 20
    elif damage == "header":
        content[:16] = bytes(16)
    else:
        content[4096:] = b"\xff" * (len(content) - 4096)
    memory_file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        store.put(RECORD)
        assert store.records() == [RECORD]
        store.put(RECORD)
    (warning,) = caplog.messages
    assert "is corrupt: set aside as" in warning
    (aside,) = memory_file.parent.glob(f"{memory_file.name}.corrupt-*")
    assert aside.read_bytes() == content, "for who wants to look at it"


def test_a_record_that_makes_no_sense_is_one_that_is_not_known(store: MemoryStore, memory_file: Path) -> None:
    store.put(RECORD)
    store.put(replace(RECORD, case=replace(CASE, model="other")))
    with sqlite3.connect(memory_file) as database:
        database.execute("UPDATE record_1 SET analytic = '{}' WHERE model = 'other'")
    database.close()
    assert store.records() == [RECORD]


def test_several_processes_write_at_once_and_nothing_is_lost(memory_file: Path) -> None:
    code = """
        import sys
        from dataclasses import replace
        from pathlib import Path
        from test_memory_store import CASE, RECORD
        from llama_gpu.memory.store import MemoryStore
        store = MemoryStore(Path(sys.argv[1]))
        for number in range(25):
            store.put(replace(RECORD, case=replace(CASE, model=f"{sys.argv[2]} {number}")))
            store.put(RECORD)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(memory_file)]
    writers = [
        subprocess.Popen([*command, name], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two", "three")
    ]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 3
    records = {record.case.model: record for record in MemoryStore(memory_file).records()}
    assert len(records) == 76
    assert records["model"].loads == 75


def test_a_full_disk_costs_one_warning_and_what_was_there_can_still_be_read(memory_file: Path) -> None:
    store = MemoryStore(memory_file)
    store.put(RECORD)
    code = """
        import logging, resource, sys
        from dataclasses import replace
        from pathlib import Path
        from test_memory_store import CASE, RECORD
        from llama_gpu.memory.store import MemoryStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        store = MemoryStore(Path(sys.argv[1]))
        for number in range(3):
            store.put(replace(RECORD, name="x" * 100_000, case=replace(CASE, model=str(number))))
        assert store.records() == [RECORD], store.records()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(memory_file)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("measured memory: ") == 1
    assert store.records() == [RECORD]


def test_a_folder_that_cannot_be_made_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = MemoryStore(tmp_path / "file" / "memory.sqlite3")
    store.put(RECORD)
    store.put(RECORD)
    assert store.records() == []
    (warning,) = caplog.messages
    assert "cannot be written" in warning


def test_the_oldest_are_forgotten_when_there_are_too_many(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_gpu.memory.store.MOST_RECORDS", 3)
    for number in range(5):
        store.put(replace(RECORD, case=replace(CASE, model=str(number)), at=float(number)))
    assert [record.case.model for record in store.records()] == ["4", "3", "2"]


def test_the_file_lies_where_it_was_told_to_else_among_the_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_GPU_MEMORY_FILE", str(tmp_path / "told"))
    assert default_file() == tmp_path / "told"
    monkeypatch.delenv("LLAMA_GPU_MEMORY_FILE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_file() == tmp_path / "llama-gpu" / "memory.sqlite3"


def test_gpus_of_one_kind_share_their_name_and_capability() -> None:
    one = lg.Gpu(index=0, name="NVIDIA L4", compute_capability=(8, 9))
    assert gpu_kind(one) == gpu_kind(one.replace(index=3, uuid="GPU-x", total_bytes=5)) == "NVIDIA L4 8.9"
    assert gpu_kind(one.replace(compute_capability=(9, 0))) != gpu_kind(one)


def test_every_option_of_estimate_stands_in_the_key_or_has_a_reason_not_to() -> None:
    elsewhere = {
        "gpu_layers": "layers",
        "devices": "layers",
        "tensor_split": "layers",
        "compute_capability": "kinds",
        "backend": "only CUDA's is measured",
        "context_length": "as the estimate resolved it",
        "max_outputs": "the build decides",
        "mmproj_offload": "where it is False; else the keys of before would be lost",
    }
    known = {*DEFAULTS, *COMPANIONS, "lora", *elsewhere}
    assert set(lg.EstimateOptions.__annotations__) == known
    assert set(inspect.signature(lg._core.estimate).parameters) == {"model", *known}


def test_a_projector_on_the_cpu_is_another_case(tmp_path: Path) -> None:
    model, projector = write_llama(tmp_path / "m.gguf"), write_projector(tmp_path / "mmproj.gguf")
    said = lg.estimate(model, mmproj=projector)
    on_gpu = options_text(said, {"mmproj": projector})
    assert options_text(said, {"mmproj": projector, "mmproj_offload": True}) == on_gpu
    assert options_text(said, {"mmproj": projector, "mmproj_offload": False}) != on_gpu
