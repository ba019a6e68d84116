"""What is compared: how llama-gpu places models, and two simpler ways that others take.

``by-count`` is what llama-server's router does (``--models-max``: ``server_lru_sched`` in
tools/server/server-models.cpp), ``one-at-a-time`` what llama-swap does unless told otherwise. Both are given
our scheduler, which loads several models at once and lets nobody starve, and both may lay a model over all
GPUs as if they were one: what differs is who is resident.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from llama_gpu import Gpu, GpuSnapshot, estimate
from llama_gpu.budget import Claim
from llama_gpu.catalog import Catalog
from llama_gpu.config import Config
from llama_gpu.errors import DoesNotFitError
from llama_gpu.loading import memory_options
from llama_gpu.placing import Placing, limits_of, rules_of
from llama_gpu.residents import Assignment, ResidentView
from llama_gpu.rules import Limits, Rules
from llama_gpu.scheduler import Scheduler
from llama_gpu.simulation.load import Request
from llama_gpu.simulation.outcome import Outcome
from llama_gpu.simulation.servers import MemoryExceededError, Timing
from llama_gpu.simulation.simulator import Player, play

__all__ = ["BASELINES", "OURS", "Name", "Situation", "most_that_fit", "play_strategy"]

Name = Literal["single-gpu-preferred", "distribute", "pack", "by-count", "one-at-a-time"]
OURS: tuple[Name, ...] = ("single-gpu-preferred", "distribute", "pack")
BASELINES: tuple[Name, ...] = ("by-count", "one-at-a-time")
EVERYWHERE = "all GPUs"


@dataclass(frozen=True)
class Situation:
    """What every strategy is given; each GPU has its ``free_bytes``."""

    config: Config
    catalog: Catalog
    gpus: Sequence[Gpu]
    timing: Timing = field(default_factory=Timing)

    @cached_property
    def file_bytes(self) -> dict[str, int]:
        """The size of each model's files."""
        return {entry.id: entry.file_bytes for entry in self.catalog.models}

    @cached_property
    def model_bytes(self) -> dict[str, int]:
        """What each model takes on one GPU, were it large enough."""
        return {
            entry.id: estimate(
                entry.header or entry.path,
                mmproj=entry.mmproj,
                draft=entry.options.draft,
                gpu_layers=entry.options.gpu_layers,
                **memory_options(entry),
            ).total_device_bytes
            for entry in self.catalog.models
        }

    @property
    def usable_bytes(self) -> int:
        """What all GPUs have together, without the headroom."""
        headroom = self.config.gpu.headroom_on
        return sum(max(0, (gpu.free_bytes or 0) - headroom(gpu.index, gpu.uuid)) for gpu in self.gpus)


def play_strategy(name: Name, situation: Situation, load: Iterable[Request]) -> Outcome:
    """Play ``load``, which can be iterated several times, by one of ``OURS`` or ``BASELINES``."""
    if name == "by-count":
        return _best_count(situation, load)
    player = _swapping(situation) if name == "one-at-a-time" else _placing(name, situation)
    return play(load, player, name)


def _placing(name: Name, situation: Situation) -> Player:
    """llama-gpu as ``serve`` would be with this configuration, but for ``gpu.allocation_strategy``."""
    config = situation.config
    chosen = config.gpu.model_copy(update={"allocation_strategy": name, "gpu_allocation_strategy": None})
    placing = Placing(config.model_copy(update={"gpu": chosen}), situation.catalog.find)
    placing.snapshot = GpuSnapshot(situation.gpus)
    usual, rules = Rules(), {entry.id: rules_of(entry) for entry in situation.catalog.models}
    return Player(
        Scheduler(placing, limits_of(config), rules=lambda model: rules.get(model, usual)),
        {gpu.uuid: gpu.free_bytes or 0 for gpu in situation.gpus},
        situation.file_bytes,
        situation.timing,
        ticks=any(rule.idle_seconds_before_unload or rule.max_replicas > 1 for rule in rules.values()),
    )


def _counting(situation: Situation, count: int, limits: Limits) -> Player:
    everything = situation.usable_bytes
    rules = Rules(min_resident_seconds=0.0)
    scheduler = Scheduler(
        _AtMost(count, situation.model_bytes, everything), limits, rules=lambda _model: rules
    )
    return Player(scheduler, {EVERYWHERE: everything}, situation.file_bytes, situation.timing)


def _swapping(situation: Situation) -> Player:
    return _counting(situation, 1, replace(limits_of(situation.config), starvation_seconds=0.0))


def _best_count(situation: Situation, load: Iterable[Request]) -> Outcome:
    """The largest number that never exceeds the memory, which only who knows the load can choose."""
    count = most_that_fit(load, situation.model_bytes, situation.usable_bytes)
    while count > 1:
        try:
            return play(load, _counting(situation, count, limits_of(situation.config)), f"by-count ({count})")
        except MemoryExceededError:
            count -= 1  # a busy model stayed beyond its turn, and so others were resident than reckoned
    return play(load, _counting(situation, 1, limits_of(situation.config)), "by-count (1)")


class _AtMost:
    """A ``Placer`` that lets the longest idle leave once there are ``count``, wherever and however large."""

    def __init__(self, count: int, model_bytes: Mapping[str, int], everything: int) -> None:
        self._count = count
        self._model_bytes = model_bytes
        self._everything = everything

    def __call__(
        self, model: str, residents: Sequence[ResidentView], _claims: Sequence[Claim], /
    ) -> Assignment:
        needed = self._model_bytes.get(model, self._everything + 1)
        if needed > self._everything:
            raise DoesNotFitError(f"{model} is larger than all GPUs together")
        # Those that leave anyway cost nothing to reload.
        leavers = [view for view in residents if not view.busy]
        leavers.sort(key=lambda view: (view.reload_seconds != 0, -view.idle_seconds))
        excess = max(0, len(residents) + 1 - self._count)
        if excess > len(leavers):
            raise DoesNotFitError(f"{self._count} models are busy")
        evict = tuple(view.server for view in leavers[:excess])
        return Assignment("single", (EVERYWHERE,), (0,), {EVERYWHERE: needed}, evict=evict)


def most_that_fit(load: Iterable[Request], model_bytes: Mapping[str, int], everything: int) -> int:
    """How many of the models used last always fit together, over the whole load."""
    recent: OrderedDict[str, None] = OrderedDict()
    most = len(model_bytes)
    for request in load:
        model = request.model
        if model_bytes.get(model, everything + 1) > everything:
            continue  # it is refused, whatever else is resident
        recent[model] = None
        recent.move_to_end(model)
        total = 0
        for place, other in enumerate(reversed(recent)):
            total += model_bytes[other]
            if place >= most or total > everything:
                most = min(most, place)
                break
    return most
