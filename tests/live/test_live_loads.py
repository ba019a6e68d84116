"""Full-size models of many families, without their weights, loaded on a real GPU: said against taken.

``LLAMA_GPU_LLAMA_CPP_BIN`` names the folder of a CUDA build's ``llama-server``. Without it one is built for
the GPU at hand, which takes cmake, nvcc and a while: from ``LLAMA_GPU_LLAMA_CPP_SOURCE``, else from the
sources in the ``llama_cpp_python`` source package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import llama_gpu as lg
from llama_gpu.engine import llama_server_engine
from llama_gpu.launch import Engine
from support import ground_truth, llama_cpp
from support.real_loads import compared, load

SOURCE_VARIABLE = "LLAMA_GPU_LLAMA_CPP_SOURCE"
SOURCE_PACKAGE = "llama_cpp_python==0.3.36"
GPUS = lg.snapshot_gpus().gpus
BUILD_SECONDS = 3600

MODELS = [
    "qwen2.5-0.5b-q8",
    "smollm3-3b-q4k",
    "phi-3-mini-4k-q4k",
    "gemma-3-4b-q4k",
    "llama-3.2-3b-q8",
    "starcoder2-7b-q4k",
    "qwen3-8b-q4k",
    "jamba-mini-q4k",
    "gemma-2-9b-q4k",
    "glm-4-9b-q4k",
    "gpt-oss-20b-mxfp4",
    "deepseek-v2-lite-q8",
    "qwen3-30b-a3b-q4k",
]

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(BUILD_SECONDS),
    pytest.mark.skipif(not GPUS, reason=f"no GPU here: {lg.snapshot_gpus().error}"),
]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A llama-server with CUDA."""
    given = llama_cpp.program("llama-server")
    if given is None:
        missing = [tool for tool in ("cmake", "nvcc") if shutil.which(tool) is None]
        if missing:
            pytest.skip(
                f"{llama_cpp.missing('llama-server')}, and no {' and no '.join(missing)} to build one"
            )
        given = build(tmp_path_factory.mktemp("llama.cpp"))
    return llama_server_engine(given)


def build(folder: Path) -> Path:
    """Build llama-server for the GPU at hand alone."""
    major, minor = GPUS[0].compute_capability or (0, 0)
    options = [
        "-DGGML_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
    ]
    subprocess.run(["cmake", "-S", str(source(folder)), "-B", str(folder / "build"), *options], check=True)
    jobs = str(os.cpu_count() or 1)
    command = ["cmake", "--build", str(folder / "build"), "-j", jobs, "--target", "llama-server"]
    subprocess.run(command, check=True)
    return folder / "build" / "bin" / "llama-server"


def source(folder: Path) -> Path:
    """llama.cpp's sources."""
    if given := os.environ.get(SOURCE_VARIABLE):
        return Path(given)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--no-build-isolation", "-d", str(folder), SOURCE_PACKAGE], check=True)
    (package,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_load_on_the_gpu_takes_what_was_said(
    name: str, devices: int, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ground_truth.write_model(name, tmp_path)
    header = lg.read_header(model)
    gpu = max(lg.snapshot_gpus(), key=lambda gpu: gpu.free_bytes or 0)
    options = {"context_length": 8192, "parallel": 1}
    split = [1.0] * devices if devices > 1 else None
    capability = gpu.compute_capability
    placed = {"devices": devices, "tensor_split": split, "compute_capability": capability, **options}
    most = lg.estimate(header, **placed).total_device_bytes
    if most > (gpu.free_bytes or 0):
        pytest.skip(f"{most >> 20} MiB do not fit {gpu.name}")
    # one GPU shows itself as two: the same process holds both, so the driver's word is of their sum
    emulated = {"GGML_CUDA_DEVICES": str(devices)} if devices > 1 else {}
    taken = load(
        engine,
        model,
        [gpu.uuid],
        environment=emulated,
        extra_arguments=["-ts", ",".join(["1"] * devices)] if devices > 1 else (),
        **options,
    )
    said = lg.estimate(header, max_outputs=taken.buffers.max_outputs, **placed)
    told = taken.by_driver.get(gpu.uuid)
    rows = compared(taken, said, [told] if devices == 1 else ())
    with capsys.disabled():
        print(f"\n{name}, {devices} devices, said and taken; {told} bytes by the driver", *rows, sep="\n")
    assert [wrong for row in rows for wrong in row.wrong()] == []
