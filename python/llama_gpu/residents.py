"""The values that the scheduler, its placer and the health report share. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from llama_gpu import MemoryEstimate
from llama_gpu.budget import Claim

__all__ = ["Assignment", "LeavesFor", "Placer", "Resident", "ResidentState", "ResidentView"]


@dataclass(frozen=True)
class Assignment:
    """Where a model goes. ``bytes_by_gpu`` and the per-device tuples are empty on the CPU.

    ``bytes_by_gpu`` is the best that is known, ``estimate`` what was reckoned without that knowledge.
    """

    mode: str
    gpu_uuids: tuple[str, ...] = ()
    gpu_indices: tuple[int, ...] = ()
    bytes_by_gpu: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    gpu_layers: int = 0
    tensor_split: tuple[float, ...] | None = None
    evict: tuple[str, ...] = ()
    reason: str = ""
    estimate: MemoryEstimate | None = None


@dataclass(frozen=True)
class ResidentView:
    """What a placer may know of a resident model."""

    model: str
    bytes_by_gpu: Mapping[str, int]
    busy: bool
    idle_seconds: float
    reload_seconds: float | None


class Placer(Protocol):
    """Decides where a model goes, given what is resident; raises ``DoesNotFitError``."""

    def __call__(
        self, model: str, residents: Sequence[ResidentView], claims: Sequence[Claim], /
    ) -> Assignment:
        """Where ``model`` goes and who leaves for it; raises ``LlamaGpuError`` where it cannot."""
        ...


class ResidentState(StrEnum):
    """``MAKING_ROOM``: decided, waiting for others to leave. The rest as llama-swap's words."""

    MAKING_ROOM = "making_room"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


class LeavesFor(StrEnum):
    """Why a server leaves: for another model, after idle time, on request, with its GPU, by itself."""

    ROOM = "room"
    IDLE = "idle"
    ASKED = "asked"
    GPU_LOST = "gpu_lost"
    ENDED = "ended"


@dataclass
class Resident:
    """One model that holds, or is promised, memory."""

    model: str
    state: ResidentState
    assignment: Assignment
    since: float
    pid: int | None = None
    active: set[int] = field(default_factory=set)
    last_used: float = 0.0
    draining: bool = False
    leaves_because: str = ""
    leaves_for: LeavesFor = LeavesFor.ASKED
    waits_for: set[str] = field(default_factory=set)
    measured_by_gpu: Mapping[str, int] | None = None

    @property
    def bytes_by_gpu(self) -> Mapping[str, int]:
        """The claim, in bytes by GPU UUID: measured where known, else the estimate."""
        return self.assignment.bytes_by_gpu if self.measured_by_gpu is None else self.measured_by_gpu

    @property
    def claim(self) -> Claim:
        """This resident's entry in the sum that no GPU may exceed."""
        return Claim(self.bytes_by_gpu, self.pid, settled=self.state is ResidentState.READY)
