"""Turns the scheduler's question "where does this model go?" into calls of ``lg.place``.

A model that fits nowhere as it is configured is asked for again with what its configuration lets it give
up (``degradation``). Without a GPU the host's memory alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_gpu import Gpu, GpuSnapshot, MemoryEstimate, Placement, Policy, Running, estimate, explain, place
from llama_gpu.budget import Claim, HostMemory, available_gpus, available_host_bytes, overdrawn_bytes
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.degradation import CONTEXT_STEP, CpuUse, GivenUp, Rung, given_up, ladder, longest_context
from llama_gpu.errors import DoesNotFitError, LlamaGpuError, ServerError
from llama_gpu.host_room import HostRoom, default_cache_ram_bytes, host_need, in_words
from llama_gpu.loading import estimate_options, has_experts, load_of, memory_options, with_trained_length
from llama_gpu.memory.known import KnownMemory, Load
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.rules import Limits, Rules
from llama_gpu.strategies import chosen_place, load_strategy

__all__ = ["Placing", "limits_of", "rules_of"]

GIB = 1 << 30
PLACING_ROUNDS = 4
"""How often a placement is asked again because what is known of it exceeds the estimate further."""

ONLY_ON_GPUS = ("cpu_moe_layers", "kv_offload", "mmproj_offload")


@dataclass(frozen=True)
class _Question:
    """Where may ``entry`` go, as things are: what every rung of its ladder is asked against."""

    entry: ModelEntry
    gpus: Sequence[Gpu]
    residents: Sequence[ResidentView]
    host: HostRoom | None
    owed: Mapping[str, int]
    one_more: bool = False
    """A server of it is there already: another one takes GPUs of its own, and gives nothing up."""

    @property
    def running(self) -> list[Running]:
        return [view.as_running(self.owed) for view in self.residents]

    def once_all_are_idle(self) -> _Question:
        """The same when everybody could leave who ever will."""
        priority = self.entry.options.priority
        idle = [
            view if view.stays else replace(view, busy=False, priority=min(view.priority, priority))
            for view in self.residents
        ]
        return replace(self, residents=idle)


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
        self._known = known
        self._more_claims = more_claims
        self._host = host
        self._strategy = load_strategy(config.gpu.strategy)
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
    ) -> _Question:
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
        return _Question(
            entry,
            available_gpus(allowed, claims),
            residents,
            room,
            owed=overdrawn_bytes(allowed, claims),
            one_more=bool(beside),
        )

    def _decide(self, question: _Question) -> Assignment:
        """The first rung of the ladder that holds, in the longest context that it holds in.

        A rung that will hold once busy models are idle is waited for, unless the model would rather
        give up more at once.
        """
        if planned := self._as_planned(question):
            return planned
        entry = question.entry
        all_idle = question.once_all_are_idle()
        waits = all_idle.residents != question.residents and not (
            question.one_more or entry.options.degrade_at_once
        )
        for rung in self._ladder(question):
            options = self._options(question, rung.changes)
            if found := self._attempt(question, options, rung.cpu):
                return self._with_longest_context(question, rung, found)
            if waits and self._attempt(all_idle, options, rung.cpu):
                raise DoesNotFitError(f"{entry.id} has room once a model that is busy now is idle")
        raise self._refusal(question)

    def _as_planned(self, question: _Question) -> Assignment | None:
        """As configured on the GPUs that it was planned for; None where somebody would have to leave."""
        planned = self.planned.get(question.entry.id)
        if not planned or question.one_more or self.on_cpu:
            return None
        there = [gpu for gpu in question.gpus if gpu.uuid in planned]
        found = self._attempt(replace(question, gpus=there), self._options(question), "never")
        return None if found is None or found.evict else found

    def _ladder(self, question: _Question) -> Iterable[Rung]:
        """What the entry may give up, as far as it has any of it here."""
        entry = question.entry
        if question.one_more:
            return [Rung()]
        options = with_trained_length(entry, self._options(question))
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

    def _llama_cpp_takes(self, question: _Question, changes: Mapping[str, Any]) -> bool:
        entry = question.entry
        try:
            estimate(entry.header or entry.path, **estimate_options(self._options(question, changes)))
        except ValueError:
            return False
        return True

    def _cpu_use(self, entry: ModelEntry) -> CpuUse:
        use = entry.options.cpu or "never"
        return "partial" if use == "never" and entry.options.partial else use

    def _with_longest_context(self, question: _Question, rung: Rung, found: Assignment) -> Assignment:
        shortest, entry = rung.shortest_context, question.entry
        if shortest is None or rung.cpu != "never":
            return found  # with layers on the CPU every context holds: the shortest keeps most of them off it
        configured: int = with_trained_length(entry, self._options(question))["context_length"]

        def attempt(context: int) -> Assignment | None:
            options = self._options(question, {**rung.changes, "context_length": context})
            return self._attempt(question, options, rung.cpu)

        slots = 1 if entry.options.kv_unified else rung.changes.get("parallel", entry.options.parallel)
        return longest_context(shortest, configured, CONTEXT_STEP * slots, attempt, found)

    def _attempt(self, question: _Question, options: Mapping[str, Any], cpu: CpuUse) -> Assignment | None:
        """Where the entry goes with these options; None where it fits nowhere."""
        found = self._on_host(question, options) if self.on_cpu else self._on_gpus(question, options, cpu)
        if found is None or question.host is None:
            return found
        leavers = question.host.leavers(found.host_bytes, question.residents, first=found.evict)
        if leavers is None:
            return None
        return replace(found, evict=leavers) if leavers != found.evict else found

    def _on_host(self, question: _Question, options: Mapping[str, Any]) -> Assignment:
        """All of it on the CPU of a machine that has no GPU."""
        entry = question.entry
        try:
            said = estimate(
                entry.header or entry.path,
                mmproj=entry.mmproj,
                draft=entry.options.draft,
                devices=0,
                **estimate_options(options),
            )
        except (LlamaGpuError, OSError, ValueError):  # llama.cpp may take what cannot be estimated
            said = None
        known = self._best(load_of(entry, options), said, ()) if said and entry.header else None
        need = host_need(entry, options, said, known)
        return Assignment(
            "cpu",
            reason="on the CPU",
            estimate=said,
            options={**options, "context_checkpoints": need.context_checkpoints},
            degraded=self._given_up(question, options),
            host_bytes=need.total_bytes,
        )

    def _on_gpus(self, question: _Question, options: Mapping[str, Any], cpu: CpuUse) -> Assignment | None:
        entry = question.entry
        placement, best = self._place(question, options)
        layers = sum(device.layers for device in placement.estimate.devices) + placement.estimate.host.layers
        wanted = layers if entry.options.gpu_layers is None else min(entry.options.gpu_layers, layers)
        on_cpu = wanted - placement.gpu_layers
        if on_cpu and (cpu == "never" or (cpu == "partial" and not placement.gpu_layers)):
            return None
        degraded = self._given_up(question, options, on_cpu, wanted)
        found = _assignment(placement, best)
        told = f"; given up: {', '.join(one.text for one in degraded)}" if degraded else ""
        need = host_need(entry, options, placement.estimate, best)
        return replace(
            found,
            reason=found.reason + told,
            options={**options, "context_checkpoints": need.context_checkpoints},
            degraded=degraded,
            host_bytes=need.total_bytes,
        )

    def _place(
        self, question: _Question, options: Mapping[str, Any], cpu: CpuUse = "allow"
    ) -> tuple[Placement, MemoryEstimate]:
        """Place by the estimate, kept as far from the edge as the load is known to exceed it.

        ``place`` reckons with the analytic estimate. What is known to be taken beyond it on any device
        is left free there as headroom, and what is known to be taken less is given up of the headroom;
        then the claim is what is known of exactly this layout. Where that exceeds what was
        left, the same is done again with more.

        Raises:
            DoesNotFitError: never with ``cpu`` "allow", which makes a refusal cheap to ask about.
        """
        entry, gpus = question.entry, question.gpus
        load = load_of(entry, options) if entry.header and self._known else None
        excess = 0
        if self._known and load:
            excess = self._known.most_excess_bytes(load, gpus) or 0
        for _ in range(PLACING_ROUNDS):
            asked: dict[str, Any] = {
                "model": entry.header or entry.path,
                "gpus": gpus,
                "policy": self._policy(entry, excess, cpu),
                "running": question.running,
                "mmproj": entry.mmproj,
                "draft": entry.options.draft,
                "gpu_layers": entry.options.gpu_layers,
                **estimate_options(options),
            }
            if self._strategy is not None:
                name = self._config.gpu.strategy
                chosen = chosen_place(self._strategy, name, entry.id, explain(**asked))
                asked["policy"] = self._policy(entry, excess, cpu, only=chosen)
            placement = place(**asked)
            best = self._best(load, placement.estimate, _placed_on(placement, gpus)) or placement.estimate
            exceeds = max(
                (
                    now.total_bytes - said.total_bytes
                    for now, said in zip(best.devices, placement.estimate.devices, strict=True)
                ),
                default=excess,
            )
            if exceeds <= excess:
                break
            excess = exceeds
        return placement, best

    def _refusal(self, question: _Question) -> DoesNotFitError:
        """By how much the entry falls short as it is configured, and with all that it may give up."""
        entry = question.entry
        before, first, tried = self._options(question), None, list[str]()
        for rung in self._ladder(question):
            options = self._options(question, rung.changes)
            error = self._shortage(question, options, rung.cpu)
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

    def _shortage(self, question: _Question, options: Mapping[str, Any], cpu: CpuUse) -> DoesNotFitError:
        if self.on_cpu:
            found: Assignment | None = self._on_host(question, options)
        else:
            try:
                self._place(question, options, cpu)
            except DoesNotFitError as error:
                return error
            found = self._on_gpus(question, options, cpu)
        if found is None or question.host is None:  # the policy and the attempt disagree
            return DoesNotFitError(f"{question.entry.id} fits nowhere that its policy allows")
        return question.host.refusal(question.entry.id, found.host_bytes, question.residents)

    def _best(self, load: Load | None, said: MemoryEstimate, placed: Sequence[Gpu]) -> MemoryEstimate | None:
        if self._known is None or load is None:
            return None
        case = self._known.case(load, said, placed)
        record = None if case is None else self._known.find(case)
        return None if record is None else record.best

    def _allowed_gpus(self) -> list[Gpu]:
        allowed = self._config.gpu.allowed
        return [
            gpu
            for gpu in self.snapshot.gpus
            if allowed is None or gpu.uuid in allowed or gpu.index in allowed
        ]

    def _policy(
        self, entry: ModelEntry, excess_bytes: int, cpu: CpuUse, *, only: Sequence[str] | None = None
    ) -> Policy:
        """The entry's policy, with so much more headroom; ``only``: on these GPUs."""
        options = entry.options
        return Policy(
            strategy=self._config.gpu.built_in_strategy,
            **self._config.gpu.headroom(excess_bytes),
            max_gpus=options.max_gpus,
            allowed=options.gpus if only is None else only,
            cpu=cpu,
            priority=options.priority,
        )

    def _options(self, question: _Question, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything about memory that the server is started with."""
        entry, room = question.entry, question.host
        cache = (changes or {}).get("cache_ram_bytes", entry.options.cache_ram_bytes)
        if cache is None:
            cache = default_cache_ram_bytes(None if room is None else room.total_bytes)
        return {**memory_options(entry, changes), "cache_ram_bytes": int(cache)}

    def _given_up(
        self, question: _Question, options: Mapping[str, Any], cpu_layers: int = 0, all_layers: int = 0
    ) -> tuple[GivenUp, ...]:
        entry = question.entry
        configured = with_trained_length(entry, self._options(question))
        return given_up(configured, with_trained_length(entry, options), cpu_layers, all_layers)


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


def _placed_on(placement: Placement, gpus: Sequence[Gpu]) -> list[Gpu]:
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    return [by_uuid[device.uuid] for device in placement.devices]


def _assignment(placement: Placement, best: MemoryEstimate) -> Assignment:
    devices = placement.devices
    known = best is not placement.estimate and devices
    sizes = [memory.total_bytes for memory in best.devices] if known else [d.total_bytes for d in devices]
    told = f"; {best.basis}: {' + '.join(f'{size / GIB:.2f}' for size in sizes)} GiB" if known else ""
    return Assignment(
        mode=placement.mode,
        gpu_uuids=tuple(device.uuid for device in devices),
        gpu_indices=tuple(device.index for device in devices),
        bytes_by_gpu={device.uuid: size for device, size in zip(devices, sizes, strict=True)},
        layers=tuple(device.layers for device in devices),
        gpu_layers=placement.gpu_layers,
        tensor_split=tuple(placement.tensor_split) if placement.tensor_split else None,
        evict=tuple(placement.evict),
        reason=placement.reason + told,
        estimate=placement.estimate,
    )
