"""However a server's task ends, the claim behind it ends too, and no process is left."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llama_gpu.counts import Counts
from llama_gpu.effects import Admit, Effect, Refuse, Start, Stop
from llama_gpu.engine import llama_server_engine
from llama_gpu.errors import LlamaGpuError, ServerError
from llama_gpu.events import StateChanges
from llama_gpu.launch import Engine, plan_launch
from llama_gpu.monitor import GpuMonitor
from llama_gpu.owning import Owning
from llama_gpu.residents import Assignment
from llama_gpu.scheduler import Scheduler
from llama_gpu.server import Server
from support.processes import has_ended

FAKE = Path(__file__).parent / "support" / "fake_llama_server.py"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return llama_server_engine(FAKE)


@dataclass
class Proxy:
    """A scheduler whose effects are carried out; ``fails_at`` names a step that raises ``failure``."""

    http: aiohttp.ClientSession
    engine: Engine
    folder: Path
    fails_at: str = ""
    failure: Exception = field(default_factory=lambda: RuntimeError("broken on purpose"))
    script: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda *_: Assignment("cpu"))
        self.owning = Owning(
            self.scheduler,
            GpuMonitor(off_reason="a test"),
            decide=self.decide,
            make=self.make,
            became_ready=self.became_ready,
            counts=Counts(),
            changes=StateChanges(),
        )
        self.tasks: list[asyncio.Task[None]] = []
        self.answers: list[Effect] = []
        self.pids: list[int] = []
        self.told = asyncio.Event()

    def decide(self, event: Callable[[float], list[Effect]]) -> None:
        for effect in event(time.monotonic()):
            match effect:
                case Start():
                    self.spawn(self.owning.own(effect))
                case Stop():
                    self.spawn(self.owning.stop(effect))
                case Admit() | Refuse():
                    self.answers.append(effect)
                    self.told.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    async def make(self, _start: Start) -> Server:
        if self.fails_at == "make":
            raise self.failure
        plan = plan_launch(
            engine=self.engine,
            model_path=self.folder / "model.gguf",
            alias="tiny",
            api_key=secrets.token_hex(8),
            extra_arguments=("--fake", json.dumps(self.script)),
        )
        return Server(plan, model="tiny", http=self.http)

    async def became_ready(self, _start: Start, server: Server) -> None:
        assert server.pid is not None
        self.pids.append(server.pid)
        if self.fails_at == "ready":
            raise self.failure

    async def until_all_is_over(self) -> None:
        while pending := [task for task in self.tasks if not task.done()]:
            await asyncio.wait(pending)


def with_a_proxy(
    engine: Engine, folder: Path, body: Callable[[Proxy], Awaitable[None]], **fields: Any
) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            proxy = Proxy(http, engine, folder, **fields)
            await body(proxy)
            await proxy.until_all_is_over()
            assert proxy.scheduler.residents == {}, "a claim was left behind"
            assert proxy.owning.servers == {}
            assert all(has_ended(pid) for pid in proxy.pids), "a process was left behind"

    asyncio.run(run())


@pytest.mark.parametrize("failure", [RuntimeError("a mistake of ours"), ServerError("it cannot be")])
@pytest.mark.parametrize("fails_at", ["make", "ready"])
def test_a_failure_at_any_step_ends_the_claim_and_the_requests(
    engine: Engine, tmp_path: Path, fails_at: str, failure: Exception
) -> None:
    async def body(proxy: Proxy) -> None:
        proxy.decide(lambda now: proxy.scheduler.request_arrived(1, "tiny", now))
        await proxy.told.wait()
        (answer,) = proxy.answers
        assert isinstance(answer, Refuse)
        assert isinstance(answer.error, LlamaGpuError)
        assert str(failure) in str(answer.error)

    with_a_proxy(engine, tmp_path, body, fails_at=fails_at, failure=failure)


def test_a_server_that_ends_while_loading_ends_the_claim_and_the_requests(
    engine: Engine, tmp_path: Path
) -> None:
    async def body(proxy: Proxy) -> None:
        proxy.decide(lambda now: proxy.scheduler.request_arrived(1, "tiny", now))
        await proxy.told.wait()
        assert [type(answer) for answer in proxy.answers] == [Refuse]

    with_a_proxy(engine, tmp_path, body, script={"exit_at_load": 3})


def test_a_server_that_was_told_to_leave_gives_its_claim_back_when_it_is_gone(
    engine: Engine, tmp_path: Path
) -> None:
    async def body(proxy: Proxy) -> None:
        proxy.decide(lambda now: proxy.scheduler.request_arrived(1, "tiny", now))
        await proxy.told.wait()
        assert proxy.answers == [Admit(1, "tiny", "tiny")]
        proxy.decide(lambda now: proxy.scheduler.request_ended(1, now))
        proxy.decide(lambda now: proxy.scheduler.unload("tiny", now))
        assert list(proxy.scheduler.residents) == ["tiny"], "it counts until it is gone"

    with_a_proxy(engine, tmp_path, body)


def test_a_server_that_is_killed_gives_its_claim_back(engine: Engine, tmp_path: Path) -> None:
    async def body(proxy: Proxy) -> None:
        proxy.decide(lambda now: proxy.scheduler.request_arrived(1, "tiny", now))
        await proxy.told.wait()
        os.kill(proxy.pids[0], signal.SIGKILL)

    with_a_proxy(engine, tmp_path, body)


def test_one_that_must_leave_before_it_was_started_is_never_started(engine: Engine, tmp_path: Path) -> None:
    async def body(proxy: Proxy) -> None:
        proxy.decide(lambda now: proxy.scheduler.request_arrived(1, "tiny", now))
        resident = proxy.scheduler.residents["tiny"]
        resident.assignment = Assignment("single", ("GPU-0",), (0,), {"GPU-0": 1})
        proxy.decide(lambda now: proxy.scheduler.request_ended(1, now))
        proxy.decide(lambda now: proxy.scheduler.gpu_lost(["GPU-0"], now, reason="it is lost"))

    with_a_proxy(engine, tmp_path, body)
