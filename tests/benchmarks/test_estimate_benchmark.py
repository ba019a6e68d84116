"""How long an estimate takes, called from Python: ``make bench``, with the release build."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

import llama_gpu as lg
from support.gguf_builder import write_sparse

OPTIONS = {"parallel": 4, "kv_unified": True, "flash_attention": "on"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An 8B llama with as many tokens as Llama 3 has."""
    return write_sparse(tmp_path_factory.mktemp("bench") / "llama-8b-Q4_K_M.gguf", vocabulary=128_256)


@pytest.mark.benchmark(group="estimate")
def test_estimate_from_a_header(benchmark, model):
    header = lg.read_header(model)
    contexts = count(4096, 256)
    # Another context every time: nothing remembered helps.
    estimated = benchmark(lambda: lg.estimate(header, context_length=next(contexts), **OPTIONS))
    assert estimated.total_device_bytes > header.file_bytes


@pytest.mark.benchmark(group="estimate")
def test_estimate_again(benchmark, model):
    header = lg.read_header(model)
    assert benchmark(lg.estimate, header, context_length=8192, **OPTIONS).context_length == 8192


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
