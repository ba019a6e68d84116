"""Reading a header from Python, beside the ``gguf`` package, in one run; the ratios are printed below.

The least that any reader must do, reading the bytes and walking over the strings, is in ``cargo bench
--bench header``.

A made-up vocabulary of 408,000 strings stands for a large one; ``GGUF_BENCH_FILES`` (paths joined as
in ``PATH``) adds real files.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import gguf
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import llama_gpu as lg
from support.gguf_bytes import ARRAY, STRING, gguf_bytes, text

GIVEN = [Path(path) for path in os.environ.get("GGUF_BENCH_FILES", "").split(os.pathsep) if path]


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


@pytest.fixture(scope="module", params=[None, *GIVEN], ids=["408000-strings", *(path.stem for path in GIVEN)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param is not None:
        return request.param
    path = tmp_path_factory.mktemp("benchmark") / "vocabulary.gguf"
    tokens = strings([f"token{number}" for number in range(128_000)])
    merges = strings([f"{number % 997} {number}" for number in range(280_000)])
    entries = [
        ("general.architecture", STRING, text("llama")),
        ("tokenizer.ggml.tokens", ARRAY, tokens),
        ("tokenizer.ggml.merges", ARRAY, merges),
    ]
    path.write_bytes(gguf_bytes(entries))
    return path


def test_read_header(benchmark: BenchmarkFixture, model: Path) -> None:
    benchmark.group = f"header {model.stem}"
    header = benchmark(lg.read_header, model, cached=False)
    assert len(header.metadata["tokenizer.ggml.tokens"]) > 1000


def test_read_header_again(benchmark: BenchmarkFixture, model: Path) -> None:
    benchmark.group = f"header {model.stem}"
    first = lg.read_header(model)
    assert benchmark(lg.read_header, model) == first


def median_seconds(call: Callable[[], object], tries: int) -> float:
    """The median of some tries."""
    took = []
    for _ in range(tries):
        start = perf_counter()
        call()
        took.append(perf_counter() - start)
    return median(took)


def test_gguf_package(benchmark: BenchmarkFixture, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.group = f"header {model.stem}"
    reader = benchmark.pedantic(gguf.GGUFReader, (model,), rounds=1)
    assert "tokenizer.ggml.tokens" in reader.fields
    theirs = benchmark.stats.stats.median
    ours = median_seconds(lambda: lg.read_header(model, cached=False), 51)
    again = median_seconds(lambda: lg.read_header(model), 1001)
    with capsys.disabled():
        print(
            f"\nread_header, {model.stem}: {ours * 1e6:.0f} µs,"
            f" the gguf package {theirs / ours:,.0f} times that",
            end="",
        )
        print(f"; cached {again * 1e6:.1f} µs")
