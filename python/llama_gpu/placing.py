"""Turns the scheduler's question "where does this model go?" into calls of ``lg.place``.

A model that fits nowhere as it is configured is asked for again with what its configuration lets it give
up (``degradation``). Without a GPU the host's memory alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_gpu import Gpu, GpuSnapshot, estimate
from llama_gpu.budget import Claim, HostMemory, available_gpus, available_host_bytes, overdrawn_bytes
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.degradation import CONTEXT_STEP, CpuUse, Rung, given_up, ladder, longest_context
from llama_gpu.errors import DoesNotFitError, LlamaGpuError, ServerError
from llama_gpu.fitting import Fitting, Question
from llama_gpu.host_room import HostRoom, in_words
from llama_gpu.loading import estimate_options, has_experts, with_trained_length
from llama_gpu.memory.known import KnownMemory
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.rules import Limits, Rules

__all__ = ["Placing", "limits_of", "rules_of"]

ONLY_ON_GPUS = ("cpu_moe_layers", "kv_offload", "mmproj_offload")


class Placing:
    """A ``Placer`` over the last snapshot.

    ``entry`` looks a model up in the catalogue; ``known`` has what loads took and llama.cpp projected;
    ``more_claims`` are of processes of ours that are no servers. ``host`` says what memory the host has at
    this moment, None where that is not known. ``planned`` has the GPUs (UUIDs) where a model goes as long as
    nobody has to leave for it there.

    Raises:
        ConfigError: ``gpu.allocation_strategy`` names none that can be loaded.
    """

    def __init__(
        self,
        config: Config,
        entry: Callable[[str], ModelEntry],
        known: KnownMemory | None = None,
        more_claims: Callable[[], Sequence[Claim]] = tuple,
        host: Callable[[], HostMemory | None] = lambda: None,
    ) -> None:
        self._config = config
        self._entry = entry
        self._more_claims = more_claims
        self._host = host
        self._fitting = Fitting(config, known)
        self.planned: Mapping[str, Sequence[str]] = {}
        self.snapshot = GpuSnapshot([])

    @property
    def on_cpu(self) -> bool:
        """True where there is no GPU to place anything on."""
        return not self.snapshot.gpus

    def __call__(
        self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim], /
    ) -> Assignment:
        """Decide for ``model``.

        Raises:
            DoesNotFitError: it fits nowhere that its policy allows, or will fit once a busy model is idle.
            LlamaGpuError: its file cannot be used.
        """
        beside = [resident for resident in residents if resident.model == model]
        if self.on_cpu and beside:
            raise DoesNotFitError(f"one more server of {model} needs a GPU of its own: there is none")
        if self.on_cpu and not self._config.gpu.serves_without_gpu:
            why = self.snapshot.error or "there is no GPU"
            raise DoesNotFitError(f"{model} may not run on the CPU (gpu.cpu_fallback: false): {why}")
        entry = self._entry(model)
        try:
            return self._decide(self._question(entry, residents, claims, beside))
        except LlamaGpuError:
            raise
        except Exception as error:  # a fault of ours must fail this model, not the scheduler
            raise ServerError(f"placing {model!r} failed: {error!r}", model=model) from error

    def _question(
        self,
        entry: ModelEntry,
        residents: Sequence[ResidentView],
        claims: Sequence[Claim],
        beside: Sequence[ResidentView],
    ) -> Question:
        settings, host, room = self._config.memory, self._host(), None
        if host is not None:
            limit = settings.host_limit_bytes
            room = HostRoom(
                host.total_bytes if limit is None else min(host.total_bytes, int(limit)),
                available_host_bytes(host, claims, limit),
                int(settings.host_headroom_bytes),
            )
        taken = {uuid for resident in beside for uuid in resident.bytes_by_gpu}
        allowed = [gpu for gpu in self._allowed_gpus() if gpu.uuid not in taken]
        claims = (*claims, *self._more_claims())
        return Question(
            entry,
            available_gpus(allowed, claims),
            residents,
            room,
            owed=overdrawn_bytes(allowed, claims),
            on_cpu=self.on_cpu,
            one_more=bool(beside),
        )

    def _decide(self, question: Question) -> Assignment:
        """The first rung of the ladder that holds, in the longest context that it holds in.

        A rung that will hold once busy models are idle is waited for, unless the model would rather
        give up more at once.
        """
        if planned := self._as_planned(question):
            return planned
        entry = question.entry
        may_wait = not (question.one_more or entry.options.degrade_at_once)
        for rung in self._ladder(question):
            options = question.options(rung.changes)
            if found := self._fitting.attempt(question, options, rung.cpu):
                return self._with_longest_context(question, rung, found)
            if may_wait and self._fitting.attempt(question.once_all_are_idle(), options, rung.cpu):
                raise DoesNotFitError(f"{entry.id} has room once a model that is busy now is idle")
        raise self._refusal(question)

    def _as_planned(self, question: Question) -> Assignment | None:
        """As configured on the GPUs that it was planned for; None where somebody would have to leave."""
        planned = self.planned.get(question.entry.id)
        if not planned or question.one_more or self.on_cpu:
            return None
        there = [gpu for gpu in question.gpus if gpu.uuid in planned]
        found = self._fitting.attempt(replace(question, gpus=there), question.options(), "never")
        return None if found is None or found.evict else found

    def _ladder(self, question: Question) -> Iterable[Rung]:
        """What the entry may give up, as far as it has any of it here."""
        entry = question.entry
        if question.one_more:
            return [Rung()]
        options = with_trained_length(entry, question.options())
        steps: list[Any] = [s if isinstance(s, str) else s.changes for s in entry.options.degrade]
        missing = set(ONLY_ON_GPUS) if self.on_cpu else set()
        if entry.mmproj is None:
            missing.add("mmproj_offload")
        if not has_experts(entry):
            missing.add("cpu_moe_layers")
        if self.on_cpu:
            steps = [step for step in steps if not isinstance(step, str)]
        kept = {name: value for name, value in options.items() if name not in missing}
        return ladder(
            kept,
            steps,
            cpu="never" if self.on_cpu else self._cpu_use(entry),
            allowed=lambda changes: self._llama_cpp_takes(question, changes),
        )

    def _llama_cpp_takes(self, question: Question, changes: Mapping[str, Any]) -> bool:
        entry = question.entry
        try:
            estimate(entry.header or entry.path, **estimate_options(question.options(changes)))
        except ValueError:
            return False
        return True

    def _cpu_use(self, entry: ModelEntry) -> CpuUse:
        use = entry.options.cpu or "never"
        return "partial" if use == "never" and entry.options.partial else use

    def _with_longest_context(self, question: Question, rung: Rung, found: Assignment) -> Assignment:
        shortest, entry = rung.shortest_context, question.entry
        if shortest is None or rung.cpu != "never":
            return found  # with layers on the CPU every context holds: the shortest keeps most of them off it
        configured: int = with_trained_length(entry, question.options())["context_length"]

        def attempt(context: int) -> Assignment | None:
            options = question.options({**rung.changes, "context_length": context})
            return self._fitting.attempt(question, options, rung.cpu)

        slots = 1 if entry.options.kv_unified else rung.changes.get("parallel", entry.options.parallel)
        return longest_context(shortest, configured, CONTEXT_STEP * slots, attempt, found)

    def _refusal(self, question: Question) -> DoesNotFitError:
        """By how much the entry falls short as it is configured, and with all that it may give up."""
        entry = question.entry
        before, first, tried = question.options(), None, list[str]()
        for rung in self._ladder(question):
            options = question.options(rung.changes)
            error = self._fitting.shortage(question, options, rung.cpu)
            if first is None:
                first = error
                continue
            steps = given_up(with_trained_length(entry, before), with_trained_length(entry, options))
            what = ", ".join(step.text for step in steps) or "layers on the CPU"
            short = (
                f"{in_words(error.short_by_bytes)} short" if error.short_by_bytes else "no split of it fits"
            )
            tried.append(f"{what} ({short})")
            before = options
        assert first is not None  # noqa: S101 - a ladder has a first rung
        return first.having_tried(tried)

    def _allowed_gpus(self) -> list[Gpu]:
        allowed = self._config.gpu.allowed
        return [
            gpu
            for gpu in self.snapshot.gpus
            if allowed is None or gpu.uuid in allowed or gpu.index in allowed
        ]


def limits_of(config: Config) -> Limits:
    """What the configuration asks of the scheduler as a whole."""
    pool = config.server_pool
    return Limits(
        pool_size=pool.size,
        queue_size=pool.queue_size,
        wait_seconds=pool.queue_timeout,
        starvation_seconds=pool.starvation_timeout,
    )


def rules_of(entry: ModelEntry, load_seconds: float | None = None) -> Rules:
    """What the entry's options ask of the scheduler; ``load_seconds`` is what an earlier load took."""
    options = entry.options
    return Rules(
        pinned=options.pinned,
        priority=options.priority,
        slots=options.parallel,
        replicas=options.replicas,
        max_replicas=options.most_replicas,
        min_resident_seconds=options.min_resident_seconds,
        idle_seconds_before_unload=options.ttl_seconds,
        load_seconds=load_seconds,
    )
