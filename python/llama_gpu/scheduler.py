"""Which model is resident, who waits and who leaves: a pure state machine.

Events go in as method calls that carry the time, effects come out as values. There is no
clock, no log, no I/O and no asyncio here; the supervisor does what the effects say and
reports back. One resident per model: ``LOADING -> READY -> STOPPING``, or ``MAKING_ROOM``
first while the models that it replaces leave.

Invariants that the tests hold it to:

* a resident that serves a request is never stopped to make room;
* a claim is counted from the decision until the server is gone;
* every ticket ends in exactly one ``Admit`` or ``Refuse``, unless its request ends first;
* nothing is stopped when stopping it would not help.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from llama_gpu.budget import Claim
from llama_gpu.errors import DoesNotFitError, LlamaGpuError, QueueFullError, ServerError
from llama_gpu.residents import Assignment, LeavesFor, Placer, Resident, ResidentState, ResidentView

__all__ = ["Admit", "Effect", "Limits", "Refuse", "Scheduler", "Start", "Stop"]

DEFAULT_LOAD_SECONDS = 10.0
"""What a load is taken to last before one was measured; only Retry-After depends on it."""


@dataclass(frozen=True)
class Limits:
    """``pool_size``: residents at most (None: memory alone decides). Times in seconds."""

    pool_size: int | None = None
    queue_size: int = 256
    idle_seconds_before_unload: float | None = None
    starvation_seconds: float = 30.0
    settle_seconds: float = 5.0
    wait_seconds: float = 600.0


@dataclass(frozen=True)
class Start:
    """Start a server for ``model`` as assigned; answer ``server_ready`` or ``server_failed``."""

    model: str
    assignment: Assignment


@dataclass(frozen=True)
class Stop:
    """Stop the server of ``model``; answer ``server_stopped`` once its memory is back.

    ``reason`` is a sentence. A server whose GPU is lost cannot end in good order: it is killed.
    """

    model: str
    reason: str
    cause: LeavesFor = LeavesFor.ASKED


@dataclass(frozen=True)
class Admit:
    """The request behind ``ticket`` may go to the server of ``model`` now."""

    ticket: int
    model: str


@dataclass(frozen=True)
class Refuse:
    """The request behind ``ticket`` ends with ``error``."""

    ticket: int
    error: LlamaGpuError


Effect = Start | Stop | Admit | Refuse


class Scheduler:
    """The state machine. Every public method returns the effects to carry out, in order."""

    def __init__(
        self,
        placer: Placer,
        limits: Limits | None = None,
        *,
        pinned: Callable[[str], bool] = lambda _model: False,
        idle_limit: Callable[[str], float | None] = lambda _model: None,
    ) -> None:
        self._placer = placer
        self.limits = limits or Limits()
        self._pinned = pinned
        self._idle_limit = idle_limit
        self._residents: dict[str, Resident] = {}
        self._waiting: dict[str, dict[int, float]] = {}
        self._model_of: dict[int, str] = {}
        self._load_seconds: dict[str, float] = {}
        self._short_since: dict[str, float] = {}
        self._room_made: dict[str, float] = {}

    # -- what others may look at -------------------------------------------------------------

    @property
    def residents(self) -> Mapping[str, Resident]:
        """Residents by model id, for display and for the placer's claims."""
        return self._residents

    @property
    def loads(self) -> bool:
        """Whether a server loads, or is about to."""
        begun = (ResidentState.MAKING_ROOM, ResidentState.LOADING)
        return any(resident.state in begun for resident in self._residents.values())

    def waiting_count(self, model: str | None = None) -> int:
        """How many requests wait, for one model or for all."""
        queues = self._waiting.values() if model is None else (self._waiting.get(model, {}),)
        return sum(map(len, queues))

    def expected_load_seconds(self, model: str) -> float:
        """The last measured load of this model, else a default; for Retry-After."""
        return self._load_seconds.get(model, DEFAULT_LOAD_SECONDS)

    # -- events ------------------------------------------------------------------------------

    def request_arrived(self, ticket: int, model: str, now: float) -> list[Effect]:
        """A request for a known model; ``ticket`` is any unused number."""
        if (ready := self._ready(model)) is not None:
            # Nobody else gains by this: the others need not be thought of.
            self._model_of[ticket] = model
            ready.active.add(ticket)
            return [Admit(ticket, model)]
        if self.waiting_count(model) >= self.limits.queue_size:
            seconds = self.expected_load_seconds(model)
            message = (
                f"{self.limits.queue_size} requests already wait for {model!r}; "
                f"try again in about {seconds:.0f} s"
            )
            return [Refuse(ticket, QueueFullError(message, model=model, retry_after_seconds=seconds))]
        self._model_of[ticket] = model
        self._waiting.setdefault(model, {})[ticket] = now
        return self._advance(now)

    def request_ended(self, ticket: int, now: float) -> list[Effect]:
        """The request was answered, failed, or its client went away, waiting or not."""
        model = self._model_of.pop(ticket, None)
        if model is None:
            return []
        if ticket in self._waiting.get(model, ()):
            self._leave_queue(model, ticket)
            return self._advance(now)
        resident = self._residents.get(model)
        if resident is None or ticket not in resident.active:
            return []
        resident.active.discard(ticket)
        resident.last_used = now
        nobody_gains = resident.active or not (self._waiting or resident.draining)
        return [] if nobody_gains else self._advance(now)

    def server_started(self, model: str, pid: int) -> None:
        """The child process of ``model`` exists; its memory can be told from others'."""
        if resident := self._residents.get(model):
            resident.pid = pid

    def server_ready(
        self, model: str, now: float, *, measured_by_gpu: Mapping[str, int] | None = None
    ) -> list[Effect]:
        """The server answers; ``measured_by_gpu`` (bytes) replaces its estimate where known."""
        resident = self._residents.get(model)
        if resident is None or resident.state is not ResidentState.LOADING:
            return []
        resident.state = ResidentState.READY
        resident.measured_by_gpu = measured_by_gpu
        resident.last_used = now
        self._load_seconds[model] = max(now - resident.since, 0.001)
        return self._advance(now)

    def server_failed(self, model: str, error: LlamaGpuError, now: float) -> list[Effect]:
        """The server never became ready and is gone: its requests end with ``error``."""
        self._forget(model)
        return [*self._refuse_all(model, error), *self._advance(now)]

    def server_exited(self, model: str, now: float, *, reason: str = "it ended by itself") -> list[Effect]:
        """A ready server ended by itself: nobody is sent there any more.

        Report ``server_stopped`` once a snapshot is in that is newer than its end; requests that
        come until then wait, and get a fresh server.
        """
        resident = self._residents.get(model)
        if resident is not None and resident.state is ResidentState.READY:
            self._stop(resident, reason, LeavesFor.ENDED)  # there is nothing left to stop
        return self._advance(now)

    def server_stopped(self, model: str, now: float) -> list[Effect]:
        """A server is gone and the snapshot that the placer sees is newer than its end."""
        self._forget(model)
        return self._advance(now)

    def unload(self, model: str, now: float, *, reason: str = "asked to") -> list[Effect]:
        """Stop ``model`` as soon as it serves nobody; requests that wait reload it after."""
        resident = self._residents.get(model)
        if resident is None or resident.state is not ResidentState.READY:
            return []
        self._drain(resident, reason, LeavesFor.ASKED)
        return self._stop_if_drained(resident) + self._advance(now)

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
                self._forget(resident.model)
        return effects + self._advance(now)

    def set_pool_size(self, size: int | None) -> None:
        """How many residents there may be; takes effect with the next decision."""
        self.limits = replace(self.limits, pool_size=size)

    def memory_changed(self, now: float) -> list[Effect]:
        """A new GPU snapshot is in; also the clock tick for deadlines and idle unloading."""
        effects: list[Effect] = []
        for model, queue in list(self._waiting.items()):
            for ticket, since in list(queue.items()):
                if now - since <= self.limits.wait_seconds:
                    break
                self._leave_queue(model, ticket)
                del self._model_of[ticket]
                effects.append(Refuse(ticket, self._waited_too_long(model, now - since)))
        for resident in list(self._residents.values()):
            limit = self._idle_limit(resident.model) or self.limits.idle_seconds_before_unload
            if limit is None or not self._idle(resident) or self._pinned(resident.model):
                continue
            if now - resident.last_used >= limit:
                reason = f"idle for {now - resident.last_used:.0f} s"
                effects.append(self._stop(resident, reason, LeavesFor.IDLE))
        return effects + self._advance(now)

    # -- decisions ---------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Effect]:
        """Serve every model that has requests waiting, the longest waiting first."""
        effects: list[Effect] = []
        for resident in list(self._residents.values()):
            if resident.draining:
                effects += self._stop_if_drained(resident)
        oldest = {model: next(iter(queue.values())) for model, queue in self._waiting.items()}
        # Admit first: a ready model whose requests still wait would look idle to the others.
        for model in oldest:
            if (ready := self._ready(model)) is not None:
                effects += self._admit_all(ready)
        for model, since in sorted(oldest.items(), key=lambda item: item[1]):
            effects += self._bring_in(model, since, now)
        self._forget_unwanted(oldest.keys())
        return effects

    def _bring_in(self, model: str, since: float, now: float) -> list[Effect]:
        """Take the next step towards a server for ``model``, if there is one to take now."""
        resident = self._residents.get(model)
        if resident is not None:
            if resident.state is not ResidentState.MAKING_ROOM or resident.waits_for:
                return []
            self._forget(model)
            if resident.bytes_by_gpu:
                self._room_made[model] = now
        if self._pool_has_room():
            return self._place(model, since, now)
        victims = self._oldest_idle()
        if not victims and now - since > self.limits.starvation_seconds:
            victims = self._oldest_busy()
        if not victims:
            return []
        return self._make_room(model, Assignment("pool", evict=tuple(victims)), now)

    def _forget_unwanted(self, wanted: Collection[str]) -> None:
        """Drop promises and times of models whose requests have all gone away."""
        for model, resident in list(self._residents.items()):
            if resident.state is ResidentState.MAKING_ROOM and model not in wanted:
                self._forget(model)
        for times in (self._short_since, self._room_made):
            for model in times.keys() - set(wanted):
                del times[model]

    def _place(self, model: str, since: float, now: float) -> list[Effect]:
        try:
            assignment = self._placer(model, self._views(now), self._claims())
        except DoesNotFitError as error:
            return self._when_it_does_not_fit(model, since, now, error)
        except LlamaGpuError as error:
            return self._refuse_all(model, error)
        self._short_since.pop(model, None)
        if not assignment.evict:
            self._room_made.pop(model, None)
            self._residents[model] = Resident(model, ResidentState.LOADING, assignment, now, last_used=now)
            return [Start(model, assignment)]
        if now - self._room_made.get(model, float("-inf")) < self.limits.settle_seconds:
            return []  # others left for it already and their memory is on its way back
        return self._make_room(model, assignment, now)

    def _when_it_does_not_fit(
        self, model: str, since: float, now: float, error: DoesNotFitError
    ) -> list[Effect]:
        """Wait where waiting can help, drain the busy when it has lasted too long, else refuse."""
        short_since = self._short_since.setdefault(model, now)
        try:
            possible = self._placer(model, self._views(now, all_would_leave=True), self._claims())
        except LlamaGpuError:
            if now - short_since < self._settling_seconds():
                return []
            self._short_since.pop(model, None)
            return self._refuse_all(model, error)
        starved = now - since > self.limits.starvation_seconds
        if starved and possible.evict and all(self._can_drain(name) for name in possible.evict):
            return self._make_room(model, possible, now)
        return []

    def _can_drain(self, model: str) -> bool:
        resident = self._residents[model]
        return resident.state is ResidentState.READY and not resident.draining

    def _settling_seconds(self) -> float:
        """A driver gives memory back late: before anything ever left there is nothing to wait for."""
        return self.limits.settle_seconds if self._load_seconds else 0.0

    def _make_room(self, model: str, assignment: Assignment, now: float) -> list[Effect]:
        """Promise the room to ``model``, then ask the victims to leave."""
        effects: list[Effect] = []
        self._residents[model] = Resident(
            model, ResidentState.MAKING_ROOM, assignment, since=now, waits_for=set(assignment.evict)
        )
        for name in assignment.evict:
            victim = self._residents[name]
            self._drain(victim, f"makes room for {model}", LeavesFor.ROOM)
            effects += self._stop_if_drained(victim)
        return effects

    def _pool_has_room(self) -> bool:
        return self.limits.pool_size is None or len(self._residents) < self.limits.pool_size

    def _oldest_idle(self) -> list[str]:
        idle = [r for r in self._residents.values() if self._idle(r) and not self._pinned(r.model)]
        idle.sort(key=lambda r: r.last_used)
        return [r.model for r in idle[:1]]

    def _oldest_busy(self) -> list[str]:
        """The busy model to drain, unless somebody is on the way out already."""
        ready = [r for r in self._residents.values() if r.state is ResidentState.READY]
        if any(r.draining for r in ready) or len(ready) < len(self._residents):
            return []
        candidates = [r for r in ready if not self._pinned(r.model)]
        return [min(candidates, key=lambda r: r.last_used).model] if candidates else []

    def _idle(self, resident: Resident) -> bool:
        return resident.state is ResidentState.READY and not resident.active and not resident.draining

    def _views(self, now: float, *, all_would_leave: bool = False) -> list[ResidentView]:
        """Who could leave now; with ``all_would_leave``, who could ever leave."""
        return [
            ResidentView(
                r.model,
                r.bytes_by_gpu,
                busy=self._pinned(r.model) or not (all_would_leave or self._idle(r)),
                idle_seconds=max(0.0, now - r.last_used),
                reload_seconds=self._load_seconds.get(r.model),
            )
            for r in self._residents.values()
        ]

    def _claims(self) -> list[Claim]:
        return [resident.claim for resident in self._residents.values()]

    # -- steps -------------------------------------------------------------------------------

    def _ready(self, model: str) -> Resident | None:
        resident = self._residents.get(model)
        ready = resident is not None and resident.state is ResidentState.READY and not resident.draining
        return resident if ready else None

    def _admit_all(self, resident: Resident) -> list[Effect]:
        tickets = self._waiting.pop(resident.model, {})
        resident.active.update(tickets)
        return [Admit(ticket, resident.model) for ticket in tickets]

    def _refuse_all(self, model: str, error: LlamaGpuError) -> list[Effect]:
        tickets = self._waiting.pop(model, {})
        for ticket in tickets:
            del self._model_of[ticket]
        return [Refuse(ticket, error) for ticket in tickets]

    def _leave_queue(self, model: str, ticket: int) -> None:
        queue = self._waiting[model]
        del queue[ticket]
        if not queue:
            del self._waiting[model]

    def _stop(self, resident: Resident, reason: str, cause: LeavesFor) -> Stop:
        self._drain(resident, reason, cause)
        resident.state = ResidentState.STOPPING
        return Stop(resident.model, reason, cause)

    def _drain(self, resident: Resident, reason: str, cause: LeavesFor) -> None:
        resident.draining = True
        resident.leaves_because, resident.leaves_for = reason, cause

    def _stop_if_drained(self, resident: Resident) -> list[Effect]:
        if resident.state is ResidentState.READY and not resident.active:
            return [self._stop(resident, resident.leaves_because, resident.leaves_for)]
        return []

    def _forget(self, model: str) -> None:
        self._residents.pop(model, None)
        for resident in self._residents.values():
            resident.waits_for.discard(model)

    def _waited_too_long(self, model: str, seconds: float) -> ServerError:
        return ServerError(
            f"{model!r} could not be loaded within {seconds:.0f} s: the models in its place are busy",
            model=model,
        )
