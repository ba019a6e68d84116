"""The requests that wait for a server: one queue per model, so that a load serves all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llama_gpu.errors import QueueFullError, ServerError

__all__ = ["Request", "Waiting", "queue_full", "waited_too_long"]


@dataclass(frozen=True)
class Request:
    """A request that waits since ``since`` (seconds); ``conversation`` names what it goes on with."""

    ticket: int
    model: str
    since: float
    conversation: str | None = None


class Waiting:
    """Requests by model, in the order of their arrival."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[int, Request]] = {}
        self._by_ticket: dict[int, Request] = {}

    def count(self, model: str | None = None) -> int:
        """How many wait, for one model or for all."""
        return len(self._by_ticket) if model is None else len(self._queues.get(model, ()))

    def add(self, request: Request) -> None:
        """Put a request at the end of its model's queue."""
        self._queues.setdefault(request.model, {})[request.ticket] = request
        self._by_ticket[request.ticket] = request

    def remove(self, ticket: int) -> Request | None:
        """Take a request out, wherever it stands; None when it does not wait."""
        request = self._by_ticket.pop(ticket, None)
        if request is not None:
            queue = self._queues[request.model]
            del queue[ticket]
            if not queue:
                del self._queues[request.model]
        return request

    def of(self, model: str) -> list[Request]:
        """The requests of one model, the longest waiting first."""
        return list(self._queues.get(model, {}).values())

    def since(self) -> Mapping[str, float]:
        """Every model that is waited for, with the time since when."""
        return {model: next(iter(queue.values())).since for model, queue in self._queues.items()}

    def waiting_since(self, time: float) -> Iterator[Request]:
        """The requests that came before ``time``."""
        for queue in list(self._queues.values()):
            for request in list(queue.values()):
                if request.since >= time:
                    break
                yield request


def queue_full(model: str, size: int, retry_after_seconds: float) -> QueueFullError:
    """What one request too many is told."""
    message = f"{size} requests already wait for {model!r}; try again in about {retry_after_seconds:.0f} s"
    return QueueFullError(message, model=model, retry_after_seconds=retry_after_seconds)


def waited_too_long(request: Request, now: float, retry_after_seconds: float) -> ServerError:
    """What a request is told that nobody could serve in time."""
    message = (
        f"{request.model!r} could not be loaded within {now - request.since:.0f} s: "
        "the models in its place are busy"
    )
    return ServerError(message, model=request.model, retry_after_seconds=retry_after_seconds)
