"""What is asked of the scheduler: limits of the whole, and what holds for one model. Data only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "Rules"]

MOST_RESIDENT_SECONDS = 10.0
"""The longest minimum residency that a model gets without one being set."""


@dataclass(frozen=True)
class Limits:
    """``pool_size``: servers at most (None: memory alone decides). Times in seconds.

    ``starvation_seconds``: after so long, a model that others keep out gets its turn.
    ``settle_seconds``: how long a claim outlives its server at most, while its memory is not back.
    """

    pool_size: int | None = None
    queue_size: int = 256
    idle_seconds_before_unload: float | None = None
    starvation_seconds: float = 30.0
    settle_seconds: float = 5.0
    wait_seconds: float = 600.0


@dataclass(frozen=True)
class Rules:
    """What holds for one model.

    ``slots``: requests that one of its servers answers at the same time.
    ``replicas``: servers wanted side by side; ``max_replicas``: with those for a long queue.
    ``min_resident_seconds``: after a load nobody else makes it leave for so long; None: as long as its
    load took, at most ten seconds.
    ``load_seconds``: what an earlier load took, where that is remembered.
    """

    pinned: bool = False
    priority: int = 0
    slots: int = 1
    replicas: int = 1
    max_replicas: int = 1
    min_resident_seconds: float | None = None
    idle_seconds_before_unload: float | None = None
    load_seconds: float | None = None

    def residency(self, load_seconds: float | None) -> float:
        """Seconds that a server stays at least, given what its load took.

        A model that stays as long as its load took costs, at the worst, as much time for loading as
        it gives for serving.
        """
        if self.min_resident_seconds is not None:
            return self.min_resident_seconds
        return min(load_seconds or 0.0, MOST_RESIDENT_SECONDS)
