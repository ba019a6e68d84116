"""How long the core takes, called from Python: ``make bench``, with the release build.

The tables compare what stands in one group: the number in brackets is the ratio.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

import llama_gpu as lg
from support.gguf_builder import write_sparse

GIB = 1024**3
OPTIONS = {"context_length": 32768, "parallel": 4, "kv_unified": True, "flash_attention": "on"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An 8B llama with the vocabulary of Llama 3: 128,256 tokens and 280,147 merges."""
    merges = [f"tok{index} en{index % 977}" for index in range(280_147)]
    return write_sparse(
        tmp_path_factory.mktemp("bench") / "llama-8b-Q4_K_M.gguf",
        vocabulary=128_256,
        metadata={"tokenizer.ggml.merges": merges},
    )


@pytest.fixture(scope="module")
def eight_gpus() -> list[lg.Gpu]:
    sizes = (24, 24, 16, 12, 48, 80, 8, 24)
    return [
        lg.Gpu(index=index, uuid=f"GPU-{index}", total_bytes=size * GIB, free_bytes=(size - 1) * GIB)
        for index, size in enumerate(sizes)
    ]


@pytest.mark.benchmark(group="read a header with 128,256 tokens and 280,147 merges")
def test_read_header(benchmark, model):
    header = benchmark(lg.read_header, model, cached=False)
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 128_256


@pytest.mark.benchmark(group="read a header with 128,256 tokens and 280,147 merges")
def test_read_header_again(benchmark, model):
    assert benchmark(lg.read_header, model) == lg.read_header(model, cached=False)


@pytest.mark.timeout(600)  # it takes its time: that is what is shown
@pytest.mark.benchmark(group="read a header with 128,256 tokens and 280,147 merges")
def test_gguf_package(benchmark, model):
    reader = benchmark.pedantic(gguf.GGUFReader, (model,), rounds=1)
    assert len(reader.tensors) == len(lg.read_header(model).tensors)


@pytest.mark.benchmark(group="estimate and place, from a header")
def test_estimate(benchmark, model):
    header = lg.read_header(model)
    assert benchmark(lg.estimate, header, **OPTIONS).total_device_bytes > header.file_bytes


@pytest.mark.benchmark(group="estimate and place, from a header")
def test_place_on_one_of_eight_gpus(benchmark, model, eight_gpus):
    header = lg.read_header(model)
    assert benchmark(lg.place, header, eight_gpus, **OPTIONS).mode == "single"


@pytest.mark.benchmark(group="estimate and place, from a header")
def test_place_over_several_of_eight_gpus(benchmark, model, eight_gpus):
    header = lg.read_header(model)
    small = [gpu.replace(free_bytes=3 * GIB) for gpu in eight_gpus]
    placement = benchmark(lg.place, header, small, **OPTIONS)
    assert placement.mode == "multi"


@pytest.mark.benchmark(group="estimate and place, from a header")
def test_place_with_evictions_on_eight_gpus(benchmark, model, eight_gpus):
    header = lg.read_header(model)
    full = [gpu.replace(free_bytes=GIB) for gpu in eight_gpus]
    running = [
        lg.Running(f"model-{index}", {gpu.uuid: gpu.total_bytes - 2 * GIB}, idle_seconds=60.0 * index)
        for index, gpu in enumerate(eight_gpus)
    ]
    placement = benchmark(lg.place, header, full, running=running, **OPTIONS)
    assert len(placement.evict) == 1
