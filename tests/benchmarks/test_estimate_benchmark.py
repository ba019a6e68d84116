"""How long an estimate takes, called from Python: ``make bench``, with the release build.

What was planned before is remembered; every call but those of "asked again" has another logical batch or
context, so that it plans anew.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest

import llama_gpu as lg
from support import ground_truth
from support.gguf_builder import write_sparse
from support.stretched import write_stretched

OPTIONS = {"parallel": 4, "kv_unified": True, "flash_attention": "on"}
REAL_LAYERS = 48
TRIES = 15


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An 8B llama with as many tokens as Llama 3 has."""
    return write_sparse(tmp_path_factory.mktemp("bench") / "llama-8b-Q4_K_M.gguf", vocabulary=128_256)


@pytest.mark.benchmark(group="estimate")
def test_estimate_from_a_header(benchmark, model):
    header = lg.read_header(model)
    contexts = count(4096, 256)
    estimated = benchmark(lambda: lg.estimate(header, context_length=next(contexts), **OPTIONS))
    assert estimated.total_device_bytes > header.file_bytes


@pytest.mark.benchmark(group="estimate")
def test_estimate_over_eight_gpus(benchmark, model):
    header = lg.read_header(model)
    contexts = count(4096, 256)
    estimated = benchmark(lambda: lg.estimate(header, context_length=next(contexts), devices=8, **OPTIONS))
    assert len(estimated.devices) == 8


@pytest.mark.benchmark(group="estimate")
def test_header_and_estimate_from_a_cold_file(benchmark, model):
    def cold() -> lg.MemoryEstimate:
        return lg.estimate(lg.read_header(model, cached=False), context_length=8192, **OPTIONS)

    assert benchmark(cold).total_device_bytes > 0


@pytest.mark.benchmark(group="estimate")
def test_estimate_asked_again(benchmark, model):
    header = lg.read_header(model)
    estimated = benchmark(lambda: lg.estimate(header, context_length=8192, **OPTIONS))
    assert estimated.total_device_bytes > header.file_bytes


def microseconds(header: lg.Header, options: dict[str, Any], *, anew: bool = True) -> float:
    """The median of a few tries, the first one left out.

    A logical batch beyond the physical one decides nothing, but what it was planned for is another.
    """
    batch = options.get("batch", 2048)
    tries = []
    for number in range(TRIES + 1):
        own = {**options, "batch": batch + number * anew}
        start = perf_counter()
        lg.estimate(header, **own)
        tries.append((perf_counter() - start) * 1e6)
    return median(tries[1:])


@pytest.fixture(scope="module")
def times(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    """By architecture: the default options at the depth of a large model, and every carried case."""
    folder = tmp_path_factory.mktemp("architectures")
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"deep": [], "again": [], "cases": []})
    for name in ground_truth.model_names():
        path = ground_truth.write_model(name, folder)
        header = lg.read_header(path)
        row = times[header.architecture or "?"]
        layers = header.metadata[f"{header.architecture}.block_count"]
        deep = header
        if layers < REAL_LAYERS // 2:
            deep = lg.read_header(write_stretched(header, folder / "deep.gguf", REAL_LAYERS))
        row["deep"].append(microseconds(deep, {}))
        row["again"].append(microseconds(deep, {}, anew=False))
        row["cases"] += [microseconds(header, case.options) for case in ground_truth.cases(name)]
        path.unlink()
    return times


@pytest.mark.benchmark(group="estimate by architecture")
def test_estimate_by_architecture(benchmark, capsys, times):
    everything = [one for row in times.values() for one in row["cases"]]
    benchmark.pedantic(lambda: median(everything), rounds=1)
    with capsys.disabled():
        print(
            f"\nestimate from a header, µs     default, {REAL_LAYERS} layers   asked again"
            "    carried cases: median   worst"
        )
        for name, row in sorted(times.items()):
            deep = f"{max(row['deep']):18.1f} {max(row['again']):13.1f}"
            print(f"{name:30} {deep} {median(row['cases']):23.1f} {max(row['cases']):7.1f}")
        ordered = sorted(everything)
        ninetieth = ordered[len(ordered) * 9 // 10]
        print(f"{'all':30} {max(max(row['deep']) for row in times.values()):18.1f}", end="")
        print(f"{max(max(row['again']) for row in times.values()):14.1f}", end="")
        print(f"{median(ordered):24.1f} {ordered[-1]:7.1f}   (p90 {ninetieth:.1f})")
    assert len(everything) == sum(len(ground_truth.cases(name)) for name in ground_truth.model_names())
