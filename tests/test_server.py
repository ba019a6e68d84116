"""One server's life: loading, ready, stopped, crashed; with a stand-in whose misbehaviour is scripted."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from llama_gpu.engine import llama_server_engine
from llama_gpu.errors import ServerExitedError, StartTimeoutError
from llama_gpu.launch import Engine, LaunchPlan, plan_launch
from llama_gpu.ports import Ports
from llama_gpu.server import LOG_TAIL_LINES, Server
from support.processes import has_ended

SUPPORT = Path(__file__).parent / "support"
FAKE, OWNER = SUPPORT / "fake_llama_server.py", SUPPORT / "server_owner.py"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="waits for processes by pidfd, which Linux has"
)


@pytest.fixture(scope="module")
def fake_engine() -> Engine:
    return llama_server_engine(FAKE)


@pytest.fixture
def plan(fake_engine: Engine, tmp_path: Path) -> Callable[..., LaunchPlan]:
    def make(*, port: int = 0, **script: object) -> LaunchPlan:
        return plan_launch(
            engine=fake_engine,
            model_path=tmp_path / "model.gguf",
            alias="tiny",
            api_key=secrets.token_hex(8),
            port=port,
            extra_arguments=("--fake", json.dumps(script)),
        )

    return make


@asynccontextmanager
async def owned(plan: LaunchPlan, **options: object) -> AsyncIterator[Server]:
    async with aiohttp.ClientSession() as http:
        server = Server(plan, model="tiny", http=http, **options)  # type: ignore[arg-type]
        try:
            yield server
        finally:
            await server.stop(0.0)


def gate(tmp_path: Path) -> Path:
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


async def opened(fifo: Path) -> int:
    """The gate's write end, once somebody waits at it."""
    return await asyncio.to_thread(os.open, fifo, os.O_WRONLY)


async def complete(server: Server, http: aiohttp.ClientSession, **request: object) -> str:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    url = f"{server.base_url}/v1/completions"
    async with http.post(url, json={"prompt": "hi", **request}, headers=headers) as response:
        response.raise_for_status()
        return await response.text()


def test_a_started_server_answers_and_is_gone_after_stop(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as server, aiohttp.ClientSession() as http:
            assert server.state == "stopped"
            await server.start()
            assert server.state == "ready"
            assert server.port > 0
            assert server.started_seconds is not None
            assert server.properties["model_alias"] == "tiny"
            assert (
                json.loads(await complete(server, http, max_tokens=2))["choices"][0]["text"] == "word0 word1 "
            )
            await server.stop()
            assert server.state == "stopped"
            assert await server.wait_exited() == 0
            assert server.pid is not None
            assert has_ended(server.pid)

    asyncio.run(body())


def test_start_waits_until_the_model_is_loaded(plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    async def body() -> None:
        fifo = gate(tmp_path)
        async with owned(plan(load_gate=str(fifo))) as server:
            starting = asyncio.create_task(server.start())
            write_end = await opened(fifo)
            assert server.state == "starting"
            assert not starting.done()
            os.close(write_end)
            await starting
            assert server.state == "ready"

    asyncio.run(body())


def test_fifty_callers_start_one_process(plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    async def body() -> None:
        fifo = gate(tmp_path)
        async with owned(plan(load_gate=str(fifo), count_starts=True)) as server:
            callers = asyncio.gather(*(server.ensure_ready() for _ in range(50)))
            os.close(await opened(fifo))
            await callers
            assert (tmp_path / "model.gguf.starts").read_text() == "1"

    asyncio.run(body())


def test_a_caller_that_gives_up_leaves_the_server_to_the_others(
    plan: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    async def body() -> None:
        fifo = gate(tmp_path)
        async with owned(plan(load_gate=str(fifo))) as server:
            patient, impatient = asyncio.create_task(server.start()), asyncio.create_task(server.start())
            write_end = await opened(fifo)
            impatient.cancel()
            os.close(write_end)
            await patient
            assert impatient.cancelled()
            assert server.state == "ready"

    asyncio.run(body())


def test_a_server_that_ends_while_loading_says_why(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        lines = ["loading model", "gguf_init: invalid magic characters", "bye"]
        async with owned(plan(exit_at_load=3, log_lines=lines)) as server:
            with pytest.raises(ServerExitedError, match=r"exit code 3.*invalid magic") as caught:
                await server.start()
            assert caught.value.exit_code == 3
            assert caught.value.model == "tiny"
            assert caught.value.last_log_lines[:3] == tuple(lines)
            assert server.state == "error"
            assert await server.wait_exited() == 3

    asyncio.run(body())


def test_a_server_that_is_not_ready_in_time_is_stopped_before_that_is_said(
    plan: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    async def body() -> None:
        script = {"load_gate": str(gate(tmp_path))}
        async with owned(plan(**script), start_timeout_seconds=0.5) as server:
            with pytest.raises(StartTimeoutError, match=r"not ready after 0\.5 s"):
                await server.start()
            assert server.exit_code is not None
            assert server.state == "error"
            assert server.pid is not None
            assert has_ended(server.pid)

    asyncio.run(body())


def test_a_server_that_ignores_term_is_killed_after_the_grace(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan(ignore_term=True)) as server:
            await server.start()
            await server.stop(0.2)
            assert server.exit_code == -signal.SIGKILL
            assert server.state == "stopped"

    asyncio.run(body())


def test_a_process_that_the_server_started_does_not_outlive_it(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan(grandchild=True)) as server:
            await server.start()
            grandchild = server.properties["grandchild"]
            await server.stop()
            assert server.exit_code == 0
            assert has_ended(grandchild)

    asyncio.run(body())


def test_stop_while_loading_ends_the_wait_and_the_process(
    plan: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    async def body() -> None:
        fifo = gate(tmp_path)
        async with owned(plan(load_gate=str(fifo))) as server:
            starting = asyncio.create_task(server.start())
            write_end = await opened(fifo)
            await server.stop()
            os.close(write_end)
            with pytest.raises(ServerExitedError, match="was stopped"):
                await starting
            assert server.state == "stopped"
            assert server.pid is not None
            assert has_ended(server.pid)

    asyncio.run(body())


def test_stop_may_come_twice_at_once_and_before_start(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as server:
            await server.start()
            await asyncio.gather(server.stop(), server.stop())
            await server.stop()
        async with owned(plan()) as never_started:
            await never_started.stop()
            assert await never_started.wait_exited() is None
            with pytest.raises(ServerExitedError, match="was stopped"):
                await never_started.start()

    asyncio.run(body())


def test_stop_right_after_start_starts_nothing(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as server:
            starting = asyncio.create_task(server.start())
            await server.stop()
            with pytest.raises(ServerExitedError, match="was stopped"):
                await starting
            assert server.pid is None

    asyncio.run(body())


def test_a_loop_that_ends_takes_its_servers_along(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> int:
        http = aiohttp.ClientSession()
        server = Server(plan(ignore_term=True), model="tiny", http=http)
        await server.start()
        await http.close()
        assert server.pid is not None
        return server.pid

    assert has_ended(asyncio.run(body()))


def test_a_crash_while_answering_is_noticed(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan(exit_after_tokens=2, exit_code=134)) as server, aiohttp.ClientSession() as http:
            await server.start()
            with pytest.raises(aiohttp.ClientError):
                await complete(server, http, stream=True)
            assert await server.wait_exited() == 134
            assert server.state == "error"
            with pytest.raises(ServerExitedError, match="ended by itself") as caught:
                await server.ensure_ready()
            assert caught.value.exit_code == 134

    asyncio.run(body())


def test_a_killed_server_reports_the_signal(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as server:
            await server.start()
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            assert await server.wait_exited() == -signal.SIGKILL

    asyncio.run(body())


def test_another_port_is_tried_when_somebody_was_quicker(
    plan: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    async def body() -> None:
        async with owned(plan(port_taken_times=2, count_starts=True)) as server:
            await server.start()
            assert (tmp_path / "model.gguf.starts").read_text() == "3"

    asyncio.run(body())


def test_servers_that_start_at_once_get_ports_of_their_own(plan: Callable[..., LaunchPlan]) -> None:
    first = Ports().take()
    ports = Ports(first=first)

    async def body() -> None:
        async with owned(plan(), ports=ports) as one, owned(plan(), ports=ports) as other:
            await asyncio.gather(one.start(), other.start())
            assert one.port != other.port
            assert min(one.port, other.port) >= first

    asyncio.run(body())


def test_a_stranger_on_the_port_is_not_taken_for_the_server(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as stranger:
            await stranger.start()
            async with owned(plan(port=stranger.port)) as server:
                with pytest.raises(ServerExitedError, match="couldn't bind"):
                    await server.start()

    asyncio.run(body())


def test_a_program_that_is_not_there_is_named(fake_engine: Engine, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-engine")
    engine = Engine(kind="llama-server", command=(missing,), flags=fake_engine.flags)
    plan = plan_launch(engine=engine, model_path="m.gguf", alias="tiny", api_key="k")

    async def body() -> None:
        async with owned(plan) as server:
            with pytest.raises(ServerExitedError, match=f"cannot run {missing}") as caught:
                await server.start()
            assert caught.value.exit_code == 127

    asyncio.run(body())


def test_log_lines_are_handed_on_and_the_last_ones_kept(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        heard: list[str] = []
        lines = [f"line {number}" for number in range(LOG_TAIL_LINES + 50)]
        async with owned(plan(log_lines=["0.00.031.659 I first", *lines]), on_log=heard.append) as server:
            await server.start()
            assert heard[0] == "first"
            assert heard[1 : len(lines) + 1] == lines
            assert len(server.log_tail) == LOG_TAIL_LINES
            assert "line 0" not in server.log_tail

    asyncio.run(body())


def test_output_without_a_newline_does_not_fill_memory(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan(stderr_bytes=1_000_000)) as server:
            await server.start()
            assert max(len(line) for line in server.log_tail) <= 16 * 1024

    asyncio.run(body())


def test_buffers_are_read_from_the_log(plan: Callable[..., LaunchPlan]) -> None:
    async def body() -> None:
        async with owned(plan()) as server:
            await server.start()
            mib = 1024 * 1024
            expected = {"CPU": {"model": 10 * mib, "KV": 2 * mib, "compute": 3 * mib // 2}}
            assert server.buffers.by_device == expected

    asyncio.run(body())


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_killing_the_proxy_kills_its_server(when: str, tmp_path: Path) -> None:
    script = {"ignore_term": True}
    if when == "loading":
        script["load_gate"] = str(gate(tmp_path))  # type: ignore[assignment]
    arguments = [sys.executable, OWNER, FAKE, tmp_path / "model.gguf", "--fake", json.dumps(script)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        child = int(proxy.stdout.readline())
        if when == "ready":
            assert proxy.stdout.readline() == "ready\n"
        proxy.kill()
        assert has_ended(child)


def test_ports_count_up_from_the_first_and_are_given_once() -> None:
    first = Ports().take()
    ports = Ports(first=first)
    taken = [ports.take() for _ in range(3)]
    assert taken == sorted(set(taken))
    assert taken[0] >= first
    ports.give_back(taken[1])
    assert ports.take() == taken[1]
