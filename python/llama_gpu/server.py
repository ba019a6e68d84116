"""One llama.cpp server: a child process and the one task that owns it.

:class:`Server` starts the child, waits until it answers, notices when it ends, and ends it. Everyone
else asks (:meth:`Server.ensure_ready`, :meth:`Server.stop`, :meth:`Server.wait_exited`); only the owner
task changes anything, so its state can be wrong in one place only. A server lives once: to run the
model again, make another.

Which models run where, and who leaves, is decided elsewhere; nothing here looks at GPUs or requests.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import aiohttp

from llama_gpu.buffer_lines import BufferLines, LoadedBuffers, split_prefix
from llama_gpu.errors import ServerError, ServerExitedError, StartTimeoutError
from llama_gpu.launch import UNASSIGNED_PORT, LaunchPlan
from llama_gpu.log_lines import LogLines
from llama_gpu.ports import Ports

__all__ = ["Server", "ServerState"]

ServerState = Literal["stopped", "starting", "ready", "stopping", "error"]

LOG_TAIL_LINES = 200
PORT_ATTEMPTS = 4
POLL_SECONDS = (0.02, 0.25)  # first and longest pause between two questions to a loading server
LOG_SECONDS = 0.5  # the log of a server that answers is there at once, or nobody writes it
ANSWER_SECONDS = 5.0  # a loading server answers /health at once or not at all
REAP_SECONDS = 5.0  # a killed process that is not gone by then hangs in the kernel: waiting longer is no use

SPAWN = Path(__file__).with_name("engine") / "spawn.py"
PORT_TAKEN = "couldn't bind HTTP server socket"  # tools/server/server-http.cpp server_http_context::start
TELLING = re.compile(r"\b(error|failed|cannot|couldn't|invalid|unrecognized|out of memory)\b", re.IGNORECASE)

_groups: set[int] = set()


@atexit.register
def _kill_what_is_left() -> None:
    """The last resort where the kernel does not end our children for us (see ``engine/spawn.py``)."""
    for group in tuple(_groups):
        _signal_group(group, signal.SIGKILL)


async def _first(tasks: set[asyncio.Task[Any]], timeout_seconds: float | None = None) -> None:
    """Wait for one of the tasks, or for the time to pass, without touching any of them."""
    await asyncio.wait(tasks, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class Server:
    """A llama.cpp server for one model.

    Args:
        plan: What to start. With port 0 a free port is taken when the child is started, and another
            one tried when somebody else was quicker.
        model: The model's id, for messages.
        build: Which llama.cpp it runs, where that is known; kept for those who remember what loads took.
        http: Asks the child whether it is ready; not closed here.
        ports: Where the port comes from; default any free one.
        start_timeout_seconds: How long loading may take.
        stop_grace_seconds: How long the child may take to end after TERM before it is killed.
        degraded: What it was started without of what is configured, in words, for its clients.
        on_log: Called in the event loop with every line the child writes.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        *,
        model: str,
        build: str | None = None,
        http: aiohttp.ClientSession,
        ports: Ports | None = None,
        start_timeout_seconds: float = 600.0,
        stop_grace_seconds: float = 10.0,
        degraded: Sequence[str] = (),
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.build = build
        self.plan = plan
        self.degraded = tuple(degraded)
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.started_seconds: float | None = None
        self.stop_reason: str | None = None
        self.properties: Mapping[str, Any] = {}
        self.log_tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._http = http
        self._ports = ports or Ports()
        self._start_timeout_seconds = start_timeout_seconds
        self._grace_seconds = stop_grace_seconds
        self._on_log = on_log
        self._buffers = BufferLines()
        self._first_error: str | None = None
        self._state: ServerState = "stopped"
        self._owner: asyncio.Task[None] | None = None
        self._failure: Callable[[], ServerError] | None = None
        self._load_logged = asyncio.Event()
        self._settled = asyncio.Event()  # ready, or never will be
        self._stop_wanted = asyncio.Event()
        self._gone = asyncio.Event()

    def __repr__(self) -> str:  # noqa: D105
        return f"<Server {self.model} {self._state} pid={self.pid} {self.base_url}>"

    @property
    def state(self) -> ServerState:
        """A glance for display; deciding by it would race with the owner task."""
        return self._state

    @property
    def host(self) -> str:
        """Address the server listens on."""
        return self.plan.host

    @property
    def port(self) -> int:
        """Port the server listens on; 0 before it was started."""
        return self.plan.port

    @property
    def api_key(self) -> str:
        """The key its requests must carry as ``Authorization: Bearer …``."""
        return self.plan.api_key

    @property
    def base_url(self) -> str:
        """``http://host:port``."""
        return self.plan.base_url

    @property
    def buffers(self) -> LoadedBuffers:
        """What the load took, as far as llama.cpp has logged it."""
        return self._buffers.read()

    async def start(self) -> None:
        """Start the child, unless that was asked before, and wait until it answers requests.

        Cancelling one caller does not stop the server: others may be waiting for it.

        Raises:
            StartTimeoutError: It was not ready in time, and has been stopped.
            ServerExitedError: It ended first, or ended since, or was stopped.
            ServerError: It could not be started at all.
        """
        if self._owner is None and self._failure is None:
            self._owner = asyncio.create_task(self._own(), name=f"server {self.model}")
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure()

    async def load_logged(self) -> LoadedBuffers:
        """What loading took, once the log says that it is over, or is late: then it is not ``complete``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOG_SECONDS):
                await self._load_logged.wait()
        return self.buffers

    async def ensure_ready(self) -> None:
        """The same as :meth:`start`: returns at once when the server is ready."""
        await self.start()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """End the child and return when it is gone. May be called at any time, and more than once.

        TERM to its process group, then KILL after the grace; never waits longer than the grace and
        five seconds. The grace of the first call holds.
        """
        if grace_seconds is not None and not self._stop_wanted.is_set():
            self._grace_seconds = grace_seconds
        self._stop_wanted.set()
        if self._owner is None:
            self._failure = self._stopped_error
            self._settled.set()
            self._gone.set()
        await self._gone.wait()

    async def wait_exited(self) -> int | None:
        """Wait until the child is gone, for whatever reason; its exit code, negative for a signal.

        ``None`` when it was never started.
        """
        await self._gone.wait()
        return self.exit_code

    # The owner task: nothing below is called from anywhere else.

    async def _own(self) -> None:
        try:
            await self._live()
        except (OSError, RuntimeError) as error:
            cause = str(error)
            self._failure = lambda: ServerError(
                f"the server of {self.model} cannot be started: {cause}", model=self.model
            )
            self._state = "error"
        finally:
            self._failure = self._failure or self._stopped_error
            self._settled.set()
            self._gone.set()

    async def _live(self) -> None:
        picks_port = self.plan.port == UNASSIGNED_PORT
        for attempt in range(1, PORT_ATTEMPTS + 1):
            if self._stop_wanted.is_set():
                return
            port = self._ports.take() if picks_port else self.plan.port
            self.plan = self.plan.on_port(port)
            try:
                await self._one_child()
            finally:
                if picks_port:
                    self._ports.give_back(port)
            port_was_taken = any(PORT_TAKEN in line for line in self.log_tail)
            if self._failure is not None or not (picks_port and port_was_taken) or attempt == PORT_ATTEMPTS:
                break
        self._failure = self._failure or self._exited_error

    async def _one_child(self) -> None:
        """One process from spawn to reaped; leaves ``_failure`` unset when it ended while starting."""
        self._state = "starting"
        self.log_tail.clear()
        self._first_error = None
        self._buffers = BufferLines()
        self._load_logged.clear()
        began = time.monotonic()
        process, log = await self._spawn()
        ended = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop_wanted.wait())
        ready = asyncio.create_task(self._answers())
        try:
            await _first({ended, stop, ready}, self._start_timeout_seconds)
            if ready.done() and not ended.done():
                ready.result()
                self.started_seconds = time.monotonic() - began
                self._state = "ready"
                self._settled.set()
                await _first({ended, stop})
            self.exit_code = process.returncode
            if stop.done():
                self._failure = self._stopped_error
            elif not ended.done():
                self._failure = self._timeout_error
            elif self._settled.is_set():
                self._failure = self._exited_error
            if not ended.done():
                self._state = "stopping"
                _signal_group(process.pid, signal.SIGTERM)
                await _first({ended}, self._grace_seconds)
        finally:
            # Also after a clean end: what the child itself started must not survive it.
            _signal_group(process.pid, signal.SIGKILL)
            # Asked anew: a loop that is being closed has cancelled the first question.
            reaped = asyncio.create_task(process.wait())
            await _first({reaped}, REAP_SECONDS)
            await log.closed(REAP_SECONDS)
            tasks = {ready, stop, ended, reaped}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self.exit_code = process.returncode
            self._state = "stopped" if self._stop_wanted.is_set() else "error"
            _groups.discard(process.pid)

    async def _spawn(self) -> tuple[asyncio.subprocess.Process, LogLines]:
        # A pipe of our own: asyncio's would keep wait() from returning while a grandchild holds it open.
        log, write_end = await LogLines.open(self._take_line)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(SPAWN), str(os.getpid())),
                *self.plan.argv,
                env=self.plan.full_environment(os.environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        self.pid = process.pid
        _groups.add(process.pid)
        return process, log

    async def _answers(self) -> None:
        """Return once the child, and not a stranger on its port, answers requests."""
        pause, longest = POLL_SECONDS
        while not (await self._ask("/health") is not None and await self._is_ours()):
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, longest)

    async def _is_ours(self) -> bool:
        properties = await self._ask("/props")
        if isinstance(properties, dict):
            self.properties = properties
        return properties is not None

    async def _ask(self, path: str) -> Any | None:
        """The JSON of a 200 answer; ``None`` for any other answer, or none."""
        # The session is the relay's, which leaves compressed bodies as they are.
        headers = {"Authorization": f"Bearer {self.api_key}", "Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        try:
            async with self._http.get(self.base_url + path, headers=headers, timeout=timeout) as response:
                return await response.json() if response.status == HTTPStatus.OK else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    def _take_line(self, raw: str) -> None:
        level, line = split_prefix(raw)
        if level == "E" and self._first_error is None:
            self._first_error = line
        self.log_tail.append(line)
        self._buffers.feed(line)
        if self._buffers.complete:
            self._load_logged.set()
        if self._on_log is not None:
            self._on_log(line)

    def _timeout_error(self) -> ServerError:
        return StartTimeoutError(
            f"{self.model} was not ready after {self._start_timeout_seconds:g} s and has been stopped",
            model=self.model,
        )

    def _stopped_error(self) -> ServerError:
        return ServerExitedError(
            f"the server of {self.model} was stopped", model=self.model, exit_code=self.exit_code
        )

    def _exited_error(self) -> ServerError:
        telling = [line for line in self.log_tail if TELLING.search(line)]
        if self.started_seconds is None:
            # What fails first drags the rest along: later errors only repeat that loading failed.
            when, cause = "while loading", self._first_error or next(iter(telling), None)
        else:
            when, cause = "by itself", next(reversed(telling), None)
        detail = f": {cause.strip()}" if cause else ""
        return ServerExitedError(
            f"the server of {self.model} ended {when} (exit code {self.exit_code}){detail}",
            model=self.model,
            exit_code=self.exit_code,
            last_log_lines=tuple(self.log_tail),
        )
