"""Servers that exist in numbers only: what they hold, and how long they take to come and go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MemoryExceededError", "SimulatedServers", "Timing"]


class MemoryExceededError(Exception):
    """A server was started where its memory is not there: a real one would have failed."""


@dataclass(frozen=True)
class Timing:
    """How fast servers come and go: a load is ``start_seconds`` and its file at ``bytes_per_second``."""

    bytes_per_second: float = 2e9
    start_seconds: float = 1.0
    stop_seconds: float = 0.5

    def load_seconds(self, file_bytes: int) -> float:
        """From the start of a server until it answers."""
        return self.start_seconds + file_bytes / self.bytes_per_second


class SimulatedServers:
    """The memory of every GPU, and who holds it: from a server's start until it is gone."""

    def __init__(self, capacity_bytes: Mapping[str, int]) -> None:
        self.capacity_bytes = dict(capacity_bytes)
        self.held_bytes = dict.fromkeys(capacity_bytes, 0)
        self._held_by: dict[str, Mapping[str, int]] = {}

    def started(self, server: str, bytes_by_gpu: Mapping[str, int]) -> None:
        """A server takes its memory.

        Raises:
            MemoryExceededError: a GPU has too little, or the server runs already.
        """
        if server in self._held_by:
            raise MemoryExceededError(f"{server} runs already")
        for uuid, count in bytes_by_gpu.items():
            self.held_bytes[uuid] += count
            if self.held_bytes[uuid] > self.capacity_bytes[uuid]:
                over = self.held_bytes[uuid] - self.capacity_bytes[uuid]
                raise MemoryExceededError(f"{server} is {over} bytes too large for {uuid}")
        self._held_by[server] = bytes_by_gpu

    def gone(self, server: str) -> None:
        """A server has ended and its memory is back."""
        for uuid, count in self._held_by.pop(server, {}).items():
            self.held_bytes[uuid] -= count
