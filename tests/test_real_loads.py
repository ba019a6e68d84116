"""Full-size models without their weights, loaded by a real llama-server: what was said, and what it took.

No GPU is needed: devices are RPC servers on loopback. ``LLAMA_GPU_LLAMA_CPP_BIN`` names the folder of a build
with ``-DGGML_RPC=ON`` that holds ``llama-server`` and ``ggml-rpc-server``.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

import llama_gpu as lg
from llama_gpu.engine import llama_server_engine
from support import ground_truth, llama_cpp
from support.real_loads import MIB, compared, load

SERVER, DEVICE = llama_cpp.program("llama-server"), llama_cpp.program("ggml-rpc-server")

pytestmark = [
    pytest.mark.skipif(SERVER is None, reason=llama_cpp.missing("llama-server")),
    pytest.mark.skipif(DEVICE is None, reason=llama_cpp.missing("ggml-rpc-server")),
]


@pytest.fixture(scope="module")
def devices() -> Iterator[list[str]]:
    """The addresses of two devices."""
    with ExitStack() as stack:
        addresses = []
        for _ in range(2):
            with closing(socket.socket()) as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            command = [str(DEVICE), "--host", "127.0.0.1", "--port", str(port)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            answers = False
            while not answers and process.poll() is None:
                with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1)):
                    answers = True
            addresses.append(f"127.0.0.1:{port}")
        # the log names devices by their addresses, and is read in the order of names
        yield sorted(addresses)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b-q8"])
def test_a_load_takes_what_was_said(
    name: str, count: int, devices: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SERVER is not None
    model = ground_truth.write_model(name, tmp_path)
    options = {"context_length": 4096, "parallel": 1}
    shares = [1.0] * count if count > 1 else None
    taken = load(
        llama_server_engine(SERVER),
        model,
        [f"GPU-{number}" for number in range(count)],
        tensor_split=shares or (),
        extra_arguments=["--rpc", ",".join(devices[:count])],
        **options,
    )
    outputs = taken.buffers.max_outputs
    said = lg.estimate(
        model, devices=count, tensor_split=shares, backend="generic", max_outputs=outputs, **options
    )
    rows = compared(taken, said)
    with capsys.disabled():
        print(f"\n{name}, said and taken", *rows, sep="\n")
    assert [wrong for row in rows for wrong in row.wrong()] == []


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b-q8", "gemma3-dense", "granitehybrid-dense", "deepseek2-moe"])
def test_a_server_that_has_logits_for_its_slots_alone_takes_what_is_said_of_them(
    name: str, slots: int, devices: list[str], tmp_path: Path
) -> None:
    assert SERVER is not None
    model = ground_truth.write_model(name, tmp_path)
    options = {"context_length": 8192, "parallel": slots, "kv_unified": True}
    taken = load(
        llama_server_engine(SERVER),
        model,
        ["GPU-0"],
        extra_arguments=["--rpc", devices[0], "--no-warmup"],
        **options,
    )
    if taken.buffers.max_outputs != slots:
        pytest.skip(f"this build keeps the logits of {taken.buffers.max_outputs} tokens")
    (row,) = compared(taken, lg.estimate(model, backend="generic", max_outputs=slots, **options))
    # As far as two decimals of a MiB tell.
    assert abs(row.said.compute_bytes - row.compute) <= MIB // 200 + 1
