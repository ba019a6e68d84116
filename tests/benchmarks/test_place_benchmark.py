"""How long a decision takes, and how often a simpler one is wrong: ``make bench``, with the release build.

The percentiles are printed below each other; the table of the plugin has no 99th.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

import llama_gpu as lg
from llama_gpu.errors import DoesNotFitError
from support.gguf_builder import write_sparse

GIB = 1 << 30
OPTIONS = {"context_length": 8192}


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> lg.Header:
    """A llama of 70B at Q4_K: 80 layers, some 40 GiB."""
    path = tmp_path_factory.mktemp("bench") / "large.gguf"
    write_sparse(path, layers=80, embedding=8192, feed_forward=28672, heads=64, vocabulary=128256)
    return lg.read_header(path)


def gpus(count: int, total_gib: float, free_gib: Any) -> list[lg.Gpu]:
    """So many GPUs of a size; ``free_gib`` gives what is free on each."""
    return [
        lg.Gpu(
            index=index,
            uuid=f"GPU-{index:08d}-0000-0000-0000-000000000000",
            name="NVIDIA H100 80GB HBM3",
            total_bytes=int(total_gib * GIB),
            free_bytes=int(free_gib(index) * GIB),
        )
        for index in range(count)
    ]


def tenants(box: list[lg.Gpu], count: int, gib: tuple[float, float]) -> list[lg.Running]:
    """Models of random size on the GPUs in turn; every seventh is busy."""
    random_ = random.Random(1)
    return [
        lg.Running(
            f"model-{place}",
            {box[place % len(box)].uuid: int(random_.uniform(*gib) * GIB)},
            idle_seconds=random_.uniform(0, 1000),
            busy=place % 7 == 0,
        )
        for place in range(count)
    ]


def spread(low: float, high: float) -> Any:
    random_ = random.Random(2)
    return lambda _index: random_.uniform(low, high)


@dataclass
class Scenario:
    """A question, the number of GPUs of its answer, and the time it may take."""

    name: str
    box: list[lg.Gpu]
    devices: int
    aim: str
    running: list[lg.Running] = field(default_factory=list)
    rounds: int = 2000


FULL = gpus(8, 80, lambda _index: 4)
TIGHT = gpus(8, 24, lambda _index: 2)
SCENARIOS = [
    Scenario("one of 8", gpus(8, 80, lambda index: 20 + 8 * index), 1, "20 / 60"),
    Scenario("several of 8", gpus(8, 24, lambda index: 14 + index), 2, "20 / 60"),
    Scenario("one of 8, evicting among 32", FULL, 1, "200 p99", tenants(FULL, 32, (2, 18))),
    Scenario("several of 8, evicting among 32", TIGHT, 2, "200 p99", tenants(TIGHT, 32, (2, 8))),
    Scenario("one of 64", gpus(64, 80, spread(2, 80)), 1, ""),
    Scenario("one of 1,024", gpus(1024, 80, spread(2, 80)), 1, "300", rounds=500),
    Scenario("several of 1,024", gpus(1024, 24, spread(2, 24)), 2, "300", rounds=500),
    Scenario("one of 10,000", gpus(10_000, 80, spread(2, 80)), 1, "1000", rounds=200),
    Scenario("several of 10,000", gpus(10_000, 24, spread(2, 24)), 2, "1000", rounds=200),
]


def percentile(sorted_seconds: list[float], fraction: float) -> float:
    """In microseconds."""
    return sorted_seconds[int(len(sorted_seconds) * fraction)] * 1e6


def show(capsys: pytest.CaptureFixture[str], name: str, seconds: list[float], aim: str) -> None:
    ordered = sorted(seconds)
    aimed = f"   aim {aim} µs" if aim else ""
    with capsys.disabled():
        print(
            f"\n{name:34} p50 {percentile(ordered, 0.5):8.1f}  p99 {percentile(ordered, 0.99):8.1f} µs{aimed}"
        )


@pytest.mark.benchmark(group="place, 80 layers")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_place(benchmark, capsys, header, scenario: Scenario) -> None:
    def ask() -> lg.Placement:
        return lg.place(header, scenario.box, running=scenario.running, **OPTIONS)

    placement = benchmark.pedantic(ask, rounds=scenario.rounds, warmup_rounds=20)
    assert len(placement.devices) == scenario.devices
    assert bool(placement.evict) == bool(scenario.running)
    show(capsys, f"place: {scenario.name}", benchmark.stats.stats.data, scenario.aim)


@pytest.mark.benchmark(group="place by the number of layers, several of 8")
@pytest.mark.parametrize("layers", [16, 32, 64, 128, 256])
def test_place_by_layers(benchmark, capsys, tmp_path, layers: int) -> None:
    path = write_sparse(tmp_path / "model.gguf", layers=layers, embedding=2048, feed_forward=8192)
    header = lg.read_header(path)
    need = lg.estimate(header, **OPTIONS).total_device_bytes / GIB
    box = gpus(8, 24, lambda _index: need * 0.7)
    placement = benchmark.pedantic(lambda: lg.place(header, box, **OPTIONS), rounds=1000, warmup_rounds=20)
    assert placement.mode == "multi"
    show(capsys, f"place: {layers} layers", benchmark.stats.stats.data, "")


@pytest.mark.benchmark(group="place by the number of running models, one of 8")
@pytest.mark.parametrize("count", [8, 16, 32, 64, 128, 256])
def test_place_by_running_models(benchmark, capsys, header, count: int) -> None:
    running = tenants(FULL, count, (2, 18))
    placement = benchmark.pedantic(
        lambda: lg.place(header, FULL, running=running, **OPTIONS), rounds=1000, warmup_rounds=20
    )
    assert placement.evict
    show(capsys, f"place: evicting among {count}", benchmark.stats.stats.data, "")


@pytest.mark.benchmark(group="place by the number of GPUs, several")
@pytest.mark.parametrize("count", [2, 4, 8, 16, 64, 256])
def test_place_by_gpus(benchmark, capsys, header, count: int) -> None:
    box = gpus(count, 24, lambda index: 20 + index % 4)
    placement = benchmark.pedantic(lambda: lg.place(header, box, **OPTIONS), rounds=1000, warmup_rounds=20)
    assert len(placement.devices) == 2
    show(capsys, f"place: two of {count} GPUs", benchmark.stats.stats.data, "")


@pytest.mark.benchmark(group="explain, several of 8, evicting among 32")
def test_explain(benchmark, capsys, header) -> None:
    running = tenants(TIGHT, 32, (2, 8))
    found = benchmark.pedantic(
        lambda: lg.explain(header, TIGHT, running=running, **OPTIONS), rounds=200, warmup_rounds=5
    )
    assert found.placement is not None
    show(capsys, "explain: several of 8, evicting among 32", benchmark.stats.stats.data, "")


@pytest.mark.benchmark(group="ledger")
@pytest.mark.parametrize("operation", ["reserve", "commit", "release"])
def test_ledger(benchmark, capsys, operation: str) -> None:
    ledger = lg.Ledger(FULL)
    bytes_by_gpu = {FULL[0].uuid: GIB}
    leases: list[lg.Lease] = []

    def ready() -> None:
        for lease in leases:
            lease.release()
        leases[:] = [] if operation == "reserve" else [ledger.reserve("model", bytes_by_gpu)]

    def reserve() -> None:
        leases.append(ledger.reserve("model", bytes_by_gpu))

    asked = {
        "reserve": reserve,
        "commit": lambda: leases[0].commit(bytes_by_gpu),
        "release": lambda: bool(leases) and leases[0].release(),
    }
    benchmark.pedantic(asked[operation], setup=ready, rounds=5000, warmup_rounds=100)
    show(capsys, f"ledger: {operation}", benchmark.stats.stats.data, "2")


def greedy(need: int, box: list[lg.Gpu]) -> list[tuple[lg.Gpu, float]] | None:
    """What proxies commonly do: the emptiest GPUs until the sum is enough, split by what is free."""
    one = [gpu for gpu in box if (gpu.free_bytes or 0) >= need]
    if one:
        return [(max(one, key=lambda gpu: gpu.free_bytes or 0), 1.0)]
    taken: list[lg.Gpu] = []
    for gpu in sorted(box, key=lambda gpu: gpu.free_bytes or 0, reverse=True):
        taken.append(gpu)
        free = sum(gpu.free_bytes or 0 for gpu in taken)
        if free >= need:
            taken.sort(key=lambda gpu: gpu.index)
            return [(gpu, (gpu.free_bytes or 0) / free) for gpu in taken]
    return None


@pytest.mark.benchmark(group="the greedy allocator")
def test_greedy(benchmark, capsys, header) -> None:
    """The same questions to a greedy allocator: how often it goes over what a GPU has, or gives up."""
    random_ = random.Random(3)
    need = lg.estimate(header, **OPTIONS).total_device_bytes
    boxes = [gpus(8, 48, lambda _index: random_.uniform(1, 30)) for _ in range(1000)]
    over = more = wrong = refused = asked = 0
    for box in boxes:
        try:
            fewest = len(lg.place(header, box, **OPTIONS).devices)
        except DoesNotFitError:
            continue
        asked += 1
        chosen = greedy(need, box)
        if chosen is None:
            refused += 1
            continue
        estimate = lg.estimate(
            header, devices=len(chosen), tensor_split=[share for _, share in chosen], **OPTIONS
        )
        is_over = any(
            device.total_bytes > (gpu.free_bytes or 0)
            for device, (gpu, _) in zip(estimate.devices, chosen, strict=True)
        )
        is_more = len(chosen) > fewest
        over, more, wrong = over + is_over, more + is_more, wrong + (is_over or is_more)
    benchmark.pedantic(lambda: greedy(need, boxes[0]), rounds=2000, warmup_rounds=20)
    assert asked > 500
    show(capsys, "greedy: 8 GPUs", benchmark.stats.stats.data, "")
    with capsys.disabled():
        print(f"greedy: of {asked} questions {over} went over a GPU's memory, {more} took more GPUs than")
        print(f"        needed, {refused} were refused: {(wrong + refused) / asked:.1%} wrong; place: 0.0%")
