"""What the proxy knows of its models' memory, and how placing goes by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import llama_gpu as lg
from llama_gpu.catalog import ModelEntry, scan
from llama_gpu.config import load_config
from llama_gpu.errors import DoesNotFitError
from llama_gpu.loading import load_of, memory_options, outputs_of_slots
from llama_gpu.memory.builds import keeps_logits_of_slots_alone
from llama_gpu.memory.known import KnownMemory
from llama_gpu.memory.record import DeviceTaken, Taken
from llama_gpu.memory.store import EngineMark, MemoryStore
from llama_gpu.placing import Placing
from llama_gpu.residents import Assignment
from support import ground_truth
from support.gguf_builder import write_llama

MIB = 1 << 20


@pytest.fixture
def store(memory_file: Path) -> MemoryStore:
    store = MemoryStore(memory_file)
    store.set_engine(EngineMark("llama-server 1", "/nonexistent"))
    return store


@pytest.fixture
def known(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> KnownMemory:
    known = KnownMemory(store)
    monkeypatch.setattr(known, "_mark", EngineMark("llama-server 1"))
    return known


@pytest.fixture
def entry(tmp_path: Path) -> ModelEntry:
    write_llama(tmp_path / "small.gguf", layers=8, context=4096)
    settings = load_config(None, {"models_dirs": [tmp_path], "defaults.context_length": 4096})
    return scan(settings.models_dirs, settings).find("small")


def gpus(*mib: int) -> list[lg.Gpu]:
    return [
        lg.Gpu(
            index=index,
            name="NVIDIA L4",
            compute_capability=(8, 9),
            total_bytes=size * MIB,
            free_bytes=size * MIB,
        )
        for index, size in enumerate(mib)
    ]


@pytest.fixture
def place(known: KnownMemory, entry: ModelEntry) -> Callable[..., Assignment]:
    def place(*mib: int, headroom: int = 0) -> Assignment:
        config = load_config(None, {"gpu.headroom_bytes": headroom * MIB})
        placing = Placing(config, lambda _: entry, known)
        placing.snapshot = lg.GpuSnapshot(gpus(*mib))
        return placing("small", (), ())

    return place


def taken(known: KnownMemory, entry: ModelEntry, assignment: Assignment, *excess_mib: int) -> None:
    """A load of this layout took so much more than estimated on each device."""
    said = assignment.estimate
    assert said is not None
    case = known.case(load_of(entry), said, gpus(*[1] * len(said.devices)))
    assert case is not None
    devices = [
        DeviceTaken({}, device.total_bytes + excess * MIB)
        for device, excess in zip(said.devices, excess_mib, strict=True)
    ]
    known.remember(case, entry.id, entry.path, said, taken=Taken(tuple(devices), DeviceTaken({})))


def mib_of(assignment: Assignment) -> list[int]:
    return [size // MIB for size in assignment.bytes_by_gpu.values()]


def test_a_claim_is_what_the_same_layout_took(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment]
) -> None:
    before = place(4096)
    taken(known, entry, before, 300)
    after = place(4096)
    assert mib_of(after) == [mib_of(before)[0] + 300]
    assert after.estimate == before.estimate, "what was reckoned stands beside it"


def test_what_is_known_to_take_more_than_there_is_is_refused(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment]
) -> None:
    (need,) = mib_of(place(4096))
    assert place(need + 100).mode == "single"
    taken(known, entry, place(4096), 300)
    with pytest.raises(DoesNotFitError):
        place(need + 100)
    assert place(need + 302).mode == "single"


def test_what_is_known_to_take_less_may_use_the_headroom(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment]
) -> None:
    (need,) = mib_of(place(4096))
    with pytest.raises(DoesNotFitError):
        place(need + 100, headroom=256)
    taken(known, entry, place(4096), -200)
    assert mib_of(place(need + 100, headroom=256)) == [need - 200]


def test_an_unknown_layout_is_not_trusted_with_what_another_saved(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment]
) -> None:
    (need,) = mib_of(place(4096))
    load = load_of(entry)
    over_two = lg.estimate(load.header, **{**load.options, "devices": 2})
    taken(known, entry, Assignment("multi", estimate=over_two), -200, -200)
    assert known.most_excess_bytes(load, gpus(1, 1)) == -200 * MIB
    with pytest.raises(DoesNotFitError):
        place(need + 100, 1, headroom=256)


def test_another_kind_of_gpu_or_another_build_knows_nothing(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place(4096)
    taken(known, entry, before, 300)
    load = load_of(entry)
    assert known.most_excess_bytes(load, gpus(4096)) == 300 * MIB
    assert known.most_excess_bytes(load, [gpus(4096)[0].replace(name="NVIDIA H200")]) is None
    monkeypatch.setattr(known, "_mark", EngineMark("llama-server 2"))
    assert known.most_excess_bytes(load, gpus(4096)) is None
    assert mib_of(place(4096)) == mib_of(before)


def test_flags_that_pass_through_unread_make_another_case(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment]
) -> None:
    taken(known, entry, place(4096), 300)
    other = replace(entry, options=entry.options.model_copy(update={"extra_arguments": ("--mlock",)}))
    assert known.most_excess_bytes(load_of(other), gpus(4096)) is None


def test_another_process_reads_what_this_one_remembered(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment], store: MemoryStore
) -> None:
    taken(known, entry, place(4096), 300)
    other = KnownMemory(store)
    assert other.read([]) == 1
    assert other.read([]) == 1, "reading again adds nothing"
    (record,) = store.records()
    assert other.find(record.case) == record
    other.use_last_engine()
    assert other.build is None, "the program that it was measured with is gone"


@pytest.mark.parametrize(
    ("build", "keeps"),
    [
        ("llama-server 11000 (0c1e570)", True),
        ("llama-server 0.5.0-dev (build 11000, commit 0c1e570)", True),
        ("embedded xllamacpp 2026.10.11549", True),
        ("llama-server 9464 (5dcb711)", False),
        ("llama-server 99999 (0c1e570)", False),
        ("llama-server 0.5.0-dev (build 1, commit 0c1e570)", False),
        ("llama-server of 18000 bytes, written at 11000", False),
        ("embedded xllamacpp 0.2.11000", True),
        ("embedded xllamacpp 2027.1.99999", False),
        ("llama-server None", False),
    ],
)
def test_only_builds_between_what_was_seen_are_known_by_their_number(build: str, keeps: bool) -> None:
    assert keeps_logits_of_slots_alone(build) is keeps


def said_of_outputs(known: KnownMemory, entry: ModelEntry, outputs: int | None) -> None:
    """A load logged that its server keeps so many logits."""
    load = load_of(entry)
    said = lg.estimate(load.header, devices=1, **load.options)
    case = known.case(load, said, gpus(1))
    assert case is not None
    known.remember(case, entry.id, entry.path, said, taken=Taken((), DeviceTaken({}), outputs))


def test_what_a_load_says_of_its_logits_counts_for_its_build_alone(
    known: KnownMemory, entry: ModelEntry, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not known.keeps_logits_of_slots_alone
    said_of_outputs(known, entry, None)
    assert not known.keeps_logits_of_slots_alone
    said_of_outputs(known, entry, entry.options.parallel)
    assert known.keeps_logits_of_slots_alone
    another = KnownMemory(store)
    another.read([])
    monkeypatch.setattr(another, "_mark", EngineMark("llama-server 1"))
    assert another.keeps_logits_of_slots_alone, "it is in the store"
    monkeypatch.setattr(another, "_mark", EngineMark("llama-server 2"))
    assert not another.keeps_logits_of_slots_alone


def test_the_last_load_wins_over_earlier_ones_and_over_the_number(
    known: KnownMemory, entry: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_mark", EngineMark("llama-server 11000 (a fork)"))
    assert known.keeps_logits_of_slots_alone
    said_of_outputs(known, entry, entry.options.batch)
    assert not known.keeps_logits_of_slots_alone
    said_of_outputs(known, entry, entry.options.parallel)
    assert known.keeps_logits_of_slots_alone


def test_a_placement_has_the_logits_of_the_slots_where_servers_keep_no_more(
    known: KnownMemory, entry: ModelEntry, place: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place(4096).estimate
    monkeypatch.setattr(known, "_mark", EngineMark("llama-server 11000 (0c1e570)"))
    after = place(4096).estimate
    load = load_of(entry)
    capability = gpus(1)[0].compute_capability
    assert before == lg.estimate(load.header, compute_capability=capability, **load.options)
    slots = entry.options.parallel
    assert after == lg.estimate(load.header, compute_capability=capability, max_outputs=slots, **load.options)
    assert after != before


def test_whose_logits_are_not_known_to_be_the_slots_keeps_the_dry_run_s_number(
    entry: ModelEntry, tmp_path: Path
) -> None:
    options = memory_options(entry)
    assert outputs_of_slots(entry, options) == entry.options.parallel
    assert outputs_of_slots(entry, {**options, "batch": 2}) == 2
    for changes in ({"extra_arguments": ("--spec-type", "draft-mtp")}, {"draft": entry.path}):
        other = replace(entry, options=entry.options.model_copy(update=changes))
        assert outputs_of_slots(other, options) is None
    assert outputs_of_slots(replace(entry, embedding=True), options) is None
    for model in ("minimax-01-moe", "kimi-linear-moe"):
        header = lg.read_header(ground_truth.write_model(model, tmp_path))
        assert outputs_of_slots(replace(entry, header=header), options) is None
