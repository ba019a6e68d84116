"""The scheduler and the placement under a simulated clock."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_gpu as lg
from llama_gpu.catalog import Catalog, scan
from llama_gpu.cli.made_up_models import write_made_up_models
from llama_gpu.config import Config
from llama_gpu.errors import ConfigError
from llama_gpu.simulation.load import Request, ZipfLoad, read_trace
from llama_gpu.simulation.outcome import Occupancy, Waiting
from llama_gpu.simulation.servers import MemoryExceededError, SimulatedServers, Timing
from llama_gpu.simulation.strategies import BASELINES, OURS, Situation, most_that_fit, play_strategy

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Forty models of usual sizes."""
    folder = tmp_path_factory.mktemp("models")
    write_made_up_models(folder, 40, seed=1)
    return scan([folder], Config())


def situation(catalog: Catalog, *gibs: float, **changes: Any) -> Situation:
    gpus = [
        lg.Gpu(index=index, total_bytes=int(gib * GIB), free_bytes=int(gib * GIB))
        for index, gib in enumerate(gibs)
    ]
    return Situation(Config(), catalog, gpus, **changes)


def ids(catalog: Catalog, count: int | None = None) -> list[str]:
    return [entry.id for entry in catalog.models][:count]


# --- what is asked for ------------------------------------------------------------------


def test_a_zipf_load_is_the_same_each_time_and_another_with_another_seed() -> None:
    load = ZipfLoad(models=["a", "b", "c"], requests=50, seed=7)
    assert list(load) == list(load) != list(ZipfLoad(models=["a", "b", "c"], requests=50, seed=8))


def test_a_zipf_load_asks_for_the_kth_model_a_kth_as_often() -> None:
    load = ZipfLoad(models=list("abcd"), requests=20_000, rate=2.0, duration_seconds=5.0)
    requests = list(load)
    counts = [count for _, count in Counter(request.model for request in requests).most_common()]
    whole = sum(1 / place for place in range(1, 5))
    for place, count in enumerate(counts, 1):
        assert count / 20_000 == pytest.approx(1 / place / whole, rel=0.05)
    assert requests[-1].time_seconds == pytest.approx(10_000, rel=0.05)
    assert math.fsum(request.duration_seconds for request in requests) / 20_000 == pytest.approx(5, rel=0.05)


def test_other_models_are_popular_after_a_shuffle() -> None:
    names = [str(number) for number in range(30)]
    load = list(ZipfLoad(models=names, requests=4000, exponent=3.0, rate=1.0, seed=2, shuffle_seconds=2000))
    halves = [[r.model for r in load if (r.time_seconds < 2000) is early] for early in (True, False)]
    assert Counter(halves[0]).most_common(1)[0][0] != Counter(halves[1]).most_common(1)[0][0]


def test_a_trace_is_read_in_the_order_of_time_from_its_first_request() -> None:
    lines = [
        '{"time_seconds": 12.5, "model": "b", "duration_seconds": 1}',
        "",
        '{"time_seconds": 10, "model": "a", "duration_seconds": 2.5, "status": 200}',
    ]
    assert read_trace(lines, "trace.jsonl") == [Request(0.0, "a", 2.5), Request(2.5, "b", 1.0)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2: Expecting value"),
        ("[]", "line 2: not an object"),
        ('{"model": "a", "duration_seconds": 1}', "line 2: no field 'time_seconds'"),
        ('{"time_seconds": 1, "duration_seconds": 1}', "line 2: no field 'model'"),
        ('{"time_seconds": 1, "model": 3, "duration_seconds": 1}', "model is not a text"),
        ('{"time_seconds": 1, "model": "a", "duration_seconds": -1}', "duration_seconds is not"),
        ('{"time_seconds": NaN, "model": "a", "duration_seconds": 1}', "time_seconds is not"),
    ],
)
def test_a_broken_line_of_a_trace_is_named(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"trace\.jsonl, line 2") as caught:
        read_trace(["", line], "trace.jsonl")
    assert said in str(caught.value)


# --- what happens -----------------------------------------------------------------------


def test_a_small_load_goes_as_reckoned_by_hand(catalog: Catalog) -> None:
    first, second = sorted(catalog.models, key=lambda entry: entry.file_bytes)[18:20]
    # Room for one of them. A load takes 2 s: the first is there at 2 and answers until 7; only then is it
    # idle. Its server is gone at 8, the second is ready at 10. The third request finds it so.
    timing = Timing(bytes_per_second=1e30, start_seconds=2.0, stop_seconds=1.0)
    given = situation(catalog, 9.0, timing=timing)
    assert given.model_bytes[first.id] + given.model_bytes[second.id] > 9 * GIB
    load = [Request(0.0, first.id, 5.0), Request(1.0, second.id, 3.0), Request(11.0, second.id, 1.0)]
    outcome = play_strategy("single-gpu-preferred", given, load)
    assert outcome.loads_at.tolist() == [0.0, 8.0]
    assert (outcome.evictions, outcome.answered, dict(outcome.refused)) == (1, 3, {})
    assert outcome.waiting == Waiting(mean=11 / 3, p50=2.0, p95=9.0, p99=9.0, max=9.0)
    assert outcome.seconds == 13.0
    held = outcome.occupancy.over([0.0, 7.0, 8.0, 13.0])[0]
    sizes = [given.model_bytes[entry.id] / (9 * GIB) for entry in (first, second)]
    assert held == pytest.approx([sizes[0], sizes[0], sizes[1]])


@settings(max_examples=20, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 39), st.floats(0, 60)), max_size=25),
    gibs=st.lists(st.sampled_from([6.0, 12.0, 24.0]), min_size=1, max_size=3),
    name=st.sampled_from([*OURS, *BASELINES]),
)
def test_every_request_ends_once_and_no_gpu_is_exceeded(
    catalog: Catalog, wanted: list[tuple[float, int, float]], gibs: list[float], name: Any
) -> None:
    load, now = [], 0.0
    for pause, number, duration in wanted:
        now += pause
        load.append(Request(now, ids(catalog)[number], duration))
    outcome = play_strategy(name, situation(catalog, *gibs), load)  # raises where a GPU is exceeded
    assert outcome.answered + sum(outcome.refused.values()) == outcome.requests == len(load)
    assert 0 <= outcome.waiting.p50 <= outcome.waiting.p95 <= outcome.waiting.p99 <= outcome.waiting.max
    assert sum(outcome.left.values()) <= outcome.loads <= len(load)
    assert all(0 <= share <= 1 for steps in outcome.occupancy.fractions for share in steps)
    assert outcome == play_strategy(name, situation(catalog, *gibs), load)


def test_a_popular_model_stays_though_another_was_used_after_it(catalog: Catalog) -> None:
    popular, once, other = sorted(catalog.models, key=lambda entry: entry.file_bytes)[18:21]
    requests = [Request(60.0 * number, popular.id, 1.0) for number in range(10)]
    requests += [Request(700.0, once.id, 1.0), Request(760.0, other.id, 1.0), Request(820.0, popular.id, 1.0)]
    given = situation(catalog, 16.0)
    sizes = [given.model_bytes[entry.id] for entry in (popular, once, other)]
    assert sum(sizes) > 16 * GIB > sum(sizes[:2]) + GIB
    outcome = play_strategy("single-gpu-preferred", given, requests)
    assert (outcome.loads, outcome.evictions) == (3, 1)


def test_a_model_that_fits_nowhere_is_refused_by_every_strategy(catalog: Catalog) -> None:
    largest = max(catalog.models, key=lambda entry: entry.file_bytes)
    load = [Request(0.0, largest.id, 1.0)]
    for name in (*OURS, *BASELINES):
        outcome = play_strategy(name, situation(catalog, 4.0), load)
        assert (outcome.answered, outcome.refused) == (0, {"DoesNotFitError": 1})


def test_models_leave_after_their_idle_time_in_the_simulation_too(tmp_path: Path) -> None:
    write_made_up_models(tmp_path, 1, seed=1)
    config = Config.model_validate({"defaults": {"ttl_seconds": 60}})
    catalog = scan([tmp_path], config)
    (model,) = ids(catalog)
    given = Situation(config, catalog, [lg.Gpu(index=0, total_bytes=80 * GIB, free_bytes=80 * GIB)])
    load = [Request(0.0, model, 1.0), Request(50.0, model, 1.0), Request(500.0, model, 1.0)]
    outcome = play_strategy("pack", given, load)
    assert (outcome.loads, outcome.left) == (2, {"idle": 1})


def test_a_server_without_room_is_found_out() -> None:
    servers = SimulatedServers({"a": 10})
    servers.started("x", {"a": 6})
    with pytest.raises(MemoryExceededError, match="y is 1 bytes too large for a"):
        servers.started("y", {"a": 5})


# --- who loads less ---------------------------------------------------------------------


def test_a_third_less_is_loaded_than_by_counting_at_equal_memory(catalog: Catalog) -> None:
    load = ZipfLoad(models=ids(catalog), requests=800, seed=1)
    given = situation(catalog, 24, 24, 24, 24)
    ours, counting = (play_strategy(name, given, load) for name in ("single-gpu-preferred", "by-count"))
    assert counting.strategy == "by-count (4)"
    assert ours.loads < 0.67 * counting.loads
    assert ours.waiting.mean < 0.67 * counting.waiting.mean


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    asked=st.lists(st.integers(0, 5), max_size=30),
    everything=st.integers(1, 40),
)
def test_the_best_count_is_the_largest_that_never_exceeds_the_memory(
    sizes: list[int], asked: list[int], everything: int
) -> None:
    load = [Request(float(time), str(model % len(sizes)), 0.0) for time, model in enumerate(asked)]
    by_name = {str(model): size for model, size in enumerate(sizes)}

    def fits(count: int) -> bool:
        recent: list[str] = []
        for request in load:
            if by_name[request.model] <= everything:
                recent = [request.model, *(name for name in recent if name != request.model)]
                if sum(by_name[name] for name in recent[:count]) > everything:
                    return False
        return True

    assert most_that_fit(load, by_name, everything) == max(filter(fits, range(1, len(sizes) + 1)), default=1)


# --- how it is summed up ----------------------------------------------------------------


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=40))
def test_a_percentile_is_the_smallest_wait_that_so_many_do_not_exceed(seconds: list[float]) -> None:
    waiting = Waiting.of(seconds)
    for share, value in ((0.5, waiting.p50), (0.95, waiting.p95), (0.99, waiting.p99)):
        within = [
            other for other in set(seconds) if sum(one <= other for one in seconds) >= share * len(seconds)
        ]
        assert value == min(within)
    assert waiting.mean == pytest.approx(sum(seconds) / len(seconds))


@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=12),
    edges=st.lists(st.integers(0, 70), min_size=2, max_size=6, unique=True).map(sorted),
)
def test_occupancy_is_the_area_under_its_steps(steps: list[tuple[int, int]], edges: list[int]) -> None:
    times, levels = [0], [0]
    for wait, level in steps:
        times.append(times[-1] + wait)
        levels.append(level)
    occupancy = Occupancy(("a",), array("d", times), (array("d", levels),))
    each_second = [
        next(level for time, level in zip(reversed(times), reversed(levels), strict=True) if time <= second)
        for second in range(70)
    ]
    expected = [sum(each_second[since:until]) / (until - since) for since, until in pairwise(edges)]
    assert occupancy.over([float(edge) for edge in edges])[0] == pytest.approx(expected)
