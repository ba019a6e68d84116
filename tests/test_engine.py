"""Finding an engine, and the embedded one at work with real models."""

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import gguf
import pytest

from llama_gpu.engine import embedded_engine, find_engine, list_devices, llama_server_engine
from llama_gpu.engine.arguments import build_parser
from llama_gpu.errors import ConfigError, ServerExitedError
from llama_gpu.launch import Engine, plan_launch
from llama_gpu.server import Server
from support.gguf_builder import write_embedding_model, write_llama, write_sparse
from support.processes import has_ended

SUPPORT = Path(__file__).parent / "support"
FAKE, OWNER = SUPPORT / "fake_llama_server.py", SUPPORT / "server_owner.py"

needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="pip install 'llama-gpu[engine]' brings the engine"
)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    folder = tmp_path / "commands"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_llama_server_on_path_is_taken_first(commands: Path) -> None:
    (commands / "llama-server").symlink_to(FAKE)
    engine = find_engine()
    assert engine.kind == "llama-server"
    assert engine.command == (str(commands / "llama-server"),)
    assert engine.version == "0 (fake)"
    assert engine.knows("-ngl")
    assert not engine.knows("--no-such-flag")
    assert engine.describe() == f"llama-server 0 (fake), {commands}/llama-server (found on PATH)"


@needs_xllamacpp
@pytest.mark.usefixtures("commands")
def test_without_llama_server_the_embedded_engine_is_taken() -> None:
    engine = find_engine()
    assert engine.kind == "embedded"
    assert engine.reason == "no llama-server on PATH"
    assert engine.version is not None
    assert engine.version.startswith("xllamacpp ")


@needs_xllamacpp
def test_a_broken_llama_server_on_path_is_passed_over_with_its_reason(commands: Path) -> None:
    executable(commands / "llama-server", "#!/bin/sh\necho libcuda is missing >&2\nexit 3\n")
    engine = find_engine()
    assert engine.kind == "embedded"
    assert "exit code 3: libcuda is missing" in engine.reason


def test_a_configured_path_that_is_not_there_says_how_to_get_an_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'llama-gpu\[engine\]'") as caught:
        find_engine(tmp_path / "nowhere" / "llama-server")
    assert caught.value.key == "engine.path"


def test_a_configured_broken_program_is_an_error_not_a_reason(tmp_path: Path) -> None:
    broken = executable(tmp_path / "llama-server", "#!/bin/sh\nexit 3\n")
    with pytest.raises(ConfigError, match="exit code 3"):
        find_engine(broken)


def test_another_program_is_not_taken_for_llama_server(tmp_path: Path) -> None:
    other = executable(tmp_path / "other", "#!/bin/sh\necho usage: other [--verbose]\n")
    with pytest.raises(ConfigError, match="does not list"):
        find_engine(other)


def test_a_program_that_was_replaced_is_examined_again(tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    shutil.copy(FAKE, path)
    assert llama_server_engine(path).version == "0 (fake)"
    path.write_text(path.read_text().replace("version: 0 (fake)", "version: 12345 (fake)"))
    assert llama_server_engine(path).version == "12345 (fake)"


@pytest.mark.usefixtures("commands")
def test_no_engine_at_all_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match=r"no llama-server on PATH.*pip install 'llama-gpu\[engine\]'"):
        find_engine()
    with pytest.raises(ConfigError, match="no llama-server on PATH"):
        find_engine(kind="llama-server")


def test_the_engine_without_its_package_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['xllamacpp'] = None; from llama_gpu.engine.__main__ import main; "
    code += "sys.exit(main(['-m', 'a.gguf']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'llama-gpu[engine]'" in done.stderr


def test_the_devices_of_an_engine_are_listed() -> None:
    assert list_devices(llama_server_engine(FAKE)) == ("CUDA0: NVIDIA Fake (24077 MiB, 23600 MiB free)",)
    unknowing = Engine(kind="llama-server", command=("old",), flags=frozenset())
    assert list_devices(unknowing) == ()


@needs_xllamacpp
def test_the_devices_of_the_embedded_engine_are_those_that_it_was_built_for() -> None:
    from xllamacpp import get_device_info  # noqa: PLC0415 - needs xllamacpp

    names = [device["name"] for device in get_device_info() if device["type"].name.endswith("GPU")]
    assert [line.partition(":")[0] for line in list_devices(embedded_engine())] == names


@needs_xllamacpp
def test_finding_an_engine_does_not_import_it() -> None:
    code = "import sys, llama_gpu.server; from llama_gpu.engine import embedded_engine; "
    code += "embedded_engine(); sys.exit('xllamacpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_xllamacpp
def test_flags_reach_llama_cpp() -> None:
    from llama_gpu.engine.embedded import common_params  # noqa: PLC0415 - needs xllamacpp

    flags = "-m a.gguf -a tiny --port 9 -c 512 -np 3 -b 64 -ub 32 -kvu -fa on -ctk q8_0 -ctv bf16 --swa-full"
    flags += " -ngl 7 -sm row -ts 3,1 -mg 1 -ncmoe 2 -nkvo -t 5 --embeddings --pooling last --cache-ram 12"
    flags += " -md d.gguf -ngld 0 --spec-type draft-simple -nr --no-host --fit off --metrics --no-ui -lv 4"
    params = common_params(build_parser().parse_args(flags.split()))
    numbers = (
        params.port,
        params.n_ctx,
        params.n_parallel,
        params.n_batch,
        params.n_ubatch,
        params.n_gpu_layers,
    )
    assert numbers == (9, 512, 3, 64, 32, 7)
    assert (params.main_gpu, params.cpuparams.n_threads, params.cache_ram_mib, params.verbosity) == (
        1,
        5,
        12,
        4,
    )
    assert params.tensor_split[:3] == [3.0, 1.0, 0.0]
    named = (params.flash_attn_type, params.cache_type_k, params.cache_type_v, params.split_mode)
    assert [member.name.rpartition("TYPE_")[2] for member in named[:3]] == ["ENABLED", "Q8_0", "BF16"]
    assert named[3].name.endswith("ROW")
    assert params.pooling_type.name.endswith("LAST")
    assert params.model_alias == {"tiny"}
    experts = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert params.tensor_buft_overrides == rf"blk\.0{experts},blk\.1{experts}"
    assert params.speculative.draft.mparams.path == "d.gguf"
    on = (params.kv_unified, params.swa_full, params.no_kv_offload, params.embedding, params.endpoint_metrics)
    assert all((*on, params.no_extra_bufts, params.no_host))
    off = (params.fit_params, params.ui)
    assert not any(off)


@asynccontextmanager
async def loaded(model: Path, **options: Any) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    plan = plan_launch(
        engine=embedded_engine(),
        model_path=model,
        alias="tiny",
        api_key="secret",
        **{"context_length": 1024, "threads": 1, **options},
    )
    headers = {"Authorization": "Bearer secret"}
    async with aiohttp.ClientSession() as http, aiohttp.ClientSession(headers=headers) as client:
        server = Server(plan, model="tiny", http=http, start_timeout_seconds=60)
        try:
            await server.start()
            yield server, client
        finally:
            await server.stop(0.0)


def process_file(server: Server, name: str) -> list[str]:
    return Path(f"/proc/{server.pid}/{name}").read_text().removesuffix("\0").split("\0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama.gguf")


@needs_xllamacpp
def test_a_real_model_loads_answers_and_ends_on_term(llama: Path) -> None:
    async def body() -> None:
        async with loaded(llama, parallel=2, gpu_uuids=["GPU-x", "GPU-y"], tensor_split=[2, 1]) as (
            server,
            http,
        ):
            assert server.properties["total_slots"] == 2
            assert server.properties["model_alias"] == "tiny"
            request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            async with http.post(f"{server.base_url}/v1/chat/completions", json=request) as response:
                assert response.status == 200
                assert (await response.json())["usage"]["completion_tokens"] == 4
            async with aiohttp.request(
                "POST", f"{server.base_url}/v1/chat/completions", json=request
            ) as response:
                assert response.status == 401
            assert "CUDA_VISIBLE_DEVICES=GPU-x,GPU-y" in process_file(server, "environ")
            assert process_file(server, "cmdline") == list(server.plan.argv)
            await server.stop()
            assert server.exit_code == 0

    asyncio.run(body())


@needs_xllamacpp
def test_the_buffers_of_a_real_load_are_read(llama: Path) -> None:
    file_bytes = llama.stat().st_size

    async def body() -> None:
        async with loaded(llama) as (server, _):
            layers, heads_kv, head, cells, half = 2, 2, 16, 1024, 2
            kinds = server.buffers.by_device["CPU"]
            assert kinds["KV"] == 2 * layers * cells * heads_kv * head * half
            assert abs(kinds["model"] - file_bytes) < 32 * 1024
            assert kinds["compute"] > 0

    asyncio.run(body())


@asynccontextmanager
async def endless_stream(
    server: Server, http: aiohttp.ClientSession
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer of which something has come and that nobody will see the end of."""
    request = {"prompt": "hi", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
    async with http.post(f"{server.base_url}/v1/completions", json=request) as response:
        assert await response.content.readany()
        yield response


@needs_xllamacpp
def test_term_ends_a_server_that_is_streaming(llama: Path) -> None:
    async def body() -> None:
        async with loaded(llama) as (server, http), endless_stream(server, http):
            await server.stop(5.0)
            assert server.exit_code == 0

    asyncio.run(body())


@needs_xllamacpp
def test_term_ends_a_server_in_the_middle_of_its_load(tmp_path: Path) -> None:
    # Large enough to be far from ready when the log says that loading has begun.
    f16 = gguf.GGMLQuantizationType.F16
    large = write_sparse(tmp_path / "large.gguf", layers=4, context=2048, quantization=f16)
    plan = plan_launch(engine=embedded_engine(), model_path=large, alias="large", api_key="k")

    async def body() -> None:
        loading = asyncio.Event()

        def heard(line: str) -> None:
            if "load_tensors" in line:
                loading.set()

        async with aiohttp.ClientSession() as http:
            server = Server(plan, model="large", http=http, on_log=heard)
            starting = asyncio.create_task(server.start())
            begun = asyncio.create_task(loading.wait())
            await asyncio.wait({starting, begun}, return_when=asyncio.FIRST_COMPLETED)
            assert not starting.done()
            await server.stop(60.0)
            with pytest.raises(ServerExitedError, match="was stopped"):
                await starting
            assert server.exit_code == -signal.SIGTERM

    asyncio.run(body())


@needs_xllamacpp
def test_a_crash_of_the_real_engine_closes_the_stream(llama: Path) -> None:
    async def body() -> None:
        async with loaded(llama) as (server, http):
            async with endless_stream(server, http) as response:
                assert server.pid is not None
                os.kill(server.pid, signal.SIGABRT)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            assert await server.wait_exited() == -signal.SIGABRT

    asyncio.run(body())


@needs_xllamacpp
def test_a_file_that_is_no_model_is_refused_with_llama_cpps_reason(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time")

    async def body() -> None:
        with pytest.raises(ServerExitedError, match="invalid magic characters") as caught:
            async with loaded(path):
                pass
        assert caught.value.exit_code == 1

    asyncio.run(body())


@needs_xllamacpp
def test_a_flag_that_the_engine_does_not_know_is_named(llama: Path) -> None:
    async def body() -> None:
        with pytest.raises(ServerExitedError, match="unrecognized arguments: --no-such-flag"):
            async with loaded(llama, extra_arguments=("--no-such-flag",)):
                pass

    asyncio.run(body())


@needs_xllamacpp
def test_embeddings_are_answered_where_they_were_asked_for(llama: Path, tmp_path: Path) -> None:
    bert = write_embedding_model(tmp_path / "bert.gguf")

    async def vectors(model: Path, **options: Any) -> tuple[int, dict[str, Any]]:
        async with loaded(model, **options) as (server, http):
            question = {"input": ["a", "b c"]}
            async with http.post(f"{server.base_url}/v1/embeddings", json=question) as response:
                return response.status, await response.json()

    for model, options in ((bert, {"context_length": 512}), (llama, {"pooling": "mean"})):
        status, answer = asyncio.run(vectors(model, embeddings=True, **options))
        assert status == 200, answer
        assert [len(row["embedding"]) for row in answer["data"]] == [64, 64]
    status, answer = asyncio.run(vectors(llama))
    assert status == 501
    assert "--embeddings" in answer["error"]["message"]


@needs_xllamacpp
def test_a_draft_model_speeds_up_without_changing_the_answer(llama: Path) -> None:
    async def answer(**options: Any) -> dict[str, Any]:
        async with loaded(llama, **options) as (server, http):
            request = {"prompt": "hi", "max_tokens": 16, "temperature": 0}
            async with http.post(f"{server.base_url}/v1/completions", json=request) as response:
                found: dict[str, Any] = await response.json()
                return found

    plain, drafted = asyncio.run(answer()), asyncio.run(answer(draft=llama))
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert drafted["timings"]["draft_n_accepted"] > 0


@needs_xllamacpp
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_killing_the_proxy_kills_the_real_engine(llama: Path) -> None:
    with subprocess.Popen(
        [sys.executable, OWNER, "embedded", llama], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert owner.stdout.readline() == "ready\n"
        owner.kill()
        assert has_ended(child)


def test_the_engine_lists_its_flags_for_people() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_gpu.engine", "--help"], capture_output=True, text=True, check=True
    )
    assert "--n-gpu-layers" in done.stdout
