"""What a ready server really holds on each GPU.

The driver's word per process counts first. Where it tells none (WSL, some containers), the
engine's own buffer lines do: they lack the CUDA context and workspaces, so they may only
raise an estimate, never lower it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_gpu import Gpu
from llama_gpu.buffer_lines import LoadedBuffers

__all__ = ["measured_by_gpu"]


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
            measured[uuid] = told
        elif logged is not None:
            measured[uuid] = max(estimate, logged)
        else:
            return None
    return measured or None


def _told_by_driver(gpu: Gpu | None, pid: int | None) -> int | None:
    if gpu is None or gpu.processes is None or pid is None:
        return None
    return next((process.used_bytes for process in gpu.processes if process.pid == pid), None)
