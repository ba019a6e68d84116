"""What a ready server really holds on each GPU.

The driver's word per process counts first. Where it tells none (WSL, some containers), the
engine's own buffer lines do: they lack the CUDA context and workspaces, so they may only
raise an estimate, never lower it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_gpu import Gpu
from llama_gpu.buffer_lines import LoadedBuffers
from llama_gpu.memory.record import DeviceTaken, Taken

__all__ = ["measured_by_gpu", "taken_by_load"]


def measured_by_gpu(
    gpus: Sequence[Gpu], pid: int | None, estimated: Mapping[str, int], buffers: LoadedBuffers
) -> dict[str, int] | None:
    """Bytes by GPU UUID, or None where nothing was measured.

    ``estimated`` has the server's GPUs in the order in which CUDA sees them, so the i-th is
    llama.cpp's ``CUDA<i>``. ``gpus`` is a snapshot taken when the server was ready.
    """
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    measured: dict[str, int] = {}
    for position, (uuid, estimate) in enumerate(estimated.items()):
        told = _told_by_driver(by_uuid.get(uuid), pid)
        logged = buffers.device_bytes.get(f"CUDA{position}")
        if told is not None:
            measured[uuid] = max(told, logged or 0)
        elif logged is not None:
            measured[uuid] = max(estimate, logged)
        else:
            return None
    return measured or None


def taken_by_load(
    gpus: Sequence[Gpu],
    pid: int | None,
    gpu_uuids: Sequence[str],
    buffers: LoadedBuffers,
    *,
    logged_in_full: bool,
    says_outputs: bool = False,
) -> Taken | None:
    """The same to be remembered, by kind of buffer; None where a part of it is not known.

    ``logged_in_full`` is False where llama.cpp loads something that it logs no buffer of (a
    projector): then only the driver can tell. Of a log that is not complete nothing is remembered: what
    is missing would make later loads look smaller than they are. ``says_outputs``: of how many tokens
    the server keeps logits says something of its build.
    """
    if not buffers.complete:
        return None
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    devices = []
    for position, uuid in enumerate(gpu_uuids):
        told = _told_by_driver(by_uuid.get(uuid), pid)
        logged = buffers.by_device.get(f"CUDA{position}", {})
        if told is None and not (logged and logged_in_full):
            return None
        devices.append(DeviceTaken(logged, told))
    host = buffers.host_by_kind
    outputs = buffers.max_outputs if says_outputs else None
    return Taken(tuple(devices), DeviceTaken(host), outputs) if devices or host else None


def _told_by_driver(gpu: Gpu | None, pid: int | None) -> int | None:
    if gpu is None or gpu.processes is None or pid is None:
        return None
    return next((process.used_bytes for process in gpu.processes if process.pid == pid), None)
