"""``GET /health``: the shape that clients of Llama-Smart-Proxy already read."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from llama_gpu.api.gpus import (
    Bytes,
    Count,
    GpuIndex,
    GpuPoolStatus,
    HostHealth,
    NonNegative,
    gib,
    host_health,
    pool_status,
)
from llama_gpu.events import server_state
from llama_gpu.residents import Resident
from llama_gpu.supervisor import Supervisor

__all__ = ["Health", "health"]


class GpuAssignment(BaseModel):
    """Where a server was placed. ``actual``: what it was measured to hold."""

    gpu_ids: Annotated[list[GpuIndex], Field(min_length=1)]
    gpu_uuids: list[str]
    tensor_splits: list[NonNegative] | None
    n_gpu_layers: Annotated[int, Field(ge=-1)]
    estimated_vram_required: NonNegative
    estimated_vram_required_bytes: Bytes
    actual_vram_used: NonNegative | None
    actual_vram_used_bytes: Bytes | None

    @model_validator(mode="after")
    def _one_of_each_per_gpu(self) -> Self:
        lengths = {len(self.gpu_ids), len(self.gpu_uuids), len(self.tensor_splits or self.gpu_ids)}
        if len(lengths) != 1:
            raise ValueError("gpu_ids, gpu_uuids and tensor_splits differ in length")
        return self


class ServerHealth(BaseModel):
    """One running or starting server.

    ``degraded``: what it was started without because it would not fit. ``estimated_host_memory_bytes``: what
    it is promised of the host's memory, mapped weights included.
    """

    id: str
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    model_id: str
    status: Literal["stopped", "starting", "running", "stopping", "error"]
    process: Annotated[int, Field(gt=0)] | None
    gpu_assignment: GpuAssignment | None
    active_requests: Count
    degraded: list[str]
    estimated_host_memory_bytes: Bytes


class Health(BaseModel):
    """The whole answer. ``reasons`` says, in sentences, why the status is ``degraded``."""

    status: Literal["ok", "degraded"]
    mode: Literal["gpu", "cpu"]
    servers: list[ServerHealth]
    gpu_pool_status: GpuPoolStatus
    host_memory: HostHealth | None
    snapshot_age_seconds: NonNegative
    waiting_requests: Count
    reasons: list[str]

    @model_validator(mode="after")
    def _assigned_memory_within_the_gpus(self) -> Self:
        total = {gpu.uuid: gpu.total_memory_bytes for gpu in self.gpu_pool_status.gpu_list}
        for server in self.servers:
            if server.status != "error" and _exceeds(server.gpu_assignment, total):
                raise ValueError(f"{server.model_id} is assigned more memory than its GPUs have")
        return self


def _exceeds(assigned: GpuAssignment | None, total_bytes: dict[str, int | None]) -> bool:
    """Whether an assignment holds more than its GPUs have, as far as that is known."""
    sizes = [total_bytes.get(uuid) for uuid in assigned.gpu_uuids] if assigned else []
    known = [size for size in sizes if size is not None]
    if assigned is None or len(known) != len(sizes):
        return False
    held = max(assigned.estimated_vram_required_bytes, assigned.actual_vram_used_bytes or 0)
    return held > sum(known)


def health(supervisor: Supervisor) -> Health:
    """The present state, from the last snapshot; never waits for a GPU."""
    pool = pool_status(supervisor)
    servers = _servers(supervisor, {gpu.uuid: gpu.total_memory_bytes for gpu in pool.gpu_list})
    reasons = [
        f"GPU {gpu.id} is {gpu.health}: {gpu.health_reason or 'no reason given'}"
        for gpu in pool.gpu_list
        if gpu.state == "error"  # one that is only slowed down still takes models, and says so itself
    ]
    reasons += [
        f"the server of {server.model_id} is in error" for server in servers if server.status == "error"
    ]
    reasons += supervisor.monitoring_failures()
    return Health(
        status="degraded" if reasons else "ok",
        mode="gpu" if any(gpu.health != "lost" for gpu in pool.gpu_list) else "cpu",
        servers=servers,
        gpu_pool_status=pool,
        host_memory=host_health(supervisor),
        snapshot_age_seconds=supervisor.monitor.age_seconds,
        waiting_requests=supervisor.scheduler.waiting_count(),
        reasons=reasons,
    )


def _servers(supervisor: Supervisor, total_bytes: dict[str, int | None]) -> list[ServerHealth]:
    found = []
    for held in supervisor.residents().values():
        server, status = held.server, server_state(held.resident)
        # A server that has no port yet has not been started; its claim shows among the GPUs' models.
        if server is None or not server.port or status is None:
            continue
        resident = held.resident
        assignment = _assignment(resident, total_bytes)
        if _exceeds(assignment, total_bytes):
            status = "error"  # its GPUs are no longer what they were when it was placed
        found.append(
            ServerHealth(
                id=f"{resident.server}:{server.port}",
                host=server.host,
                port=server.port,
                model_id=resident.model,
                status=status,
                process=server.pid,
                gpu_assignment=assignment,
                active_requests=len(resident.active),
                degraded=[given_up.text for given_up in resident.assignment.degraded],
                estimated_host_memory_bytes=resident.assignment.host_bytes,
            )
        )
    return found


def _assignment(resident: Resident, total_bytes: dict[str, int | None]) -> GpuAssignment | None:
    assigned = resident.assignment
    if not assigned.gpu_uuids:
        return None
    estimated = sum(assigned.bytes_by_gpu.values())
    measured = None if resident.measured_by_gpu is None else sum(resident.measured_by_gpu.values())
    whole = [total_bytes.get(uuid) for uuid in assigned.gpu_uuids]
    if measured is not None and None not in whole and measured > sum(size or 0 for size in whole):
        measured = None  # more than the GPUs have: the driver's slip, not a measurement
    return GpuAssignment(
        gpu_ids=list(assigned.gpu_indices),
        gpu_uuids=list(assigned.gpu_uuids),
        tensor_splits=None if assigned.tensor_split is None else list(assigned.tensor_split),
        n_gpu_layers=assigned.gpu_layers,
        estimated_vram_required=estimated / (1 << 30),
        estimated_vram_required_bytes=estimated,
        actual_vram_used=gib(measured),
        actual_vram_used_bytes=measured,
    )
