"""A machine in memory: GPUs, other programs, servers that load and end, and the real scheduler and placing.

Every operation takes a number and picks by it, so that Hypothesis, or a plain random generator, can drive
it in any order. After each effect and each operation the promises are checked that the scheduler makes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf

import llama_gpu as lg
from llama_gpu.budget import HostMemory, HostUse
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config, ModelOptions
from llama_gpu.effects import Admit, Effect, Refuse, Start, Stop
from llama_gpu.errors import ServerExitedError
from llama_gpu.placing import Placing, rules_of
from llama_gpu.residents import Assignment, LeavesFor, Resident, ResidentState
from llama_gpu.rules import Limits
from llama_gpu.scheduler import Scheduler
from support.gguf_builder import write_sparse

MIB = 1 << 20
LAYERS = {"ant": 1, "bee": 2, "cat": 4, "dog": 6, "elk": 10, "fox": 60}
GPU_SIZES = (700 * MIB, 1300 * MIB, 2600 * MIB, 2600 * MIB)
HOST_SIZES = (None, 2000 * MIB, 5000 * MIB, 20000 * MIB)
HOST_HEADROOM = 100 * MIB
CONFIG: dict[str, Any] = {"gpu": {"headroom_bytes": 0}, "memory": {"host_headroom_bytes": HOST_HEADROOM}}
DEGRADE: tuple[list[Any], ...] = (
    [],
    [{"context_length": 512}],
    [{"parallel": 1}, "partial", {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}],
    [{"micro_batch": 64}, "cpu"],
)
STARVATION_SECONDS = 20.0
PRIORITIES = (0, 0, 1, -1)
SERVING = (ResidentState.LOADING, ResidentState.READY)


def headers(folder: Path) -> dict[str, lg.Header]:
    """Models from one that fits everywhere to one that fits nowhere, none on the disk."""
    found = {}
    for name, layers in LAYERS.items():
        path = write_sparse(
            folder / f"{name}.gguf",
            layers=layers,
            embedding=2048,
            feed_forward=8192,
            heads=16,
            heads_kv=4,
            vocabulary=512,
            context=2048,
            quantization=gguf.GGMLQuantizationType.F16,
        )
        found[name] = lg.read_header(path)
    return found


@dataclass
class FakeServer:
    """A server as the machine knows it: ``held`` bytes by GPU grow while it loads."""

    resident: Resident
    pid: int
    started: float
    held: dict[str, int] = field(default_factory=dict)
    host_private: int = 0
    ready_at: float | None = None
    stopping: bool = False
    shortest_load: float = math.inf
    """Of its model, since it was ready: its residency goes by the last one when it is asked to leave."""


class World:
    """``shape`` decides the machine and the options of every model."""

    def __init__(self, models: Mapping[str, lg.Header], shape: int) -> None:
        self.now = 1000.0
        self.operations = 0
        self.happened: Counter[str] = Counter()
        self.tickets = 0
        self._pids = itertools.count(100)
        self.open: dict[int, tuple[str, float]] = {}
        self.active: dict[int, str] = {}
        self.servers: dict[str, FakeServer] = {}
        self.promises: list[Resident] = []
        self._shape = shape
        self.entries = {name: self._entry(name, header) for name, header in models.items()}
        sizes = [GPU_SIZES[self._pick(len(GPU_SIZES))] for _ in range(self._pick(4))]
        self.total = {f"GPU-{index}": size for index, size in enumerate(sizes)}
        self.others = dict.fromkeys(self.total, 0)
        self.host_total = HOST_SIZES[self._pick(len(HOST_SIZES))]
        self.host_others = 0
        self.lost: set[str] = set()
        self.tells_processes = bool(self._pick(2))
        bound = bool(self.total) or self.host_total is not None
        pool_size = (None, None, 2, 3)[self._pick(4)] if bound else 2 + self._pick(2)
        limits = Limits(pool_size=pool_size, queue_size=4, starvation_seconds=STARVATION_SECONDS)
        # On some machines a twin is told the same, and must answer the same.
        self.rules = {name: rules_of(entry) for name, entry in self.entries.items()}
        self.placings = [
            Placing(Config.model_validate(CONFIG), self.entries.__getitem__, host=self._host)
            for _ in range(2 if self._pick(4) == 0 else 1)
        ]
        self.scheduler, *self._twins = (
            Scheduler(placing, limits, rules=self.rules.__getitem__) for placing in self.placings
        )

    def _pick(self, count: int) -> int:
        self._shape, picked = divmod(self._shape, count)
        return picked

    def _entry(self, name: str, header: lg.Header) -> ModelEntry:
        replicas = 1 + (self._pick(4) == 0)
        options = ModelOptions(
            context_length=2048,
            parallel=1 + self._pick(2),
            pinned=self._pick(8) == 0,
            priority=PRIORITIES[self._pick(4)],
            replicas=replicas,
            max_replicas=replicas + self._pick(2),
            min_resident_seconds=(None, 0.0, 5.0, 30.0)[self._pick(4)],
            ttl_seconds=(None, None, None, 40.0)[self._pick(4)],
            degrade=DEGRADE[self._pick(len(DEGRADE))],
            degrade_at_once=bool(self._pick(2)),
            cache_ram_bytes=64 * MIB,
        )
        path = Path(header.shards[0].path)
        return ModelEntry(id=name, path=path, file_bytes=header.file_bytes, options=options, header=header)

    # -- what may happen ---------------------------------------------------------------------

    def request(self, pick: int) -> None:
        """Somebody asks for a model."""
        # Seldom the one that fits nowhere: it is refused at once.
        model, conversation = (
            _one([*list(self.entries)[:-1] * 3, list(self.entries)[-1]], pick),
            str(pick % 5),
        )
        self.tickets += 1
        ticket = self.tickets
        self.open[ticket] = (model, self.now)
        self._happen(lambda s: s.request_arrived(ticket, model, self.now, conversation=conversation))

    def request_ends(self, pick: int) -> None:
        """A request is answered, or its client leaves."""
        if tickets := sorted(self.open.keys() | self.active.keys()):
            ticket = _one(tickets, pick)
            self.open.pop(ticket, None)
            self.active.pop(ticket, None)
            self._happen(partial(Scheduler.request_ended, ticket=ticket, now=self.now))

    def load_goes_on(self, pick: int) -> None:
        """A server takes a part of its memory, becomes ready, or fails."""
        loading = [s for s in self.servers.values() if s.ready_at is None and not s.stopping]
        if not loading:
            return
        server = _one(loading, pick)
        name, claim = server.resident.server, server.resident.assignment.bytes_by_gpu
        part = pick % 3 == 0
        takes = {uuid: size // 2 if part else size - size // (2 + pick % 50) for uuid, size in claim.items()}
        fits = all(
            size <= self._free_bytes(uuid) + server.held.get(uuid, 0) and uuid not in self.lost
            for uuid, size in takes.items()
        )
        # A third of it is mapped: that is never anybody's alone.
        private = server.resident.assignment.host_bytes * 2 // (9 if part else 3)
        fits = fits and (self.host_total is None or private <= self._host_left() + server.host_private)
        if pick % 11 == 1 or not fits:
            del self.servers[name]
            error = ServerExitedError("it did not start", model=server.resident.model)
            self._happen(lambda s: s.server_failed(name, error, self.now))
            return
        server.held, server.host_private = takes, private
        if not part:
            server.ready_at = self.now
            took = max(self.now - server.started, 0.001)
            for other in self.servers.values():
                if other.resident.model == server.resident.model and other.ready_at is not None:
                    other.shortest_load = min(other.shortest_load, took)
            self._happen(lambda s: self._ready(s, name, server, takes))

    def _ready(
        self, scheduler: Scheduler, name: str, server: FakeServer, measured: dict[str, int]
    ) -> list[Effect]:
        scheduler.server_started(name, server.pid)
        return scheduler.server_ready(name, self.now, measured_by_gpu=measured or None)

    def stop_ends(self, pick: int) -> None:
        """A server that was told to end, or has crashed, is gone, and its memory is back."""
        if stopping := [name for name, server in self.servers.items() if server.stopping]:
            name = _one(stopping, pick)
            for ticket in [ticket for ticket, served_by in self.active.items() if served_by == name]:
                del self.active[ticket]  # its answer has broken off
                self._happen(partial(Scheduler.request_ended, ticket=ticket, now=self.now))
            del self.servers[name]
            self._happen(lambda s: s.server_stopped(name, self.now))

    def crash(self, pick: int) -> None:
        """A ready server ends by itself; its memory comes back later."""
        if ready := [name for name, s in self.servers.items() if s.ready_at is not None and not s.stopping]:
            name = _one(ready, pick)
            self._happen(lambda s: s.server_exited(name, self.now))
            self.servers[name].stopping = True

    def time_passes(self, seconds: float) -> None:
        """The clock ticks."""
        self.now += seconds
        self._happen(lambda s: s.memory_changed(self.now))

    def others_change(self, pick: int) -> None:
        """Another program takes memory that is free now, or gives some back."""
        if self.host_total is not None and pick % 3 == 0:
            self.host_others = 0
            self.host_others = max(0, self._host_left()) * (pick % 4) // 4
        if self.total:
            uuid = _one(sorted(self.total), pick)
            self.others[uuid] = 0
            self.others[uuid] = self._free_bytes(uuid) * max(0, pick % 8 - 4) // 4

    def gpu_fails(self, pick: int) -> None:
        """A GPU is lost, or the one that was lost comes back."""
        if not self.total:
            return
        if self.lost:
            self.lost.clear()
            return
        uuid = _one(sorted(self.total), pick)
        self.lost.add(uuid)
        self._happen(lambda s: s.gpu_lost([uuid], self.now, reason="it is lost"))

    def unload(self, pick: int) -> None:
        """Somebody asks for a model to be unloaded."""
        model = _one(sorted(self.entries), pick)
        self._happen(lambda s: s.unload(model, self.now))

    # -- carrying out and checking -------------------------------------------------------------

    def _happen(self, event: Callable[[Scheduler], list[Effect]]) -> None:
        self.operations += 1
        self._refresh()
        spare = {r.server for r in self.scheduler.residents.values() if r.leaving or self._is_extra(r)}
        effects = event(self.scheduler)
        for twin in self._twins:
            assert told(event(twin)) == told(effects), "the same input gave another answer"
        for promise in self.promises_now():
            if not any(promise is known for known in self.promises):
                self._check_promise(promise, spare)
        self.promises = self.promises_now()
        for effect in effects:
            self._carry_out(effect)
        self._check()

    def _free_bytes(self, uuid: str) -> int:
        held = sum(server.held.get(uuid, 0) for server in self.servers.values())
        return self.total[uuid] - self.others[uuid] - held

    def _host_left(self) -> int:
        private = sum(server.host_private for server in self.servers.values())
        return (self.host_total or 0) - self.host_others - private

    def _host(self) -> HostMemory | None:
        """The host's memory as the system tells it now."""
        if self.host_total is None:
            return None
        used = {name: HostUse(2 * s.host_private, s.host_private) for name, s in self.servers.items()}
        return HostMemory(self.host_total, max(0, self._host_left()), used)

    def _refresh(self) -> None:
        """The snapshot as a driver gives it now."""
        gpus = []
        for index, (uuid, total) in enumerate(self.total.items()):
            held = {server.pid: server.held.get(uuid, 0) for server in self.servers.values()}
            processes = [lg.GpuProcess(pid, size) for pid, size in held.items() if size]
            lost = uuid in self.lost
            gpus.append(
                lg.Gpu(
                    index=index,
                    uuid=uuid,
                    total_bytes=None if lost else total,
                    free_bytes=None if lost else self._free_bytes(uuid),
                    processes=processes if self.tells_processes and not lost else None,
                    health="lost" if lost else "ok",
                )
            )
        for placing in self.placings:
            placing.snapshot = lg.GpuSnapshot(gpus)

    def _carry_out(self, effect: Effect) -> None:
        cause = f" ({effect.cause})" if isinstance(effect, Stop) else ""
        self.happened[f"{type(effect).__name__}{cause}"] += 1
        match effect:
            case Start(model, assignment, server):
                resident = self.scheduler.residents[server]
                assert server not in self.servers
                assert resident.state is ResidentState.LOADING
                self._check_room(server, model, assignment.bytes_by_gpu)
                self._check_given_up(model, assignment)
                self.servers[server] = FakeServer(resident, next(self._pids), self.now)
            case Stop(_, _, cause, server):
                self._check_leaving(self.servers[server], cause)
                self.servers[server].stopping = True
            case Admit(ticket, model, server):
                assert self.open.pop(ticket)[0] == model
                served_by = self.servers[server]
                assert served_by.resident.model == model
                assert served_by.ready_at is not None
                assert not served_by.stopping
                self.active[ticket] = server
            case Refuse(ticket, _):
                del self.open[ticket]

    def _check_room(self, server: str, model: str, claim: Mapping[str, int]) -> None:
        """What is promised on a GPU to all servers together is there."""
        assert not self.lost.intersection(claim), "a lost GPU was given"
        holding = [r for r in self.scheduler.residents.values() if r.state is not ResidentState.MAKING_ROOM]
        for uuid in claim:
            promised = sum(resident.bytes_by_gpu.get(uuid, 0) for resident in holding)
            assert promised + self.others[uuid] <= self.total[uuid], f"{uuid} is promised twice"
        self._check_host([*holding])
        for other in holding:
            if other.model == model and other.server != server:
                assert claim, "a second server on the CPU"
                assert not claim.keys() & other.bytes_by_gpu.keys(), "two servers of a model on one GPU"

    def _check_host(self, residents: Sequence[Resident]) -> None:
        """What these are promised of the host's memory together is there, and the headroom beside it."""
        if self.host_total is not None:
            promised = sum(resident.assignment.host_bytes for resident in residents)
            assert promised + self.host_others + HOST_HEADROOM <= self.host_total, "host memory twice"

    def _check_given_up(self, model: str, assignment: Assignment) -> None:
        """A model gives up only what its configuration names."""
        allowed: set[str] = set()
        for step in self.entries[model].options.degrade:
            allowed |= {step, "partial"} if isinstance(step, str) else step.changes.keys()
        given_up = {one.kind for one in assignment.degraded}
        assert given_up <= allowed, "it gave up what it was not allowed to"
        self.happened["degraded"] += bool(given_up)
        if self.total and not assignment.gpu_uuids:
            assert "cpu" in given_up, "it went to the CPU in silence"

    def _check_leaving(self, server: FakeServer, cause: LeavesFor) -> None:
        name, model = server.resident.server, server.resident.model
        assert not server.stopping, "a server was stopped twice"
        if cause in (LeavesFor.GPU_LOST, LeavesFor.ENDED):
            return
        assert name not in self.active.values(), "a busy server was stopped"
        assert server.ready_at is not None
        if cause is LeavesFor.ROOM:
            least = self.rules[model].residency(server.shortest_load)
            assert self.now - server.ready_at >= least, "it left before its minimum residency"
            assert any(name in promise.waits_for for promise in self.promises_now()), "it left for nobody"

    def _check_promise(self, promise: Resident, spare: set[str]) -> None:
        """A new promise: who leaves for it may, and their leaving is enough.

        ``spare`` were leaving already, or were more than was asked for.
        """
        residents = self.scheduler.residents
        starved = self._starved(promise.model)
        for name in promise.waits_for:
            victim = residents[name]
            rules = self.rules[victim.model]
            if name in spare or (victim.leaving and victim.leaves_for is not LeavesFor.ROOM):
                continue
            assert not rules.pinned, "a pinned model is to leave"
            lower = rules.priority <= self.rules[promise.model].priority
            assert lower or starved, "a higher priority is to leave"
            assert not victim.active or starved, "a busy server is to leave"
        awaited = {name for resident in residents.values() for name in resident.waits_for}
        staying = [resident for name, resident in residents.items() if name not in awaited]
        for uuid in promise.bytes_by_gpu:
            sizes = (resident.bytes_by_gpu.get(uuid, 0) for resident in staying)
            assert sum(sizes) + self.others[uuid] <= self.total[uuid], "their leaving is not enough"
        if promise.assignment.mode != "pool":
            self._check_host(staying)

    def _is_extra(self, resident: Resident) -> bool:
        """Whether there are more servers of its model than are asked for."""
        there = [r for r in self.scheduler.servers_of(resident.model) if r.state in SERVING and not r.leaving]
        return len(there) > self.rules[resident.model].replicas

    def _starved(self, model: str) -> bool:
        since = [since for wanted, since in self.open.values() if wanted == model]
        return bool(since) and self.now - min(since) > STARVATION_SECONDS

    def promises_now(self) -> list[Resident]:
        """Residents that wait for others to leave."""
        return [r for r in self.scheduler.residents.values() if r.state is ResidentState.MAKING_ROOM]

    def _check(self) -> None:
        """What holds after every operation."""
        residents = self.scheduler.residents
        waiting = Counter(model for model, _ in self.open.values())
        assert {model: self.scheduler.waiting_count(model) for model in self.entries} == {
            model: waiting[model] for model in self.entries
        }
        served = {ticket: r.server for r in residents.values() for ticket in r.active}
        assert served == self.active
        promises = self.promises_now()
        for promise in promises:
            assert waiting[promise.model], "room is promised to nobody"
            assert promise.waits_for <= residents.keys()
        holding = {name for name, r in residents.items() if r.state is not ResidentState.MAKING_ROOM}
        assert holding == self.servers.keys(), "a claim without a server, or a server without a claim"
        pool_size = self.scheduler.limits.pool_size
        assert pool_size is None or len(holding) <= pool_size
        for model in self.entries:
            assert len(self._of(model)) <= max(1, self.rules[model].max_replicas)

    def _of(self, model: str) -> list[FakeServer]:
        return [server for server in self.servers.values() if server.resident.model == model]

    def finish(self) -> None:
        """Everything ends: every request gets its answer, and every claim is given back."""
        for _ in range(200):
            if not (self.open or self.active or self.servers):
                break
            for _ in range(len(self.servers)):
                self.load_goes_on(2)
                self.stop_ends(0)
            for _ in range(len(self.active)):
                ticket = min(self.active)
                del self.active[ticket]
                self._happen(partial(Scheduler.request_ended, ticket=ticket, now=self.now))
            if not self.open:
                for pick in range(len(self.entries)):
                    self.unload(pick)
            self.time_passes(10.0)
        assert not self.open, "requests were left waiting for ever"
        assert not self.scheduler.residents, "claims were left behind"


def _one(things: Sequence[Any], pick: int) -> Any:
    return things[pick % len(things)]


def told(effects: Sequence[Effect]) -> list[object]:
    """Effects as values that can be compared; errors are equal where they say the same."""
    return [
        (effect.ticket, type(effect.error), str(effect.error)) if isinstance(effect, Refuse) else effect
        for effect in effects
    ]
