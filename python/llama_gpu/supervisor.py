"""Carries out what the scheduler decides: owns the servers, the tickets and the clock.

Everything runs on one event loop, so the scheduler needs no lock. One task starts a server
and one watches it; whoever wants a server holds a ticket and awaits ``acquire``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import structlog

from llama_gpu import Gpu, GpuSnapshot, has_host_pids
from llama_gpu.budget import HostMemory
from llama_gpu.catalog import Catalog, ModelEntry
from llama_gpu.config import Config
from llama_gpu.counts import Counts
from llama_gpu.engine import find_engine
from llama_gpu.errors import LlamaGpuError, ModelFileError, ServerError, UnknownModelError
from llama_gpu.events import StateChanges
from llama_gpu.host import host_memory
from llama_gpu.launch import Engine
from llama_gpu.measured import measured_by_gpu
from llama_gpu.memory.known import KnownMemory
from llama_gpu.monitor import REFRESH_TIMEOUT_SECONDS, GpuMonitor
from llama_gpu.owning import FRESH_SECONDS, Owning
from llama_gpu.placing import Placing, limits_of, rules_of
from llama_gpu.ports import Ports
from llama_gpu.remembering import Remembering
from llama_gpu.residents import Resident
from llama_gpu.rules import Rules
from llama_gpu.scheduler import Admit, Effect, Refuse, Scheduler, Start, Stop
from llama_gpu.server import Server
from llama_gpu.starting import new_server
from llama_gpu.together import plan_together

__all__ = ["ResidentServer", "Supervisor"]

CPU_POOL_SIZE = 4
"""Residents at most where no memory sets a bound and the configuration names none."""

HOST_AGE_SECONDS = 1.0
"""How old the host's memory may be where it is only shown."""

_log = structlog.get_logger("llama_gpu")


@dataclass(frozen=True)
class ResidentServer:
    """What ``/health`` and the metrics may know of one resident."""

    resident: Resident
    server: Server | None


class Supervisor:
    """``async with Supervisor(config, catalog)``; ``close`` stops every server."""

    def __init__(self, config: Config, catalog: Catalog, *, rescan: Callable[[], Catalog]) -> None:
        self.config = config
        self.catalog = catalog
        self._rescan = rescan
        self._memory = Remembering(
            config,
            self._spawn,
            place=lambda model: self._placing(model, (), ()),
            gpus=lambda: self.snapshot.gpus,
        )
        self._placing = Placing(
            config, self.entry, self._memory.known, self._memory.claims, host=self._read_host
        )
        self.counts = Counts()
        self.changes = StateChanges()
        self.monitor = GpuMonitor(
            interval_seconds=config.gpu.monitoring_interval,
            off_reason=config.gpu.off_reason,
            on_snapshot=self._snapshot_taken,
        )
        self.scheduler = Scheduler(
            self._placing,
            limits_of(config),
            rules=self._rules,
        )
        self._owning = Owning(
            self.scheduler,
            self.monitor,
            decide=self._decide,
            make=self._make_server,
            became_ready=self._became_ready,
            counts=self.counts,
            changes=self.changes,
        )
        self._tickets: dict[int, asyncio.Future[Server]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ports = Ports(config.server_pool.bind_host, config.server_pool.port_start)
        self._asked_for: dict[str, ModelEntry] = {}
        self._scan: asyncio.Future[Catalog] | None = None
        self._told_mode: tuple[bool, str | None] | None = None
        self._closing = False
        self._host: HostMemory | None = None
        self._host_read_at = float("-inf")
        self.started_at = int(time.time())
        self.session: aiohttp.ClientSession

    # -- life --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Open the upstream session, look at the GPUs, start the clock."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=10, sock_read=self.config.server_pool.request_timeout
            ),
            auto_decompress=False,
        )
        self._memory.recall(self.catalog.models)
        await self.monitor.start()
        self._snapshot_taken(self.monitor.snapshot)
        self._spawn(self._tick_for_ever(), "clock")
        self._preload_pinned()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Refuse who still waits, stop every server at once, forget the tasks."""
        self.refuse_waiting()
        self.monitor.close()
        servers = self._owning.servers.values()
        await asyncio.gather(*(server.stop() for server in servers), return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.session.close()

    def refuse_waiting(self) -> None:
        """From now on nobody gets a server: the proxy is about to end."""
        self._closing = self._owning.closing = True
        self.changes.close()
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(ServerError("the proxy is shutting down"))

    # -- what requests use -------------------------------------------------------------------

    def entry(self, model: str) -> ModelEntry:
        """The entry of this id, also of a resident whose file has gone; raises ``UnknownModelError``."""
        try:
            return self.catalog.find(model)
        except UnknownModelError:
            if model in self._asked_for:
                return self._asked_for[model]
            raise

    async def look_up(self, name: str) -> ModelEntry:
        """As ``entry``, but looks at the folders again before it says that there is none."""
        with contextlib.suppress(LookupError):
            return self.catalog.find(name)
        await self.rescan()
        return self.catalog.find(name)

    async def rescan(self) -> None:
        """Read the model folders again; running servers are left alone. Many at once scan once."""
        if self._scan is None or self._scan.done():
            self._scan = asyncio.ensure_future(asyncio.to_thread(self._rescan))
        try:
            self.catalog = await asyncio.shield(self._scan)
            self._memory.recall(self.catalog.models)
        except (LlamaGpuError, OSError) as error:
            _log.warning(f"the model folders cannot be read again: {error}")

    def _rules(self, model: str) -> Rules:
        entry = self.entry(model)
        return rules_of(entry, self._memory.load_seconds(entry))

    @contextlib.asynccontextmanager
    async def acquire(self, model: str, conversation: str | None = None) -> AsyncIterator[Server]:
        """Wait until a server of ``model`` takes the request, hold it busy while inside.

        Requests of one ``conversation`` go to the same server, unless that is clearly more loaded.

        Raises:
            LlamaGpuError: it does not fit, the queue is full, or its server would not start.
        """
        if self._closing:
            raise ServerError("the proxy is shutting down", model=model)
        entry = self._asked_for[model] = self.catalog.find(model)
        if entry.error is not None:
            raise ModelFileError(entry.error, path=str(entry.path))
        if not self.scheduler.servers_of(model):
            await self._freshen()
        ticket = next(self._numbers)
        future: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = future
        try:
            self._decide(
                lambda now: self.scheduler.request_arrived(ticket, model, now, conversation=conversation)
            )
            yield await future
        finally:
            del self._tickets[ticket]
            if future.done() and not future.cancelled():
                future.exception()  # a refusal that came as the client left is nobody's surprise
            self._decide(lambda now: self.scheduler.request_ended(ticket, now))

    def unload(self, model: str) -> None:
        """Stop a model's servers as soon as they are idle."""
        self._decide(lambda now: self.scheduler.unload(model, now))

    def residents(self) -> Mapping[str, ResidentServer]:
        """Every resident by the id of its server, with that server, if there is one yet."""
        return {
            server: ResidentServer(resident, self._owning.servers.get(server))
            for server, resident in self.scheduler.residents.items()
        }

    @property
    def snapshot(self) -> GpuSnapshot:
        """The last GPU snapshot."""
        return self.monitor.snapshot

    @property
    def known_memory(self) -> KnownMemory:
        """What loads took and llama.cpp projected."""
        return self._memory.known

    @property
    def on_cpu(self) -> bool:
        """True where there is no GPU to place anything on."""
        return self._placing.on_cpu

    @property
    def host(self) -> HostMemory | None:
        """The host's memory, at most a second old; None where it cannot be read."""
        if time.monotonic() - self._host_read_at > HOST_AGE_SECONDS:
            self._read_host()
        return self._host

    def _read_host(self) -> HostMemory | None:
        processes = {name: server.pid for name, server in self._owning.servers.items()}
        self._host = host_memory({name: pid for name, pid in processes.items() if pid is not None})
        self._host_read_at = time.monotonic()
        return self._host

    @property
    def why_no_gpu(self) -> str:
        """Why there is no GPU, in words; of use only where there is none."""
        return self.snapshot.error or "the driver lists no GPU"

    def monitoring_failures(self) -> list[str]:
        """Why the GPU figures cannot be trusted now, in words; empty while they can."""
        age, interval = self.monitor.age_seconds, self.monitor.interval_seconds
        # Where there is no driver the monitor looks for one ever more rarely: nothing has failed.
        if self.snapshot.gpus and age > 3 * interval + REFRESH_TIMEOUT_SECONDS:
            return [f"GPU monitoring has not answered for {age:.0f} s; the figures are that old"]
        return []

    # -- events in, effects out --------------------------------------------------------------

    def _decide(self, event: Callable[[float], list[Effect]]) -> None:
        began = time.perf_counter_ns()
        effects = event(time.monotonic())
        microseconds = (time.perf_counter_ns() - began) / 1000
        self.counts.decided(effects, microseconds / 1e6)
        for effect in effects:
            self._carry_out(effect, microseconds)
        self._memory.loading(self.scheduler.loads)
        self.changes.compare(self.snapshot.gpus, self.scheduler.residents, time.time())

    def _carry_out(self, effect: Effect, microseconds: float) -> None:
        match effect:
            case Start(_, assignment, server):
                _log.info(f"load {server}: {assignment.reason}", decided_us=round(microseconds))
                if assignment.degraded:
                    given_up = ", ".join(one.text for one in assignment.degraded)
                    _log.warning(f"{server} is degraded to get a place: {given_up}")
                self._spawn(self._owning.own(effect), f"server {server}")
            case Stop(_, reason, _, server):
                _log.info(f"unload {server}: {reason}", decided_us=round(microseconds))
                self._spawn(self._owning.stop(effect), f"stop {server}")
            case Admit(ticket, _, server):
                future = self._tickets.get(ticket)
                if future is not None and not future.done():
                    future.set_result(self._owning.servers[server])
            case Refuse(ticket, error):
                _log.info(f"refuse: {error}", decided_us=round(microseconds))
                future = self._tickets.get(ticket)
                if future is not None and not future.done():
                    future.set_exception(error)

    async def _make_server(self, start: Start) -> Server:
        return new_server(
            self.entry(start.model),
            start.assignment,
            await self.engine(),
            name=start.server,
            build=self._memory.known.build,
            pool=self.config.server_pool,
            http=self.session,
            ports=self._ports,
        )

    async def _became_ready(self, start: Start, server: Server) -> dict[str, int] | None:
        assigned, seconds = start.assignment, server.started_seconds or 0.0
        self.counts.loaded(start.model, seconds)
        # In a container the driver may know our servers by other process ids, or others by ours.
        pid = server.pid if has_host_pids() else None
        if pid is not None:
            self.scheduler.server_started(start.server, pid)
        buffers = await server.load_logged()
        if not buffers.complete:
            _log.debug(f"{start.server} does not log that it is loaded: what it took is not remembered")
        await self._freshen()
        gpus = self.snapshot.gpus
        entry = self.entry(start.model)
        self._memory.loaded(entry, assigned, gpus, buffers, pid=pid, seconds=seconds, build=server.build)
        return measured_by_gpu(gpus, pid, assigned.bytes_by_gpu, buffers)

    async def engine(self) -> Engine:
        """The engine, looked for anew each time, so that installing one helps at once.

        Raises:
            ConfigError: there is none, with the way to get one.
        """
        wanted = self.config.engine
        engine = await asyncio.to_thread(find_engine, wanted.path, kind=wanted.kind)
        self._memory.engine_found(engine)
        return engine

    def _preload_pinned(self) -> None:
        """Load what is pinned where all of it has room: one after the other might strand the last."""
        pinned = [entry for entry in self.catalog.models if entry.options.pinned]
        together = plan_together(self.config, pinned, self.snapshot.gpus, self.known_memory)
        if together.problem:
            _log.warning(together.problem)
        self._placing.planned = together.places
        for entry in pinned:
            self._spawn(self._preload(entry.id), f"preload {entry.id}")

    async def _preload(self, model: str) -> None:
        try:
            async with self.acquire(model):
                pass
        except LlamaGpuError as error:
            _log.error(f"{model} is pinned but cannot be loaded: {error}")

    # -- GPUs and time -----------------------------------------------------------------------

    def _snapshot_taken(self, snapshot: GpuSnapshot) -> None:
        self._placing.snapshot = snapshot
        pool = self.config.server_pool.size
        bound_by_memory = not self.on_cpu or self.host is not None
        size = CPU_POOL_SIZE if pool is None and not bound_by_memory else pool
        self.scheduler.set_pool_size(size)
        self._tell_mode(snapshot)
        # Where the driver's library fails as a whole the GPUs may well go on working: new models
        # are kept off them, but whoever runs there runs on until it ends by itself.
        for gpu in [gpu for gpu in snapshot.gpus if gpu.health == "lost" and snapshot.error is None]:
            self._gpu_lost(gpu)
        self.changes.compare(snapshot.gpus, self.scheduler.residents, time.time())

    def _gpu_lost(self, gpu: Gpu) -> None:
        reason = f"GPU {gpu.index} is lost: {gpu.health_reason or 'it no longer answers'}"
        self._decide(lambda now: self.scheduler.gpu_lost([gpu.uuid], now, reason=reason))

    def _tell_mode(self, snapshot: GpuSnapshot) -> None:
        """One warning when the machine turns out to have no GPU, one line when it has."""
        told = (self.on_cpu, snapshot.error)
        if told == self._told_mode:
            return
        self._told_mode = told
        if self.on_cpu:
            _log.warning(f"serving on the CPU: {self.why_no_gpu}")
        else:
            names = ", ".join(f"GPU {gpu.index} {gpu.name or gpu.uuid}" for gpu in snapshot.gpus)
            _log.info(f"serving on {names}")

    async def _freshen(self) -> None:
        """Decide on the memory of this moment, or, where the driver dawdles, on the last known."""
        if not self.on_cpu:
            await self.monitor.refresh(timeout_seconds=FRESH_SECONDS)

    async def _tick_for_ever(self) -> None:
        """Deadlines, idle unloading, and memory that comes back late."""
        while True:
            waiting = self.scheduler.waiting_count() > 0
            await asyncio.sleep(FRESH_SECONDS if waiting else 1.0)
            if waiting:
                await self._freshen()
            self._decide(self.scheduler.memory_changed)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error(f"{task.get_name()} failed: {error!r}", exc_info=error)
