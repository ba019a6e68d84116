"""What a load took, read from llama.cpp's own lines."""

import pytest

from llama_gpu.buffer_lines import BufferLines, LoadedBuffers, split_prefix

MIB = 1024 * 1024


def read(*lines: str) -> LoadedBuffers:
    gathered = BufferLines()
    for line in lines:
        gathered.feed(line)
    return gathered.read()


def test_devices_and_host_are_told_apart() -> None:
    buffers = read(
        "load_tensors: offloaded 20/33 layers to GPU",
        "load_tensors:   CPU_Mapped model buffer size =  2560.50 MiB",
        "load_tensors:        CUDA0 model buffer size =  1024.00 MiB",
        "load_tensors:        CUDA1 model buffer size =   512.25 MiB",
        "llama_context:  CUDA_Host  output buffer size =     0.49 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =   256.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   100.00 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =    20.00 MiB",
    )
    assert buffers.device_bytes == {"CUDA0": 1380 * MIB, "CUDA1": 512 * MIB + MIB // 4}
    assert buffers.host_bytes == 2580 * MIB + MIB // 2 + round(0.49 * MIB)
    assert buffers.by_device["CUDA0"] == {"model": 1024 * MIB, "KV": 256 * MIB, "compute": 100 * MIB}
    assert (buffers.offloaded_layers, buffers.total_layers) == (20, 33)


def test_the_two_caches_of_a_sliding_window_model_add_up() -> None:
    buffers = read(
        "llama_kv_cache:      CUDA0 KV buffer size =    64.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB",
        "llama_memory_recurrent:      CUDA0 RS buffer size =     8.00 MiB",
    )
    assert buffers.by_device == {"CUDA0": {"KV": 80 * MIB, "RS": 8 * MIB}}


def test_reserving_again_replaces_and_a_second_context_adds() -> None:
    buffers = read(
        "llama_context: constructing llama_context",
        "sched_reserve:      CUDA0 compute buffer size =   300.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   100.00 MiB",
        "llama_context: constructing llama_context",
        "sched_reserve:      CUDA0 compute buffer size =    10.00 MiB",
    )
    assert buffers.by_device == {"CUDA0": {"compute": 110 * MIB}}


def test_the_logits_that_are_kept_are_those_of_the_model_not_of_its_draft_nor_of_a_dry_run() -> None:
    lines = [
        "print_info: no_alloc         = 1",
        "llama_context: n_outputs_max         = 2048",
        "print_info: no_alloc         = 0",
        "llama_context: n_outputs_max         = 8",
        "llama_context: n_outputs_max_per_seq = 4",
        "llama_context: n_outputs_max         = 2",
    ]
    assert read(*lines).max_outputs == 8
    assert read(*lines[:3]).max_outputs is None


def test_repacked_and_mapped_weights_are_one_device() -> None:
    buffers = read(
        "load_tensors:   CPU_Mapped model buffer size =   100.00 MiB",
        "load_tensors:   CPU_REPACK model buffer size =    50.00 MiB",
    )
    assert buffers.by_device == {"CPU": {"model": 150 * MIB}}


def test_a_load_without_memory_does_not_count() -> None:
    buffers = read(
        "print_info: no_alloc              = 1",
        "load_tensors:        CUDA0 model buffer size =     9.00 MiB",
        "print_info: no_alloc              = 0",
        "load_tensors:        CUDA0 model buffer size =     7.00 MiB",
    )
    assert buffers.by_device == {"CUDA0": {"model": 7 * MIB}}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "srv  load_model: loading model",
        "x: CUDA0 model buffer size = lots MiB",
        "a" * 20_000 + ": CUDA0 model buffer size = 1.00 MiB",
        "x: CUDA0 model buffer size = 1.2.3 MiB",
    ],
)
def test_other_lines_are_passed_over(line: str) -> None:
    assert read(line).by_device == {}


def test_a_line_is_parted_from_its_time_and_level() -> None:
    assert split_prefix("12.00.031.659 E srv  start: no") == ("E", "srv  start: no")
    assert split_prefix("srv  start: no") == ("", "srv  start: no")
