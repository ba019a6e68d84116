"""What servers take of the host's memory, and who leaves when that is short. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_gpu import MemoryEstimate
from llama_gpu.catalog import ModelEntry
from llama_gpu.errors import DoesNotFitError
from llama_gpu.launch import DEFAULT_CACHE_RAM_BYTES, host_caches
from llama_gpu.residents import ResidentView

__all__ = ["HostNeed", "HostRoom", "default_cache_ram_bytes", "host_need", "in_words"]

MIB = 1 << 20

HOST = "host"
"""The host's name among the GPUs of an error, as in the core's ledger."""

CACHE_SHARE = 16
"""A prompt cache gets this part of a host's memory at most, unless its size is configured."""

MOST_CHECKPOINTS = 32  # llama.cpp's own default (common/common.h n_ctx_checkpoints)
FEWEST_CHECKPOINTS = 2
CHECKPOINT_BYTES = 1 << 30
"""All checkpoints of one server together, where more than the fewest are kept."""


@dataclass(frozen=True)
class HostNeed:
    """What one server takes: ``total_bytes`` of host memory, with so many checkpoints a slot."""

    total_bytes: int
    context_checkpoints: int | None


def default_cache_ram_bytes(host_total_bytes: int | None) -> int:
    """The prompt cache of a model that names no size for it."""
    if host_total_bytes is None:
        return DEFAULT_CACHE_RAM_BYTES
    return min(DEFAULT_CACHE_RAM_BYTES, host_total_bytes // CACHE_SHARE)


def host_need(
    entry: ModelEntry,
    options: Mapping[str, Any],
    said: MemoryEstimate | None,
    known: MemoryEstimate | None = None,
) -> HostNeed:
    """Weights, caches and buffers on the host, mapped ones included, the prompt cache and the checkpoints.

    ``said`` is the analytic estimate, None for a file that cannot be estimated: that takes its size.
    ``known`` is better knowledge of the same load.
    """
    if said is None:
        held, checkpoint = entry.file_bytes, 0
    else:
        # llama.cpp logs no buffer of a projector, so that what was measured lacks it.
        sizes = [estimate.host.total_bytes for estimate in (known, said) if estimate is not None]
        held = max(sizes) if entry.mmproj else sizes[0]
        checkpoint = said.checkpoint_bytes
    slots: int = options["parallel"]
    kept = None
    if checkpoint:
        kept = min(max(CHECKPOINT_BYTES // (checkpoint * slots), FEWEST_CHECKPOINTS), MOST_CHECKPOINTS)
    cache, held_checkpoints = host_caches(options["cache_ram_bytes"], kept, entry.options.extra_arguments)
    return HostNeed(held + cache + (held_checkpoints or 0) * slots * checkpoint, kept)


@dataclass(frozen=True)
class HostRoom:
    """The host's memory as a decision sees it: all of it, what may be claimed, what stays free.

    ``available_bytes`` is negative where more was promised than there is.
    """

    total_bytes: int
    available_bytes: int
    headroom_bytes: int

    def leavers(
        self, need_bytes: int, residents: Sequence[ResidentView], first: Sequence[str] = ()
    ) -> tuple[str, ...] | None:
        """Who leaves so that a newcomer has its bytes, the cheapest first; None if that does not help.

        ``first`` leave anyway.
        """
        freed = {view.server: view.host_bytes for view in residents}
        short = need_bytes + self.headroom_bytes - self.available_bytes - sum(freed[name] for name in first)
        may_leave = [v for v in residents if not v.busy and v.host_bytes and v.server not in first]
        chosen: list[str] = []
        for view in sorted(may_leave, key=lambda view: view.as_running().eviction_cost):
            if short <= 0:
                break
            chosen.append(view.server)
            short -= view.host_bytes
        if short > 0:
            return None
        for server in reversed(chosen):  # who came in early may be spared now that a larger one leaves
            if short + freed[server] <= 0:
                chosen.remove(server)
                short += freed[server]
        return (*first, *chosen)

    def refusal(self, model: str, need_bytes: int, residents: Sequence[ResidentView]) -> DoesNotFitError:
        """By how much the host is too small, once everybody has left who may."""
        leaving = sum(view.host_bytes for view in residents if not view.busy)
        left = max(0, self.available_bytes + leaving - self.headroom_bytes)
        short = need_bytes - left
        once = " once all idle models have left" if leaving else ""
        return DoesNotFitError(
            f"{model} needs {in_words(need_bytes)} of host memory, {in_words(short)} more than there is: "
            f"{in_words(left)} of {in_words(self.total_bytes)} can be had{once}, "
            f"{in_words(self.headroom_bytes)} stay free (memory.host_headroom_bytes)",
            required_bytes=need_bytes,
            free_bytes_by_gpu={HOST: left},
            short_by_bytes=short,
        )


def in_words(size_bytes: int) -> str:
    """``5.2 GiB``, ``640 MiB``."""
    mib = size_bytes / MIB
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"  # noqa: PLR2004
