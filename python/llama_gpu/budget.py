"""What every GPU, and the host, has left: ``total - reserved - others' use - our claims``.

Pure arithmetic over one snapshot and the claims of our own servers. A claim counts from the
decision to load until the memory has come back, so a GPU is never promised twice, whatever
the driver happens to show in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_gpu import Gpu

__all__ = [
    "Claim",
    "HostMemory",
    "HostUse",
    "available_gpus",
    "available_host_bytes",
    "held_by_ours",
    "is_back",
    "overdrawn_bytes",
]

BACK_FRACTION = 0.75
"""What share of a claim must be free again, where the driver tells no processes: claims are estimates."""


@dataclass(frozen=True)
class Claim:
    """Memory promised to one server.

    ``bytes_by_gpu`` maps GPU UUIDs to bytes: the estimate while the server loads, the measured
    amount once it is ready. ``pid`` is the server's process, None before it has one;
    ``settled`` is True once the server is ready and holds what it will hold. ``awaited`` says that its
    server leaves and that its memory is promised to another, whose claim counts already. ``host_bytes`` is
    promised of the host's memory, mapped weights included, to the server of this id.
    """

    bytes_by_gpu: Mapping[str, int] = field(default_factory=dict)
    pid: int | None = None
    settled: bool = False
    awaited: bool = False
    host_bytes: int = 0
    server: str = ""


@dataclass(frozen=True)
class HostUse:
    """What one server holds of the host's memory now: all of it, and what nobody else can have."""

    resident_bytes: int = 0
    private_bytes: int = 0


@dataclass(frozen=True)
class HostMemory:
    """The host's memory; ``available_bytes`` can be had without swapping.

    Both are those of the container where that has less. ``used_by`` has what our servers hold, by id.
    """

    total_bytes: int
    available_bytes: int
    used_by: Mapping[str, HostUse] = field(default_factory=dict)


def available_gpus(gpus: Sequence[Gpu], claims: Iterable[Claim]) -> list[Gpu]:
    """Each GPU with ``free_bytes`` set to what may still be claimed (bytes; None stays None)."""
    claims = list(claims)
    return [gpu.replace(free_bytes=_available_bytes(gpu, claims)) for gpu in gpus]


def overdrawn_bytes(gpus: Sequence[Gpu], claims: Iterable[Claim]) -> dict[str, int]:
    """By UUID, what was promised beyond what there is: others took it since.

    So much of what comes back there is for nobody new.
    """
    claims = list(claims)
    missing = {gpu.uuid: -(_left_bytes(gpu, claims, but_awaited=True) or 0) for gpu in gpus}
    return {uuid: size for uuid, size in missing.items() if size > 0}


def _available_bytes(gpu: Gpu, claims: Sequence[Claim]) -> int | None:
    left = _left_bytes(gpu, claims)
    return gpu.free_bytes if left is None else max(0, left)


def _left_bytes(gpu: Gpu, claims: Sequence[Claim], *, but_awaited: bool = False) -> int | None:
    """What all claims leave, less than nothing if need be; None where that is not known."""
    if gpu.free_bytes is None or gpu.total_bytes is None:
        return None
    here = [claim for claim in claims if gpu.uuid in claim.bytes_by_gpu]
    claimed = sum(claim.bytes_by_gpu[gpu.uuid] for claim in here if not (but_awaited and claim.awaited))
    # What NVML shows as free lacks the driver's reserve and everybody's use, ours included:
    # give back what ours hold now, then take the whole claims away.
    free_without_ours = min(gpu.free_bytes + held_by_ours(gpu, claims), gpu.total_bytes)
    return free_without_ours - claimed


def held_by_ours(gpu: Gpu, claims: Sequence[Claim]) -> int:
    """Bytes of this GPU that our servers hold at the time of the snapshot."""
    here = [claim for claim in claims if gpu.uuid in claim.bytes_by_gpu]
    told = {process.pid: process.used_bytes for process in gpu.processes or ()}
    held = 0
    for claim in here:
        known = None if claim.pid is None else told.get(claim.pid)
        if known is not None:
            held += known
        elif claim.settled:
            # The driver does not tell per process, or knows other process ids than we (in a
            # container): a settled server holds its claim. One that still loads counts as
            # somebody else's until it settles, which errs on the safe side.
            held += claim.bytes_by_gpu[gpu.uuid]
    return min(held, gpu.used_bytes or 0)


def is_back(claim: Claim, before: Sequence[Gpu], now: Sequence[Gpu]) -> bool:
    """Whether a server that has ended gave its memory back, as far as a driver tells.

    ``before`` is a snapshot from before its end, ``now`` one from after it; ``settled`` says that it
    was ready and held what it claimed.
    """
    earlier = {gpu.uuid: gpu for gpu in before}
    return all(
        _is_back_on(gpu, earlier.get(gpu.uuid), claim) for gpu in now if gpu.uuid in claim.bytes_by_gpu
    )


def _is_back_on(gpu: Gpu, before: Gpu | None, claim: Claim) -> bool:
    if _lists(gpu, claim.pid):
        return False
    if before is None or gpu.used_bytes is None or before.used_bytes is None:
        return True  # there is nothing to compare
    if _lists(before, claim.pid) or before.processes == () or not claim.settled:
        return True  # the driver knew it and knows it no more, or never showed what it held
    gone = round(claim.bytes_by_gpu[gpu.uuid] * BACK_FRACTION)
    return gpu.used_bytes <= max(0, before.used_bytes - gone)


def _lists(gpu: Gpu, pid: int | None) -> bool:
    return pid is not None and any(process.pid == pid for process in gpu.processes or ())


def available_host_bytes(host: HostMemory, claims: Iterable[Claim], limit_bytes: int | None = None) -> int:
    """What may still be claimed of the host's memory, in bytes.

    Less than nothing is what was promised beyond what there is: so much of what comes back is for nobody
    new. ``limit_bytes`` is the most that all claims together may come to.
    """
    claims = list(claims)
    left = _left_on_host(host, claims, limit_bytes, but_awaited=False)
    return left if left >= 0 else min(0, _left_on_host(host, claims, limit_bytes, but_awaited=True))


def _left_on_host(
    host: HostMemory, claims: Sequence[Claim], limit_bytes: int | None, *, but_awaited: bool
) -> int:
    # Weights that are mapped from a file can be dropped by the kernel at any time, so they still count
    # as available once they are loaded: only whole claims keep them from being promised again.
    held = {claim.server: host.used_by.get(claim.server, HostUse()).private_bytes for claim in claims}
    counted = [claim for claim in claims if not (but_awaited and claim.awaited)]
    claimed = sum(max(claim.host_bytes, held[claim.server]) for claim in counted)
    left = min(host.available_bytes + sum(held.values()), host.total_bytes) - claimed
    return left if limit_bytes is None else min(left, limit_bytes - claimed)
