"""Where a model goes with one set of options, if it fits: on GPUs as ``lg.place`` says, or on the CPU alone.

The host's memory has to hold its part either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_gpu import Gpu, MemoryEstimate, Placement, Policy, Running, estimate, explain, place
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.degradation import CpuUse, GivenUp, given_up
from llama_gpu.errors import DoesNotFitError, LlamaGpuError
from llama_gpu.host_room import HostRoom, default_cache_ram_bytes, host_need
from llama_gpu.loading import (
    estimate_options,
    load_of,
    memory_options,
    output_options,
    with_trained_length,
)
from llama_gpu.memory.known import KnownMemory, Load
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.strategies import chosen_place, load_strategy

__all__ = ["Fitting", "Question"]

GIB = 1 << 30
PLACING_ROUNDS = 4
"""How often a placement is asked again because what is known of it exceeds the estimate further."""


@dataclass(frozen=True)
class Question:
    """Where may ``entry`` go, as things are: what every rung of its ladder is asked against."""

    entry: ModelEntry
    gpus: Sequence[Gpu]
    residents: Sequence[ResidentView]
    host: HostRoom | None
    owed: Mapping[str, int]
    on_cpu: bool = False
    """There is no GPU at all."""
    one_more: bool = False
    """A server of it is there already: another one takes GPUs of its own, and gives nothing up."""

    @property
    def running(self) -> list[Running]:
        """The residents as ``place`` wants them."""
        return [view.as_running(self.owed) for view in self.residents]

    def once_all_are_idle(self) -> Question:
        """The same when everybody could leave who ever will."""
        priority = self.entry.options.priority
        idle = [
            view if view.stays else replace(view, busy=False, priority=min(view.priority, priority))
            for view in self.residents
        ]
        return replace(self, residents=idle)

    def options(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything about memory that the server is started with."""
        cache = (changes or {}).get("cache_ram_bytes", self.entry.options.cache_ram_bytes)
        if cache is None:
            cache = default_cache_ram_bytes(None if self.host is None else self.host.total_bytes)
        return {**memory_options(self.entry, changes), "cache_ram_bytes": int(cache)}

    def given_up(
        self, options: Mapping[str, Any], cpu_layers: int = 0, all_layers: int = 0
    ) -> tuple[GivenUp, ...]:
        """What a server with these options does without, and with so many layers on the CPU unasked."""
        configured = with_trained_length(self.entry, self.options())
        return given_up(configured, with_trained_length(self.entry, options), cpu_layers, all_layers)


class Fitting:
    """Answers for one set of options after the other. ``known``: what loads took and llama.cpp projected.

    Raises:
        ConfigError: ``gpu.allocation_strategy`` names none that can be loaded.
    """

    def __init__(self, config: Config, known: KnownMemory | None) -> None:
        self._config = config
        self._known = known
        self._strategy = load_strategy(config.gpu.strategy)

    def attempt(self, question: Question, options: Mapping[str, Any], cpu: CpuUse) -> Assignment | None:
        """Where the entry goes with these options; None where it fits nowhere."""
        found = self._on_host(question, options) if question.on_cpu else self._on_gpus(question, options, cpu)
        if found is None or question.host is None:
            return found
        leavers = question.host.leavers(found.host_bytes, question.residents, first=found.evict)
        if leavers is None:
            return None
        return replace(found, evict=leavers) if leavers != found.evict else found

    def shortage(self, question: Question, options: Mapping[str, Any], cpu: CpuUse) -> DoesNotFitError:
        """By how much the entry does not fit with options that ``attempt`` found no place for."""
        if question.on_cpu:
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

    def _on_host(self, question: Question, options: Mapping[str, Any]) -> Assignment:
        """All of it on the CPU of a machine that has no GPU."""
        entry = question.entry
        try:
            said = estimate(
                entry.header or entry.path,
                mmproj=entry.mmproj,
                draft=entry.options.draft,
                devices=0,
                **estimate_options(options),
                **output_options(self._known, entry, options),
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
            degraded=question.given_up(options),
            host_bytes=need.total_bytes,
        )

    def _on_gpus(self, question: Question, options: Mapping[str, Any], cpu: CpuUse) -> Assignment | None:
        entry = question.entry
        placement, best = self._place(question, options)
        layers = sum(device.layers for device in placement.estimate.devices) + placement.estimate.host.layers
        wanted = layers if entry.options.gpu_layers is None else min(entry.options.gpu_layers, layers)
        on_cpu = wanted - placement.gpu_layers
        if on_cpu and (cpu == "never" or (cpu == "partial" and not placement.gpu_layers)):
            return None
        degraded = question.given_up(options, on_cpu, wanted)
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
        self, question: Question, options: Mapping[str, Any], cpu: CpuUse = "allow"
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
                **output_options(self._known, entry, options),
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

    def _best(self, load: Load | None, said: MemoryEstimate, placed: Sequence[Gpu]) -> MemoryEstimate | None:
        if self._known is None or load is None:
            return None
        case = self._known.case(load, said, placed)
        record = None if case is None else self._known.find(case)
        return None if record is None else record.best

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
