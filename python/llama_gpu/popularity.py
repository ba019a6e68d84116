"""How often models were asked for lately: what makes one of them dear to lose."""

from __future__ import annotations

from math import exp2

__all__ = ["Popularity"]

HALF_LIFE_SECONDS = 3 * 3600.0
"""After so long a request counts for half. Long enough to tell a model that comes every hour from one that
came once, short enough that yesterday's favourite leaves before today's."""


class Popularity:
    """Requests by model, each counting for less the longer it is ago."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, float]] = {}

    def asked_for(self, model: str, now: float) -> None:
        """A request for ``model`` has come."""
        self._counts[model] = (self.recent(model, now) + 1.0, now)

    def recent(self, model: str, now: float) -> float:
        """How many requests for ``model`` there were, as they count now; 0 for one that nobody asked for."""
        count, at = self._counts.get(model, (0.0, now))
        return count * exp2((at - now) / HALF_LIFE_SECONDS)
