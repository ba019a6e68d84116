"""Which models can be resident together, and where: ``lg.plan`` over what is configured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_gpu import Gpu, Policy, Wanted, estimate, plan
from llama_gpu.catalog import ModelEntry
from llama_gpu.config import Config
from llama_gpu.errors import DoesNotFitError, LlamaGpuError
from llama_gpu.loading import estimate_options, memory_options, output_options
from llama_gpu.memory.known import KnownMemory

__all__ = ["Together", "plan_together"]


@dataclass(frozen=True)
class Together:
    """``places``: GPU UUIDs by model. ``left_out``: why each other model has no place, in words."""

    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why the pinned models cannot all be resident; None where they can."""


def plan_together(
    config: Config, entries: Iterable[ModelEntry], gpus: Sequence[Gpu], known: KnownMemory | None = None
) -> Together:
    """The models that are worth the most together.

    Pinned ones come first, then those of higher priority, and then as many as can be. Models that have no
    layer on a GPU, or whose memory cannot be estimated, are left out.
    """
    wanted = [entry for entry in entries if entry.options.gpu_layers != 0 and _can_be_estimated(entry)]
    if not gpus or not wanted:
        return Together()
    policy = Policy(
        strategy=config.gpu.built_in_strategy,
        allowed=config.gpu.allowed,
        **config.gpu.headroom(),
    )
    try:
        pinned = [_wanted(entry, known, pinned=_needs_gpus(entry)) for entry in wanted]
        found = plan(pinned, gpus, policy=policy)
        problem = None
    except DoesNotFitError as error:
        # Even so most of them may have a place: those of the highest priority do.
        found = plan([_wanted(entry, known, pinned=False) for entry in wanted], gpus, policy=policy)
        problem = str(error)
    places = {
        model: tuple(device.uuid for device in placement.devices)
        for model, placement in found.placements.items()
    }
    return Together(places, found.left_out, problem)


def _can_be_estimated(entry: ModelEntry) -> bool:
    if entry.header is None:
        return False
    try:
        estimate(
            entry.header,
            mmproj=entry.mmproj,
            draft=entry.options.draft,
            **estimate_options(memory_options(entry)),
        )
    except (LlamaGpuError, OSError, ValueError):
        return False
    return True


def _needs_gpus(entry: ModelEntry) -> bool:
    return entry.options.pinned and entry.options.cpu in {None, "never"} and not entry.options.partial


def _wanted(entry: ModelEntry, known: KnownMemory | None, *, pinned: bool) -> Wanted:
    options, chosen = entry.options, memory_options(entry)
    assert entry.header is not None  # noqa: S101 - the others are not asked for
    # Where not all pinned ones have room, they still come before all others.
    return Wanted(
        entry.header,
        id=entry.id,
        priority=options.priority,
        value=1.0 if pinned or not options.pinned else 1000.0,
        pinned=pinned,
        allowed=options.gpus,
        max_gpus=options.max_gpus,
        mmproj=entry.mmproj,
        draft=options.draft,
        gpu_layers=options.gpu_layers,
        **estimate_options(chosen),
        **output_options(known, entry, chosen),
    )
