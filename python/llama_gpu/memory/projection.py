"""llama.cpp's own dry run: ``llama-fit-params --fit-print on``, read. Nothing is started here.

It prints a line per device and one for the host: its name, then the bytes of model, context and
compute buffer in whole MiB, rounded down (common/fit.cpp ``common_fit_print``). It knows neither projectors
nor draft models, nor what a driver takes beside llama.cpp's buffers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llama_gpu._core import DeviceMemory, MemoryEstimate
from llama_gpu.launch import Engine

__all__ = ["projected_estimate", "projection_tool", "read_projection"]

MIB = 1 << 20
ROW = re.compile(r"^(\S+) (\d{1,9}) (\d{1,9}) (\d{1,9})\s*$", re.MULTILINE)
HOST = "Host"

Row = tuple[int, int, int]


def projection_tool(engine: Engine) -> Path | None:
    """The ``llama-fit-params`` beside the server's program, wherever a link to that leads."""
    if engine.kind != "llama-server":
        return None
    program = Path(engine.command[0])
    beside = (
        folder / f"llama-fit-params{program.suffix}" for folder in (program.parent, program.resolve().parent)
    )
    return next((tool for tool in beside if tool.is_file()), None)


def read_projection(text: str, devices: int) -> tuple[Row, ...] | None:
    """A row of MiB per device, the host's last; None for anything but so many devices and a host."""
    found = ROW.findall(text)
    if [name == HOST for name, *_ in found] != [False] * devices + [True]:
        return None
    return tuple((int(model), int(context), int(compute)) for _, model, context, compute in found)


def projected_estimate(
    rows: Sequence[Row], said: MemoryEstimate, whole: MemoryEstimate | None = None
) -> MemoryEstimate:
    """The projected tier; ``said`` is the analytic estimate of the same case.

    The dry run keeps the logits of a whole physical batch. Where ``said`` does not, ``whole`` is the
    estimate that does. Where dry run and estimate agree as far as whole MiB can tell, the bytes of ``said``
    stand; else the dry run's next MiB up, so that it is never too little. Overhead is the estimate's.
    """
    asked = said if whole is None else whole
    *devices, host = (
        _projected(row, *memories)
        for row, *memories in zip(rows, (*said.devices, said.host), (*asked.devices, asked.host), strict=True)
    )
    return MemoryEstimate(devices=devices, host=host, basis="projected", context_length=said.context_length)


def _projected(row: Row, said: DeviceMemory, asked: DeviceMemory) -> DeviceMemory:
    weights, context, compute = (
        size if whole // MIB == mib else (mib + 1) * MIB
        for size, whole, mib in zip(_buffers(said), _buffers(asked), row, strict=True)
    )
    return DeviceMemory(
        weights_bytes=weights,
        context_bytes=context,
        compute_bytes=compute,
        overhead_bytes=said.overhead_bytes,
        layers=said.layers,
    )


def _buffers(memory: DeviceMemory) -> Row:
    return memory.weights_bytes, memory.context_bytes, memory.compute_bytes
