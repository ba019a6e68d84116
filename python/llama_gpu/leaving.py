"""Who may leave for a newcomer, and who has to: asked by the scheduler about the state of one moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from llama_gpu.budget import Claim
from llama_gpu.errors import DoesNotFitError
from llama_gpu.popularity import Popularity
from llama_gpu.replicas import extra_servers, in_service
from llama_gpu.residents import Resident, ResidentState, ResidentView
from llama_gpu.rules import Rules

__all__ = ["Leavers", "choose_victims"]

MayLeave = Callable[[Resident], bool]


class Leavers:
    """The residents at the time ``now``.

    ``load_seconds`` is what a model's last load took, if known; ``popularity`` how often it is asked for.
    """

    def __init__(
        self,
        residents: Mapping[str, Resident],
        rules: Callable[[str], Rules],
        load_seconds: Callable[[str], float | None],
        popularity: Popularity,
        now: float,
    ) -> None:
        self.residents = residents
        self._rules = rules = cache(rules)
        self._load_seconds = load_seconds
        self._popularity = popularity
        self._now = now
        self._awaited = {server for resident in residents.values() for server in resident.waits_for}
        self._extra = {
            extra.server
            for model, servers in in_service(residents.values()).items()
            for extra in extra_servers(servers, rules(model))
        }

    def pinned(self, resident: Resident) -> bool:
        """Whether it must never leave."""
        return self._rules(resident.model).pinned and resident.server not in self._extra

    def stayed(self, resident: Resident) -> bool:
        """Whether it has been ready for its minimum residency."""
        least = self._rules(resident.model).residency(self._load_seconds(resident.model))
        return resident.ready_at is not None and self._now - resident.ready_at >= least

    def idle(self, resident: Resident) -> bool:
        """Whether it is ready and serves nobody."""
        return resident.state is ResidentState.READY and not resident.active and not resident.leaving

    def rounds(self, *, starved: bool) -> Iterator[MayLeave]:
        """Who may leave, in the order in which that is tried; each round allows more than the last.

        The idle, and those that leave already and whose room nobody was promised; then extra servers, once
        they have answered; and for a starved newcomer all that are not pinned, once they have answered.
        """
        yield self._now_idle
        if self._extra:
            yield lambda r: self._now_idle(r) or (r.server in self._extra and self._drainable(r))
        if starved:
            yield lambda r: self._now_idle(r) or (self._drainable(r, also_new=True) and not self.pinned(r))

    def _now_idle(self, resident: Resident) -> bool:
        if resident.leaving:
            return resident.server not in self._awaited
        return self.idle(resident) and self.stayed(resident) and not self.pinned(resident)

    def _drainable(self, resident: Resident, *, also_new: bool = False) -> bool:
        if resident.leaving or resident.server in self._awaited:
            return False
        if also_new:
            return resident.state in (ResidentState.LOADING, ResidentState.READY)
        return resident.state is ResidentState.READY and self.stayed(resident)

    def idle_too_long(self, otherwise_seconds: float | None) -> list[Resident]:
        """Those that are to leave by their own rules, or after ``otherwise_seconds`` where they have none."""
        found = []
        for resident in self.residents.values():
            limit = self._rules(resident.model).idle_seconds_before_unload or otherwise_seconds
            idle = self.idle(resident) and not self.pinned(resident)
            if limit is not None and idle and self._now - resident.last_used >= limit:
                found.append(resident)
        return found

    def claims(self) -> list[Claim]:
        """Every resident's claim; what others are promised already is marked."""
        return [
            replace(resident.claim, awaited=True) if resident.server in self._awaited else resident.claim
            for resident in self.residents.values()
        ]

    def views(self, newcomer: str, may_leave: MayLeave, *, starved: bool = False) -> list[ResidentView]:
        """The residents as the placer of ``newcomer`` sees them; no priority protects from a starved one."""
        return [
            self._view(resident, self._rules(newcomer).priority, may_leave, starved=starved)
            for resident in self.residents.values()
        ]

    def _view(
        self, resident: Resident, newcomer_priority: int, may_leave: MayLeave, *, starved: bool
    ) -> ResidentView:
        idle = resident.state is ResidentState.READY and not resident.active
        # Nothing more is lost with one that leaves anyway, nor with one beyond what was asked for.
        free = resident.leaving or resident.server in self._extra
        priority = self._rules(resident.model).priority
        if starved or free:
            priority = min(priority, newcomer_priority)
        return ResidentView(
            resident.server,
            resident.model,
            resident.bytes_by_gpu,
            busy=not may_leave(resident) or priority > newcomer_priority,
            idle_seconds=max(0.0, self._now - resident.last_used) if idle else 0.0,
            reload_seconds=0.0 if free else self._load_seconds(resident.model),
            priority=priority,
            stays=self.pinned(resident),
            host_bytes=resident.assignment.host_bytes,
            recent_requests=self._popularity.recent(resident.model, self._now),
        )


def choose_victims(
    pool_size: int | None, leavers: Leavers, views: Sequence[ResidentView], evict: Sequence[str]
) -> tuple[str, ...] | None:
    """Who has to leave for one server more: ``evict`` for memory, then the cheapest to lose for the pool.

    None: there would be more than ``pool_size`` servers, and too few may leave now.

    Raises:
        DoesNotFitError: pinned models take the whole pool.
    """
    if pool_size is None:
        return tuple(evict)
    residents = leavers.residents
    if sum(leavers.pinned(resident) for resident in residents.values()) >= pool_size:
        raise DoesNotFitError(f"server_pool.size is {pool_size}, and pinned models take all of it")
    staying = [r.server for r in residents.values() if not r.leaving and r.server not in evict]
    missing = max(0, len(staying) + 1 - pool_size)
    cheapest = sorted(
        (view for view in views if view.server in staying and not view.busy),
        key=lambda view: (view.as_running().eviction_cost, view.server),
    )
    if len(cheapest) < missing:
        return None
    victims = (*evict, *(view.server for view in cheapest[:missing]))
    holding = sum(r.state is not ResidentState.MAKING_ROOM for r in residents.values())
    return None if not victims and holding >= pool_size else victims
