"""``GET /health``: the shape that clients of Llama-Smart-Proxy already read.

Sizes are GiB as floats because that is the contract; each has a sibling in bytes. Unknown is
null, never -1 or 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llama_gpu import Gpu
from llama_gpu.budget import available_gpus
from llama_gpu.residents import Resident, ResidentState
from llama_gpu.supervisor import ResidentServer, Supervisor

__all__ = ["Health", "health"]

GIB = 1 << 30

NonNegative = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
GpuIndex = Annotated[int, Field(ge=0)]


class GpuAssignment(BaseModel):
    """Where a server was placed."""

    gpu_ids: list[GpuIndex]
    gpu_uuids: list[str]
    tensor_splits: list[float] | None
    n_gpu_layers: int
    estimated_vram_required: NonNegative
    estimated_vram_required_bytes: Bytes
    actual_vram_used: NonNegative | None
    actual_vram_used_bytes: Bytes | None


class ServerHealth(BaseModel):
    """One running or starting server."""

    id: str
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    model_id: str
    status: Literal["stopped", "starting", "running", "stopping", "error"]
    process: int | None
    gpu_assignment: GpuAssignment | None
    active_requests: Annotated[int, Field(ge=0)]


class GpuHealth(BaseModel):
    """One GPU; ``id`` is its NVML index."""

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
    utilization: Annotated[float, Field(ge=0, le=100)] | None
    temperature: float | None
    power_usage: float | None
    compute_capability: str | None
    assigned_models: list[str]
    health: Literal["ok", "degraded", "lost"]
    health_reason: str | None
    age_seconds: NonNegative | None


class GpuPoolStatus(BaseModel):
    """All GPUs together. ``reason`` says why there is none, else null."""

    total_gpus: Annotated[int, Field(ge=0)]
    available_gpus: Annotated[int, Field(ge=0)]
    total_vram: NonNegative
    total_vram_bytes: Bytes
    available_vram: NonNegative
    available_vram_bytes: Bytes
    allocation_strategy: str
    gpu_list: list[GpuHealth]
    reason: str | None


class Health(BaseModel):
    """The whole answer."""

    status: Literal["ok", "degraded"]
    mode: Literal["gpu", "cpu"]
    servers: list[ServerHealth]
    gpu_pool_status: GpuPoolStatus
    snapshot_age_seconds: NonNegative
    waiting_requests: Annotated[int, Field(ge=0)]
    reasons: list[str]


def health(supervisor: Supervisor) -> Health:
    """The present state, from the last snapshot; never waits for a GPU."""
    pool = _pool(supervisor)
    # A server that has no port yet has not been started; its claim shows among the GPUs' models.
    started = [held for held in supervisor.residents().values() if held.server and held.server.port]
    servers = [_server(held) for held in started]
    reasons = [
        f"GPU {gpu.id} is {gpu.health}: {gpu.health_reason or 'no reason given'}"
        for gpu in pool.gpu_list
        if gpu.health != "ok"
    ]
    reasons += [
        f"the server of {server.model_id} is in error" for server in servers if server.status == "error"
    ]
    reasons += supervisor.monitoring_failures()
    return Health(
        status="degraded" if reasons else "ok",
        mode="cpu" if supervisor.on_cpu else "gpu",
        servers=servers,
        gpu_pool_status=pool,
        snapshot_age_seconds=supervisor.monitor.age_seconds,
        waiting_requests=supervisor.scheduler.waiting_count(),
        reasons=reasons,
    )


def _gib(amount: int | None) -> float | None:
    return None if amount is None else amount / GIB


def _pool(supervisor: Supervisor) -> GpuPoolStatus:
    residents = [held.resident for held in supervisor.residents().values()]
    gpus = supervisor.snapshot.gpus
    left = available_gpus(gpus, [resident.claim for resident in residents])
    ages = supervisor.monitor.ages
    listed = [
        _gpu(gpu, after.free_bytes, residents, ages.get(gpu.uuid))
        for gpu, after in zip(gpus, left, strict=True)
    ]
    usable = [gpu for gpu in listed if gpu.health == "ok"]
    total = sum(gpu.total_memory_bytes or 0 for gpu in listed)
    available = sum(gpu.available_memory_bytes or 0 for gpu in usable)
    return GpuPoolStatus(
        total_gpus=len(listed),
        available_gpus=sum(1 for gpu in usable if gpu.available_memory_bytes),
        total_vram=total / GIB,
        total_vram_bytes=total,
        available_vram=available / GIB,
        available_vram_bytes=available,
        allocation_strategy=supervisor.config.gpu.strategy,
        gpu_list=listed,
        reason=supervisor.snapshot.error if not listed else None,
    )


def _gpu(gpu: Gpu, available: int | None, residents: list[Resident], age: float | None) -> GpuHealth:
    capability = gpu.compute_capability
    return GpuHealth(
        id=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        total_memory=_gib(gpu.total_bytes),
        total_memory_bytes=gpu.total_bytes,
        free_memory=_gib(gpu.free_bytes),
        free_memory_bytes=gpu.free_bytes,
        used_memory=_gib(gpu.used_bytes),
        used_memory_bytes=gpu.used_bytes,
        available_memory_bytes=available,
        utilization=gpu.utilization,
        temperature=gpu.temperature,
        power_usage=gpu.power_watts,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        assigned_models=[r.model for r in residents if gpu.uuid in r.assignment.bytes_by_gpu],
        health=gpu.health,
        health_reason=gpu.health_reason,
        age_seconds=age,
    )


_STATUS = {
    ResidentState.LOADING: "starting",
    ResidentState.READY: "running",
    ResidentState.STOPPING: "stopping",
    ResidentState.MAKING_ROOM: "starting",
}


def _server(held: ResidentServer) -> ServerHealth:
    server, resident = held.server, held.resident
    assert server is not None  # noqa: S101 - the caller leaves out who has none yet
    return ServerHealth(
        id=f"{resident.model}:{server.port}",
        host=server.host,
        port=server.port,
        model_id=resident.model,
        status=_STATUS[resident.state],  # type: ignore[arg-type]
        process=server.pid,
        gpu_assignment=_assignment(resident),
        active_requests=len(resident.active),
    )


def _assignment(resident: Resident) -> GpuAssignment | None:
    assigned = resident.assignment
    if not assigned.gpu_uuids:
        return None
    estimated = sum(assigned.bytes_by_gpu.values())
    measured = None if resident.measured_by_gpu is None else sum(resident.measured_by_gpu.values())
    return GpuAssignment(
        gpu_ids=list(assigned.gpu_indices),
        gpu_uuids=list(assigned.gpu_uuids),
        tensor_splits=None if assigned.tensor_split is None else list(assigned.tensor_split),
        n_gpu_layers=assigned.gpu_layers,
        estimated_vram_required=estimated / GIB,
        estimated_vram_required_bytes=estimated,
        actual_vram_used=_gib(measured),
        actual_vram_used_bytes=measured,
    )
