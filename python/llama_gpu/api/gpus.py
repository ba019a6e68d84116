"""The GPUs as ``/health`` and ``/api/gpus`` tell them, from the last snapshot.

Sizes are GiB as floats because the health contract says so; each has a sibling in bytes.
Unknown is null, never -1 or 0.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from llama_gpu import Gpu
from llama_gpu.budget import Claim, available_gpus, available_host_bytes, held_by_ours
from llama_gpu.events import gpu_state
from llama_gpu.residents import Resident
from llama_gpu.supervisor import Supervisor

__all__ = ["GpuHealth", "GpuPoolStatus", "Gpus", "HostHealth", "gib", "gpus", "host_health", "pool_status"]

GIB = 1 << 30

NonNegative = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
GpuIndex = Annotated[int, Field(ge=0)]


class GpuHealth(BaseModel):
    """One GPU; ``id`` is its NVML index. ``available``: what may still be claimed, after our promises."""

    id: GpuIndex
    uuid: str
    name: str | None
    total_memory: NonNegative | None
    total_memory_bytes: Bytes | None
    free_memory: NonNegative | None
    free_memory_bytes: Bytes | None
    used_memory: NonNegative | None
    used_memory_bytes: Bytes | None
    available_memory_bytes: Bytes | None
    ours_memory_bytes: Bytes | None
    others_memory_bytes: Bytes | None
    reserved_memory_bytes: Bytes | None
    utilization: Annotated[float, Field(ge=0, le=100)] | None
    temperature: float | None
    power_usage: float | None
    compute_capability: str | None
    assigned_models: list[str]
    state: Literal["available", "assigned", "error"]
    health: Literal["ok", "degraded", "lost"]
    health_reason: str | None
    age_seconds: NonNegative | None

    @model_validator(mode="after")
    def _parts_within_the_whole(self) -> Self:
        if self.total_memory_bytes is not None:
            parts = (self.free_memory_bytes, self.used_memory_bytes, self.available_memory_bytes)
            if any(part is not None and part > self.total_memory_bytes for part in parts):
                raise ValueError(f"GPU {self.id} has more free, used or available memory than memory")
        return self


class GpuPoolStatus(BaseModel):
    """All GPUs together. ``reason`` says why there is none, else null."""

    total_gpus: Count
    available_gpus: Count
    total_vram: NonNegative
    total_vram_bytes: Bytes
    available_vram: NonNegative
    available_vram_bytes: Bytes
    allocation_strategy: str
    gpu_list: list[GpuHealth]
    reason: str | None

    @model_validator(mode="after")
    def _available_within_total(self) -> Self:
        if self.available_gpus > self.total_gpus or self.available_vram_bytes > self.total_vram_bytes:
            raise ValueError("more is available than there is")
        return self


class HostHealth(BaseModel):
    """The host's memory, or the container's. ``available``: what may still be claimed, after our promises.

    ``ours``: what our servers hold of it, mapped weights included, which still count as available to others.
    """

    total_memory: NonNegative
    total_memory_bytes: Bytes
    available_memory: NonNegative
    available_memory_bytes: Bytes
    ours_memory: NonNegative
    ours_memory_bytes: Bytes


class Gpus(BaseModel):
    """What ``/api/gpus`` answers. ``host`` is null where the host's memory cannot be read."""

    gpus: list[GpuHealth]
    host: HostHealth | None
    driver_version: str | None
    error: str | None
    snapshot_age_seconds: NonNegative


def gib(amount: int | None) -> float | None:
    """Bytes as the contract wants them; None stays None."""
    return None if amount is None else amount / GIB


def gpus(supervisor: Supervisor) -> Gpus:
    """Every GPU of the last snapshot; never waits for the driver."""
    return Gpus(
        gpus=listed_gpus(supervisor),
        host=host_health(supervisor),
        driver_version=supervisor.snapshot.driver_version,
        error=supervisor.snapshot.error,
        snapshot_age_seconds=supervisor.monitor.age_seconds,
    )


def host_health(supervisor: Supervisor) -> HostHealth | None:
    """The host's memory when it was last looked at, less what our servers have been promised of it."""
    host, residents = supervisor.host, supervisor.scheduler.residents.values()
    if host is None:
        return None
    claims, limit = [resident.claim for resident in residents], supervisor.config.memory.host_limit_bytes
    available = max(0, available_host_bytes(host, claims, limit))
    ours = sum(use.resident_bytes for use in host.used_by.values())
    return HostHealth(
        total_memory=host.total_bytes / GIB,
        total_memory_bytes=host.total_bytes,
        available_memory=available / GIB,
        available_memory_bytes=available,
        ours_memory=ours / GIB,
        ours_memory_bytes=ours,
    )


def pool_status(supervisor: Supervisor) -> GpuPoolStatus:
    """The sums over all GPUs; only those that answer count as available."""
    listed = listed_gpus(supervisor)
    usable = [gpu for gpu in listed if gpu.health != "lost"]
    total = sum(gpu.total_memory_bytes or 0 for gpu in listed)
    available = sum(gpu.available_memory_bytes or 0 for gpu in usable if gpu.total_memory_bytes)
    return GpuPoolStatus(
        total_gpus=len(listed),
        available_gpus=sum(1 for gpu in usable if gpu.health == "ok" and gpu.available_memory_bytes),
        total_vram=total / GIB,
        total_vram_bytes=total,
        available_vram=available / GIB,
        available_vram_bytes=available,
        allocation_strategy=supervisor.config.gpu.strategy,
        gpu_list=listed,
        reason=supervisor.why_no_gpu if not listed else None,
    )


def listed_gpus(supervisor: Supervisor) -> list[GpuHealth]:
    """Each GPU with its share of our claims and its age."""
    residents = list(supervisor.scheduler.residents.values())
    claims = [resident.claim for resident in residents]
    known = supervisor.snapshot.gpus
    ages = supervisor.monitor.ages
    return [
        _gpu(gpu, after.free_bytes, residents, claims, ages.get(gpu.uuid))
        for gpu, after in zip(known, available_gpus(known, claims), strict=True)
    ]


def _gpu(
    gpu: Gpu, available: int | None, residents: list[Resident], claims: list[Claim], age: float | None
) -> GpuHealth:
    capability, total = gpu.compute_capability, gpu.total_bytes
    # A figure beyond the whole is a driver's slip: it is not known, rather than wrong.
    used = gpu.used_bytes if _possible(gpu.used_bytes, total) else None
    free = gpu.free_bytes if _possible(gpu.free_bytes, total) else None
    ours = None if used is None else min(held_by_ours(gpu, claims), used)
    return GpuHealth(
        id=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        total_memory=gib(total),
        total_memory_bytes=total,
        free_memory=gib(free),
        free_memory_bytes=free,
        used_memory=gib(used),
        used_memory_bytes=used,
        available_memory_bytes=available if _possible(available, total) else None,
        ours_memory_bytes=ours,
        others_memory_bytes=None if used is None or ours is None else used - ours,
        reserved_memory_bytes=gpu.reserved_bytes,
        utilization=gpu.utilization,
        temperature=gpu.temperature,
        power_usage=gpu.power_watts,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        assigned_models=[r.model for r in residents if gpu.uuid in r.assignment.bytes_by_gpu],
        state=gpu_state(gpu, residents),
        health=gpu.health,
        health_reason=gpu.health_reason,
        age_seconds=age,
    )


def _possible(part: int | None, whole: int | None) -> bool:
    return part is not None and (whole is None or part <= whole)
