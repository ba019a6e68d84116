"""Which model is resident, who waits and who leaves: a pure state machine.

Events go in as method calls that carry the time, effects come out as values; the supervisor does
what they say and reports back. There is no clock, no log and no I/O here. A server's life is
``LOADING -> READY -> STOPPING``, or ``MAKING_ROOM`` first while those that it replaces leave.

Invariants that the tests hold it to:

* no GPU is promised beyond what it has: a claim is counted from the decision until the memory is back;
* a server that answers a request is never stopped to make room, nor one before its minimum residency;
* nobody is asked to leave when that would not help;
* every ticket ends in exactly one ``Admit`` or ``Refuse``, unless its request ends first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from llama_gpu.affinity import Affinity
from llama_gpu.budget import Claim
from llama_gpu.effects import Admit, Effect, Refuse, Start, Stop
from llama_gpu.errors import DoesNotFitError, LlamaGpuError
from llama_gpu.leaving import Leavers, choose_victims
from llama_gpu.load_times import LoadTimes
from llama_gpu.popularity import Popularity
from llama_gpu.replicas import free_id, in_service, wants_another
from llama_gpu.residents import Assignment, LeavesFor, Placer, Resident, ResidentState, ResidentView
from llama_gpu.rules import Limits, Rules
from llama_gpu.waiting import Request, Waiting, queue_full, waited_too_long

__all__ = ["Admit", "Effect", "Limits", "Refuse", "Rules", "Scheduler", "Start", "Stop"]

REPLICA_RETRY_SECONDS = 60.0
"""How long no further server of a model is tried after one did not start."""


class Scheduler:
    """The state machine. Every public method returns the effects to carry out, in order.

    ``rules`` says what holds for a model. A server's id is its model's, or ``model#2`` and so on.
    """

    def __init__(
        self,
        placer: Placer,
        limits: Limits | None = None,
        *,
        rules: Callable[[str], Rules] = lambda _model: Rules(),
    ) -> None:
        self._placer = placer
        self.limits = limits or Limits()
        self._rules = rules
        self._residents: dict[str, Resident] = {}
        self._waiting = Waiting()
        self._affinity = Affinity()
        self._served_by: dict[int, str] = {}
        self._load_times = LoadTimes(rules)
        self._popularity = Popularity()
        self._no_replica_before: dict[str, float] = {}
        # Asking anew is of use only when something has changed since the last time.
        self._changes = 0
        self._asked_at: dict[str, int] = {}

    # -- what others may look at -------------------------------------------------------------

    @property
    def residents(self) -> Mapping[str, Resident]:
        """Servers by their ids, for display and for the placer's claims."""
        return self._residents

    @property
    def loads(self) -> bool:
        """Whether a server loads, or is about to."""
        begun = ResidentState.MAKING_ROOM, ResidentState.LOADING
        return any(resident.state in begun for resident in self._residents.values())

    def servers_of(self, model: str) -> list[Resident]:
        """Every server of ``model``, whatever its state, the oldest first."""
        return [resident for resident in self._residents.values() if resident.model == model]

    def waiting_count(self, model: str | None = None) -> int:
        """How many requests wait, for one model or for all."""
        return self._waiting.count(model)

    def expected_load_seconds(self, model: str) -> float:
        """The last measured load of this model, here or in an earlier process, else a default."""
        return self._load_times.expected(model)

    def retry_after_seconds(self, model: str, now: float) -> float:
        """When a request for ``model`` that is turned away now had better come again."""
        return self._load_times.until_ready(model, self._residents.values(), self._order(now), now)

    def seen_by(self, model: str, now: float) -> tuple[list[ResidentView], list[Claim]]:
        """What the placer of ``model`` is told at this moment, as if none of its servers were there."""
        leavers = self._leavers(now)
        views = leavers.views(model, next(leavers.rounds(starved=False)))
        others = [resident.claim for resident in self._residents.values() if resident.model != model]
        return [view for view in views if view.model != model], others

    # -- events ------------------------------------------------------------------------------

    def request_arrived(
        self, ticket: int, model: str, now: float, *, conversation: str | None = None
    ) -> list[Effect]:
        """A request for a known model; ``ticket`` is any unused number.

        Requests of one ``conversation`` go to the same of several servers, where none is clearly less
        loaded.
        """
        self._popularity.asked_for(model, now)
        if self._waiting.count(model) >= self.limits.queue_size:
            seconds = self.retry_after_seconds(model, now)
            return [Refuse(ticket, queue_full(model, self.limits.queue_size, seconds))]
        self._waiting.add(Request(ticket, model, now, conversation))
        # Nobody else gains by a request that goes straight to a server: the others need not be thought of.
        return self._admit(model) or self._advance(now)

    def request_ended(self, ticket: int, now: float) -> list[Effect]:
        """The request was answered, failed, or its client went away, waiting or not."""
        if self._waiting.remove(ticket):
            return self._advance(now)
        resident = self._residents.get(self._served_by.pop(ticket, ""))
        if resident is None or ticket not in resident.active:
            return []
        resident.active.discard(ticket)
        resident.last_used = now
        self._changes += not resident.active
        idle_matters = not resident.active and (resident.draining or self._waiting.count())
        return self._advance(now) if idle_matters or self._waiting.count(resident.model) else []

    def server_started(self, server: str, pid: int) -> None:
        """The child process of ``server`` exists; its memory can be told from others'."""
        if resident := self._residents.get(server):
            resident.pid = pid

    def server_ready(
        self, server: str, now: float, *, measured_by_gpu: Mapping[str, int] | None = None
    ) -> list[Effect]:
        """The server answers; ``measured_by_gpu`` (bytes) replaces its estimate where known."""
        resident = self._residents.get(server)
        if resident is None or resident.state is not ResidentState.LOADING:
            return []
        self._become(resident, ResidentState.READY)
        resident.measured_by_gpu = measured_by_gpu
        resident.ready_at = resident.last_used = now
        self._load_times.took(resident.model, now - resident.since)
        return self._advance(now)

    def server_failed(self, server: str, error: LlamaGpuError, now: float) -> list[Effect]:
        """The server never became ready and is gone: who has no other one to wait for ends with ``error``."""
        failed = self._forget(server)
        if failed is None:
            return self._advance(now)
        if self._in_service(failed.model):
            self._no_replica_before[failed.model] = now + REPLICA_RETRY_SECONDS
            return self._advance(now)
        return [*self._refuse_all(failed.model, error), *self._advance(now)]

    def server_exited(self, server: str, now: float, *, reason: str = "it ended by itself") -> list[Effect]:
        """A ready server ended by itself: nobody is sent there any more.

        Report ``server_stopped`` once its memory is back; requests that come until then wait, and get
        a fresh server.
        """
        resident = self._residents.get(server)
        if resident is not None and resident.state is ResidentState.READY:
            self._stop(resident, reason, LeavesFor.ENDED)  # there is nothing left to stop
        return self._advance(now)

    def server_stopped(self, server: str, now: float) -> list[Effect]:
        """A server is gone, and its memory is back or will not come back: its claim ends."""
        self._forget(server)
        return self._advance(now)

    def unload(self, model: str, now: float, *, reason: str = "asked to") -> list[Effect]:
        """Stop the servers of ``model`` as soon as they serve nobody; requests that wait reload it after."""
        for resident in self.servers_of(model):
            if resident.state is ResidentState.READY:
                self._drain(resident, reason, LeavesFor.ASKED)
        return self._advance(now)

    def gpu_lost(self, uuids: Iterable[str], now: float, *, reason: str) -> list[Effect]:
        """These GPUs no longer answer: the servers on them end, whatever they are doing."""
        lost = set(uuids)
        effects: list[Effect] = []
        for resident in list(self._residents.values()):
            if not lost.intersection(resident.bytes_by_gpu):
                continue
            if resident.state in (ResidentState.LOADING, ResidentState.READY):
                effects.append(self._stop(resident, reason, LeavesFor.GPU_LOST))
            elif resident.state is ResidentState.MAKING_ROOM:
                self._take_back(resident)
        return effects + self._advance(now)

    def set_pool_size(self, size: int | None) -> None:
        """How many servers there may be; takes effect with the next decision."""
        self.limits = replace(self.limits, pool_size=size)

    def memory_changed(self, now: float) -> list[Effect]:
        """A new GPU snapshot is in; also the clock tick for deadlines, idle unloading and replicas."""
        self._changes += 1
        effects: list[Effect] = []
        for request in list(self._waiting.waiting_since(now - self.limits.wait_seconds)):
            self._waiting.remove(request.ticket)
            seconds = self.retry_after_seconds(request.model, now)
            effects.append(Refuse(request.ticket, waited_too_long(request, now, seconds)))
        for resident in self._leavers(now).idle_too_long(self.limits.idle_seconds_before_unload):
            reason = f"idle for {now - resident.last_used:.0f} s"
            effects.append(self._stop(resident, reason, LeavesFor.IDLE))
        return effects + self._advance(now) + self._add_replicas(now)

    # -- decisions ---------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Effect]:
        """Admit who can be, then bring in every model that is waited for, the most urgent first."""
        for promise in list(self._residents.values()):
            if promise.state is ResidentState.MAKING_ROOM and not self._waiting.count(promise.model):
                self._take_back(promise)
        effects: list[Effect] = []
        # Admit first: a ready model whose requests still wait would look idle to the others.
        for model in self._waiting.since():
            effects += self._admit(model)
        effects += self._ask_to_leave(now)
        for model in self._order(now):
            effects += self._bring_in(model, now)
        return effects

    def _order(self, now: float) -> list[str]:
        """Models that are waited for: the starved by age, then the others by priority and age."""

        def urgency(item: tuple[str, float]) -> tuple[bool, int, float]:
            model, since = item
            starved = self._starved(since, now)
            return (not starved, 0 if starved else -self._rules(model).priority, since)

        return [model for model, _ in sorted(self._waiting.since().items(), key=urgency)]

    def _starved(self, since: float, now: float) -> bool:
        return now - since > self.limits.starvation_seconds

    def _bring_in(self, model: str, now: float) -> list[Effect]:
        """Take the next step towards a server for ``model``, if there is one to take now."""
        if self._asked_at.get(model) == self._changes or self._in_service(model):
            return []
        for resident in self.servers_of(model):
            if resident.state is not ResidentState.MAKING_ROOM or resident.waits_for:
                return []
            self._forget(resident.server)
        effects = self._place(model, now)
        if not effects and not self.servers_of(model):
            self._asked_at[model] = self._changes
        return effects

    def _place(self, model: str, now: float) -> list[Effect]:
        """Start it, promise it the room that others must leave first, refuse it, or let it wait."""
        leavers = self._leavers(now)
        starved = self._starved(self._waiting.since()[model], now)
        refusal: DoesNotFitError | None = None
        for may_leave in leavers.rounds(starved=starved):
            views = leavers.views(model, may_leave, starved=starved)
            try:
                assignment = self._placer(model, views, leavers.claims())
                victims = choose_victims(self.limits.pool_size, leavers, views, assignment.evict)
            except DoesNotFitError as error:
                refusal = refusal or error
                continue
            except LlamaGpuError as error:
                return self._refuse_all(model, error)
            if victims:
                return self._make_room(model, replace(assignment, evict=victims), now)
            if victims is not None:
                return [self._start(model, assignment, now)]
        if refusal is not None and not self._could_ever(model, leavers):
            return self._refuse_all(model, refusal)
        return []

    def _could_ever(self, model: str, leavers: Leavers) -> bool:
        """Whether waiting can help: it would go in if all left that are not pinned."""
        views = leavers.views(model, lambda resident: not leavers.pinned(resident), starved=True)
        try:
            assignment = self._placer(model, views, leavers.claims())
            choose_victims(self.limits.pool_size, leavers, views, assignment.evict)
        except LlamaGpuError:
            return False
        return True

    def _start(self, model: str, assignment: Assignment, now: float) -> Start:
        server = free_id(model, self._residents)
        resident = Resident(model, ResidentState.LOADING, assignment, now, server, last_used=now)
        self._residents[server] = resident
        self._changes += 1
        return Start(model, assignment, server)

    def _make_room(self, model: str, assignment: Assignment, now: float) -> list[Effect]:
        """Promise the room to ``model``, then ask the victims to leave."""
        server = free_id(model, self._residents)
        self._residents[server] = Resident(
            model, ResidentState.MAKING_ROOM, assignment, now, server, waits_for=set(assignment.evict)
        )
        self._changes += 1
        return self._ask_to_leave(now)

    def _ask_to_leave(self, now: float) -> list[Effect]:
        """Drain whom a promise waits for, once that may be; stop who is drained."""
        promises = [resident for resident in self._residents.values() if resident.waits_for]
        leavers = self._leavers(now) if promises else None
        for promise in promises:
            for victim in map(self._residents.__getitem__, promise.waits_for):
                if leavers and not victim.leaving and leavers.stayed(victim):
                    self._drain(victim, f"makes room for {promise.model}", LeavesFor.ROOM)
        return [
            self._stop(resident, resident.leaves_because, resident.leaves_for)
            for resident in self._residents.values()
            if resident.draining and resident.state is ResidentState.READY and not resident.active
        ]

    def _take_back(self, promise: Resident) -> None:
        """Nobody needs leave for ``promise`` any more."""
        self._forget(promise.server)
        awaited = {server for resident in self._residents.values() for server in resident.waits_for}
        for victim in map(self._residents.__getitem__, promise.waits_for - awaited):
            if victim.state is ResidentState.READY and victim.leaves_for is LeavesFor.ROOM:
                victim.draining, victim.leaves_because = False, ""

    def _add_replicas(self, now: float) -> list[Effect]:
        """Further servers of models that are asked for, where room is free: nobody leaves for one."""
        models = in_service(self._residents.values())
        if any(model not in models for model in self._waiting.since()):
            return []  # what is free is for those who have none
        effects: list[Effect] = []
        for model, servers in models.items():
            if not wants_another(servers, self._waiting.count(model), self._rules(model)):
                continue
            if len(servers) < len(self.servers_of(model)) or now < self._no_replica_before.get(model, now):
                continue
            leavers = self._leavers(now)
            views = leavers.views(model, lambda _nobody: False)
            try:
                assignment = self._placer(model, views, leavers.claims())
                free = choose_victims(self.limits.pool_size, leavers, views, assignment.evict) == ()
            except LlamaGpuError:
                continue
            if free:
                effects.append(self._start(model, assignment, now))
        return effects

    # -- steps -------------------------------------------------------------------------------

    def _admit(self, model: str) -> list[Effect]:
        servers = self._in_service(model)
        ready = {r.server: r for r in servers if r.state is ResidentState.READY}
        if not ready:
            return []
        slots = self._rules(model).slots
        effects: list[Effect] = []
        for request in self._waiting.of(model):
            loads = {server: len(resident.active) for server, resident in ready.items()}
            if len(ready) < len(servers) and min(loads.values()) >= slots:
                break  # another one is about to be ready, and would stand idle beside a long queue
            server = self._affinity.choose(model, request.conversation, loads, slots)
            self._waiting.remove(request.ticket)
            ready[server].active.add(request.ticket)
            self._served_by[request.ticket] = server
            effects.append(Admit(request.ticket, model, server))
        return effects

    def _refuse_all(self, model: str, error: LlamaGpuError) -> list[Effect]:
        requests = self._waiting.of(model)
        for request in requests:
            self._waiting.remove(request.ticket)
        return [Refuse(request.ticket, error) for request in requests]

    def _stop(self, resident: Resident, reason: str, cause: LeavesFor) -> Stop:
        self._drain(resident, reason, cause)
        self._become(resident, ResidentState.STOPPING)
        return Stop(resident.model, reason, cause, resident.server)

    def _drain(self, resident: Resident, reason: str, cause: LeavesFor) -> None:
        resident.draining = True
        resident.leaves_because, resident.leaves_for = reason, cause

    def _become(self, resident: Resident, state: ResidentState) -> None:
        resident.state = state
        self._changes += 1

    def _forget(self, server: str) -> Resident | None:
        self._changes += 1
        for resident in self._residents.values():
            resident.waits_for.discard(server)
        return self._residents.pop(server, None)

    # -- questions ---------------------------------------------------------------------------

    def _in_service(self, model: str) -> list[Resident]:
        return in_service(self.servers_of(model)).get(model, [])

    def _leavers(self, now: float) -> Leavers:
        return Leavers(self._residents, self._rules, self._load_times.measured, self._popularity, now)
