"""Plays a load through the scheduler: its clock, its servers and its requests are simulated.

The scheduler and what places models are the real ones. One heap holds what is yet to happen; nothing here
looks at a clock, a file or a GPU, so that the same load always has the same outcome.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from llama_gpu.effects import Admit, Effect, Refuse, Start, Stop
from llama_gpu.residents import ResidentState
from llama_gpu.scheduler import Scheduler
from llama_gpu.simulation.load import Request
from llama_gpu.simulation.outcome import Occupancy, Outcome, Waiting
from llama_gpu.simulation.servers import SimulatedServers, Timing

__all__ = ["Player", "play"]

TICK_SECONDS = 1.0
"""How often deadlines are looked at while somebody waits, or while models may be idle too long."""

_ENDED, _READY, _GONE, _TICK = range(4)


@dataclass(frozen=True)
class Player:
    """A scheduler that has not been used yet, and the world that it decides about.

    ``capacity_bytes`` by GPU UUID, ``file_bytes`` by model; ``ticks``: models leave after idle time.
    """

    scheduler: Scheduler
    capacity_bytes: Mapping[str, int]
    file_bytes: Mapping[str, int]
    timing: Timing = field(default_factory=Timing)
    ticks: bool = False


def play(load: Iterable[Request], player: Player, name: str = "") -> Outcome:
    """Play ``load``, sorted by time, until every request has ended; the outcome bears ``name``.

    Raises:
        MemoryExceededError: a server was started where its memory is not there.
    """
    return _Run(player).play(load, name)


class _Run:
    def __init__(self, player: Player) -> None:
        self._player = player
        self._scheduler = player.scheduler
        self._servers = SimulatedServers(player.capacity_bytes)
        self._heap: list[tuple[float, int, int, Any]] = []
        self._numbers = count()
        self._waiting: dict[int, tuple[str, float, float]] = {}
        self._ticking = False
        self._waits = array("d")
        self._loads_at = array("d")
        self._loaded_bytes = 0
        self._refused: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._times = array("d", [0.0])
        self._fractions = tuple(array("d", [0.0]) for _ in player.capacity_bytes)

    def play(self, load: Iterable[Request], name: str) -> Outcome:
        heap, scheduler, waiting = self._heap, self._scheduler, self._waiting
        arrivals = iter(load)
        request = next(arrivals, None)
        ticket, now = 0, 0.0
        while request is not None or heap:
            if request is not None and (not heap or request.time_seconds <= heap[0][0]):
                now, model, duration = request
                ticket += 1
                waiting[ticket] = (model, now, duration)
                effects = scheduler.request_arrived(ticket, model, now)
                request = next(arrivals, None)
            else:
                now, _, kind, subject = heappop(heap)
                if kind == _ENDED:
                    effects = scheduler.request_ended(subject, now)
                else:
                    effects = self._happened(kind, subject, now)
            if effects:
                self._carry_out(effects, now)
            if not self._ticking and (waiting or (self._player.ticks and request is not None)):
                self._ticking = True
                self._later(now + TICK_SECONDS, _TICK, None)
        return Outcome(
            strategy=name,
            requests=ticket,
            answered=len(self._waits),
            loads_at=self._loads_at,
            loaded_bytes=self._loaded_bytes,
            seconds=now,
            waiting=Waiting.of(self._waits),
            occupancy=Occupancy(tuple(self._player.capacity_bytes), self._times, self._fractions),
            refused=self._refused,
            left=self._left,
        )

    def _happened(self, kind: int, subject: Any, now: float) -> list[Effect]:
        scheduler = self._scheduler
        if kind == _READY:
            loading = subject.state is ResidentState.LOADING  # else it was stopped before it was ready
            return scheduler.server_ready(subject.server, now) if loading else []
        if kind == _GONE:
            self._servers.gone(subject)
            self._occupied(now)
            return scheduler.server_stopped(subject, now)
        self._ticking = False
        return scheduler.memory_changed(now) if self._time_matters() else []

    def _time_matters(self) -> bool:
        """Whether time alone can change anything: not while everybody waits for a load that is under way."""
        if self._player.ticks:
            return True
        loading = {
            resident.model
            for resident in self._scheduler.residents.values()
            if resident.state is ResidentState.LOADING
        }
        return any(model not in loading for model, _, _ in self._waiting.values())

    def _carry_out(self, effects: list[Effect], now: float) -> None:
        for effect in effects:
            match effect:
                case Admit(ticket, _, _):
                    _, arrived, duration = self._waiting.pop(ticket)
                    self._waits.append(now - arrived)
                    heappush(self._heap, (now + duration, next(self._numbers), _ENDED, ticket))
                case Start(model, assignment, server):
                    self._servers.started(server, assignment.bytes_by_gpu)
                    self._occupied(now)
                    self._loads_at.append(now)
                    self._loaded_bytes += self._player.file_bytes[model]
                    ready = now + self._player.timing.load_seconds(self._player.file_bytes[model])
                    self._later(ready, _READY, self._scheduler.residents[server])
                case Stop(_, _, cause, server):
                    self._left[cause] += 1
                    self._later(now + self._player.timing.stop_seconds, _GONE, server)
                case Refuse(ticket, error):
                    del self._waiting[ticket]
                    self._refused[type(error).__name__] += 1

    def _later(self, time: float, kind: int, subject: object) -> None:
        heappush(self._heap, (time, next(self._numbers), kind, subject))

    def _occupied(self, now: float) -> None:
        self._times.append(now)
        servers = self._servers
        for (uuid, capacity), steps in zip(servers.capacity_bytes.items(), self._fractions, strict=True):
            steps.append(servers.held_bytes[uuid] / capacity)
