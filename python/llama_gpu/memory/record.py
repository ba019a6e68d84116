"""What is known of one case: what was said, what llama.cpp projected, what a load took.

Values and their JSON; nothing is read or written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llama_gpu._core import DeviceMemory, MemoryEstimate
from llama_gpu.memory.case import Case

__all__ = [
    "DeviceTaken",
    "Record",
    "Taken",
    "estimate_from_json",
    "estimate_to_json",
    "taken_from_json",
    "taken_to_json",
]

PARTS = ("weights_bytes", "context_bytes", "compute_bytes", "overhead_bytes", "layers")


@dataclass(frozen=True, slots=True)
class DeviceTaken:
    """What a load took on one device, or on the host, in bytes.

    ``buffers`` is by kind, as llama.cpp logged it (``"model"``, ``"KV"``, ``"compute"``, …);
    ``driver_bytes`` is the driver's word on the process, None where it tells none.
    """

    buffers: Mapping[str, int] = field(default_factory=dict)
    driver_bytes: int | None = None

    @property
    def logged_bytes(self) -> int:
        """All buffers together."""
        return sum(self.buffers.values())

    def as_memory(self, layers: int, unlogged_bytes: int) -> DeviceMemory:
        """The same as ``estimate`` says it.

        What is in no buffer is what the driver counts beyond them, or ``unlogged_bytes`` where it tells
        nothing. Output buffers, which llama.cpp's own sums leave out, are overhead, too.
        """
        weights = self.buffers.get("model", 0) + self.buffers.get("LoRA", 0)
        context = self.buffers.get("KV", 0) + self.buffers.get("RS", 0)
        compute = self.buffers.get("compute", 0)
        other = self.logged_bytes - weights - context - compute
        if self.driver_bytes is not None:
            unlogged_bytes = max(0, self.driver_bytes - self.logged_bytes)
        return DeviceMemory(
            weights_bytes=weights,
            context_bytes=context,
            compute_bytes=compute,
            overhead_bytes=other + unlogged_bytes,
            layers=layers,
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """What one load took: a :class:`DeviceTaken` per device, in device order, and the host's.

    ``max_outputs`` is of how many tokens the server keeps logits, None where that says nothing of its build.
    """

    devices: tuple[DeviceTaken, ...]
    host: DeviceTaken
    max_outputs: int | None = None

    def as_estimate(self, said: MemoryEstimate) -> MemoryEstimate:
        """The measured tier; ``said`` is the analytic estimate of the same case."""
        return MemoryEstimate(
            devices=[
                took.as_memory(memory.layers, memory.overhead_bytes)
                for took, memory in zip(self.devices, said.devices, strict=True)
            ],
            host=self.host.as_memory(said.host.layers, 0),
            basis="measured",
            context_length=said.context_length,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """All tiers of one case. ``name`` and ``path`` are for display; ``at`` is seconds since 1970."""

    case: Case
    name: str
    path: str
    analytic: MemoryEstimate
    projected: MemoryEstimate | None = None
    taken: Taken | None = None
    at: float = 0.0
    loads: int = 0

    @property
    def measured(self) -> MemoryEstimate | None:
        """What a load took, as an estimate."""
        return None if self.taken is None else self.taken.as_estimate(self.analytic)

    @property
    def best(self) -> MemoryEstimate:
        """The best tier known."""
        return self.measured or self.projected or self.analytic

    def joined(self, newer: Record) -> Record:
        """``newer``, with what only this one knows."""
        return replace(
            newer,
            projected=newer.projected or self.projected,
            taken=newer.taken or self.taken,
            loads=self.loads + newer.loads,
        )


def estimate_to_json(estimate: MemoryEstimate) -> str:
    """An estimate as text."""
    return json.dumps(
        {
            "basis": estimate.basis,
            "context_length": estimate.context_length,
            "devices": [[getattr(memory, part) for part in PARTS] for memory in estimate.devices],
            "host": [getattr(estimate.host, part) for part in PARTS],
        }
    )


def estimate_from_json(text: str) -> MemoryEstimate:
    """The estimate of :func:`estimate_to_json`; raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    told: dict[str, Any] = json.loads(text)
    return MemoryEstimate(
        basis=told["basis"],
        context_length=told["context_length"],
        devices=[DeviceMemory(**dict(zip(PARTS, parts, strict=True))) for parts in told["devices"]],
        host=DeviceMemory(**dict(zip(PARTS, told["host"], strict=True))),
    )


def taken_to_json(taken: Taken) -> str:
    """What a load took as text."""
    return json.dumps(
        {
            "devices": [[took.driver_bytes, dict(took.buffers)] for took in taken.devices],
            "host": dict(taken.host.buffers),
            "max_outputs": taken.max_outputs,
        }
    )


def taken_from_json(text: str) -> Taken:
    """What :func:`taken_to_json` wrote; raises as :func:`estimate_from_json`."""
    told: dict[str, Any] = json.loads(text)
    return Taken(
        devices=tuple(DeviceTaken(buffers, driver) for driver, buffers in told["devices"]),
        host=DeviceTaken(told["host"]),
        max_outputs=told.get("max_outputs"),
    )
