"""What has happened since the start, for the metrics: only what no state that is kept elsewhere tells."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from llama_gpu.effects import Admit, Effect, Refuse, Start, Stop
from llama_gpu.errors import LlamaGpuError
from llama_gpu.openai import error_reply

__all__ = ["Counts"]

DECISION_SECONDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
LOAD_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)

_OUTCOMES: tuple[tuple[type[Effect], str], ...] = (
    (Start, "load"),
    (Stop, "unload"),
    (Refuse, "refuse"),
    (Admit, "admit"),
)


class Counts:
    """Counters of one proxy. ``registry`` is read when the metrics are asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._last_failure: LlamaGpuError | None = None
        self._decisions = Histogram(
            "llama_gpu_decision_seconds",
            "Time that one decision took, by what came of it",
            ["outcome"],
            registry=self.registry,
            buckets=DECISION_SECONDS,
        )
        self._loads = Histogram(
            "llama_gpu_load_seconds",
            "Time from starting a server until it answers",
            ["model"],
            registry=self.registry,
            buckets=LOAD_SECONDS,
        )
        self._evictions = Counter(
            "llama_gpu_evictions",
            "Servers stopped: room (for another model), idle, asked, gpu_lost",
            ["reason"],
            registry=self.registry,
        )
        self._degradations = Counter(
            "llama_gpu_degradations",
            "What models were started without because it would not fit, by the option, partial or cpu",
            ["kind"],
            registry=self.registry,
        )
        self._failures = Counter(
            "llama_gpu_failures",
            "What failed, by the code that error answers carry",
            ["kind"],
            registry=self.registry,
        )
        self._requests = Counter(
            "llama_gpu_model_requests",
            "Requests for a model, by the status of their answer; 499: the client left",
            ["model", "status"],
            registry=self.registry,
        )

    def decided(self, effects: Sequence[Effect], seconds: float) -> None:
        """A decision was taken; one that changes nothing is not counted."""
        if not effects:
            return
        outcome = next(name for kind, name in _OUTCOMES if any(isinstance(e, kind) for e in effects))
        self._decisions.labels(outcome).observe(seconds)
        for effect in effects:
            if isinstance(effect, Stop):
                self._evictions.labels(effect.cause).inc()
            elif isinstance(effect, Start):
                for given_up in effect.assignment.degraded:
                    self._degradations.labels(given_up.kind).inc()
            elif isinstance(effect, Refuse):
                self.failed(effect.error)

    def loaded(self, model: str, seconds: float) -> None:
        """A server became ready."""
        self._loads.labels(model).observe(seconds)

    def failed(self, error: LlamaGpuError) -> None:
        """A server did not start or ended by itself, or requests were refused; one error counts once."""
        if error is self._last_failure:
            return
        self._last_failure = error
        self._failures.labels(error_reply(error).body["error"]["code"]).inc()

    def answered(self, model: str, status: int) -> None:
        """A request for ``model`` is over."""
        self._requests.labels(model, str(status)).inc()
