"""What a simulated strategy did: loads, evictions, waiting, memory in use. Numbers only."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

__all__ = ["Occupancy", "Outcome", "Waiting"]


@dataclass(frozen=True)
class Waiting:
    """How long the answered requests waited for their model, in seconds."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Waiting:
        """Of all of them; a percentile is the smallest wait that so many do not exceed."""
        if not seconds:
            return cls()
        ordered = sorted(seconds)

        def percentile(share: float) -> float:
            return ordered[ceil(share * len(ordered)) - 1]

        return cls(
            sum(ordered) / len(ordered), percentile(0.5), percentile(0.95), percentile(0.99), ordered[-1]
        )


@dataclass(frozen=True)
class Occupancy:
    """The share of each GPU's memory that servers hold, as it changes: steps, each holding until the next."""

    uuids: tuple[str, ...]
    times: array[float]
    fractions: tuple[array[float], ...]

    def mean(self, until: float) -> dict[str, float]:
        """The mean over time, by GPU."""
        means = self.over([0.0, until])
        return dict(zip(self.uuids, (row[0] for row in means), strict=True))

    def over(self, edges: Sequence[float]) -> list[list[float]]:
        """The mean between each two neighbouring times of ``edges``, for each GPU."""
        rows = []
        for steps in self.fractions:
            # The area up to each step, so that the area up to any time is a look-up.
            areas = array("d", [0.0])
            for place in range(1, len(self.times)):
                areas.append(areas[-1] + steps[place - 1] * (self.times[place] - self.times[place - 1]))
            sums = [self._area(edge, steps, areas) for edge in edges]
            rows.append(
                [
                    (after - before) / (to - since) if to > since else 0.0
                    for before, after, since, to in zip(sums, sums[1:], edges, edges[1:], strict=False)
                ]
            )
        return rows

    def _area(self, time: float, steps: array[float], areas: array[float]) -> float:
        place = bisect_right(self.times, time) - 1
        return 0.0 if place < 0 else areas[place] + steps[place] * (time - self.times[place])


@dataclass(frozen=True)
class Outcome:
    """One strategy over one load. Times in seconds, sizes in bytes.

    ``loads_at`` has the time of each load, ``loaded_bytes`` are of files; ``refused`` counts requests and
    ``left`` servers, by reason.
    """

    strategy: str
    requests: int
    answered: int
    loads_at: array[float]
    loaded_bytes: int
    seconds: float
    waiting: Waiting
    occupancy: Occupancy
    refused: Mapping[str, int] = field(default_factory=Counter)
    left: Mapping[str, int] = field(default_factory=Counter)

    @property
    def loads(self) -> int:
        """Servers that were started."""
        return len(self.loads_at)

    @property
    def evictions(self) -> int:
        """Servers that left for another model."""
        return self.left.get("room", 0)
