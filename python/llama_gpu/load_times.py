"""How long loads took, and so how long one is likely to take: decides no load, only when to come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llama_gpu.residents import Resident, ResidentState
from llama_gpu.rules import Rules

__all__ = ["DEFAULT_LOAD_SECONDS", "LoadTimes"]

DEFAULT_LOAD_SECONDS = 10.0
"""What a load is taken to last where none was measured."""


class LoadTimes:
    """Seconds that the last load of a model took, here or, by its ``rules``, in an earlier process."""

    def __init__(self, rules: Callable[[str], Rules]) -> None:
        self._rules = rules
        self._seconds: dict[str, float] = {}

    def took(self, model: str, seconds: float) -> None:
        """A load has ended."""
        self._seconds[model] = max(seconds, 0.001)

    def measured(self, model: str) -> float | None:
        """What the last load took, if any was measured."""
        return self._seconds.get(model) or self._rules(model).load_seconds

    def expected(self, model: str) -> float:
        """What the next load is likely to take."""
        return self.measured(model) or DEFAULT_LOAD_SECONDS

    def until_ready(
        self, model: str, residents: Iterable[Resident], order: Sequence[str], now: float
    ) -> float:
        """Seconds until ``model`` is likely to be ready: the rest of its load, or its load after others'.

        ``order`` has the models that are waited for, the first to be loaded first.
        """
        residents = list(residents)
        loading = {
            resident.model: max(0.0, self.expected(resident.model) - (now - resident.since))
            for resident in residents
            if resident.state is ResidentState.LOADING
        }
        if model in loading:
            return loading[model]
        there = {r.model for r in residents if r.state is not ResidentState.MAKING_ROOM and not r.leaving}
        ahead = order[: order.index(model)] if model in order else order
        before = [self.expected(name) for name in ahead if name not in there]
        return sum(loading.values()) + sum(before) + self.expected(model)
