"""From a file that nobody has read to its estimate, beside llama.cpp's dry run of the same question.

``LLAMA_GPU_LLAMA_CPP_BIN`` names the folder with ``llama-fit-params``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import llama_gpu as lg
from llama_gpu.launch import plan_dry_run
from llama_gpu.memory.projection import read_projection
from support import ground_truth, llama_cpp

TOOL = llama_cpp.program("llama-fit-params")
OPTIONS = {"context_length": 8192}

pytestmark = pytest.mark.skipif(TOOL is None, reason=llama_cpp.missing("llama-fit-params"))


@pytest.mark.benchmark(group="from a file to its estimate")
@pytest.mark.parametrize("name", ["llama-3.1-8b-q4k", "qwen3-30b-a3b-q4k", "gemma-3-4b-q4k"])
def test_cold_estimate_against_the_dry_run(
    benchmark: BenchmarkFixture, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TOOL is not None
    model = ground_truth.write_model(name, tmp_path)

    def ours() -> lg.MemoryEstimate:
        return lg.estimate(lg.read_header(model, cached=False), devices=0, **OPTIONS)

    def theirs() -> str:
        question = plan_dry_run(TOOL, model_path=model, gpu_uuids=(), gpu_layers=0, **OPTIONS)
        assert question is not None
        environment = question.full_environment(os.environ)
        done = subprocess.run(question.argv, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    said = benchmark.pedantic(ours, rounds=51, warmup_rounds=2)
    took = []
    for _ in range(5):
        start = perf_counter()
        answer = theirs()
        took.append(perf_counter() - start)
    rows = read_projection(answer, 0)
    assert rows is not None
    assert rows[0][1] == said.host.context_bytes >> 20
    mine, its = benchmark.stats.stats.median, median(took)
    with capsys.disabled():
        print(
            f"\n{name}: file to estimate {mine * 1e6:.0f} µs,"
            f" llama-fit-params {its * 1e3:.0f} ms, {its / mine:,.0f} times that"
        )
