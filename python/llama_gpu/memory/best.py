"""The best tier known of what ``estimate`` is asked: measured, then projected, then analytic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from llama_gpu import _core
from llama_gpu.engine.find import embedded_engine, llama_server_engine
from llama_gpu.errors import LlamaGpuError
from llama_gpu.launch import Engine
from llama_gpu.memory.case import gpu_kind, model_identity, options_text
from llama_gpu.memory.record import Record
from llama_gpu.memory.store import EngineMark, MemoryStore, default_file, store_at

__all__ = ["best_estimate", "build_now", "build_of", "mark_of"]


def best_estimate(
    model: str | PathLike[str] | _core.Header, options: Mapping[str, Any], store: MemoryStore | None = None
) -> _core.MemoryEstimate:
    """``estimate(..., tier="best")``: a record of exactly this case where there is one, else analytic.

    The llama.cpp is the one that the proxy used last here, as it stands there now.
    """
    header = model if isinstance(model, _core.Header) else _core.read_header(model)
    analytic = _core.estimate(header, **options)
    store = store_at(default_file()) if store is None else store
    # What llama.cpp takes alone is not what was measured on a GPU.
    if analytic.devices and options.get("backend", "cuda") != "cuda":
        return analytic
    mark = store.engine()
    build = None if mark is None else build_now(mark)
    if build is None:
        return analytic
    try:
        records = store.find(model_identity(header), options_text(analytic, options), build)
    except OSError:
        return analytic
    layers = tuple(device.layers for device in analytic.devices)
    found = [record for record in records if record.case.layers == layers]
    if any(record.case.kinds for record in found):
        found = _possible_here(found, [gpu_kind(gpu) for gpu in _core.snapshot_gpus()])
    for tier in ("measured", "projected"):
        for record in found:
            if (known := getattr(record, tier)) is not None:
                estimate: _core.MemoryEstimate = known
                return estimate
    return analytic


def _possible_here(records: Iterable[Record], present: Sequence[str]) -> list[Record]:
    """The records whose GPUs this machine has; all of them where it shows none now."""
    there = Counter(present)
    return [record for record in records if not there or Counter(record.case.kinds) <= there]


def build_of(engine: Engine) -> str:
    """The llama.cpp build, as it stands in a key; one that tells no version goes by its file."""
    return mark_of(engine).build


def mark_of(engine: Engine) -> EngineMark:
    """The build, and the file by which a later change shows."""
    if engine.kind == "embedded":
        return EngineMark(f"embedded {engine.version}")
    program = engine.command[0]
    try:
        status = Path(program).stat()
    except OSError:
        return EngineMark(f"llama-server {engine.version}", program)
    version = engine.version or f"of {status.st_size} bytes, written at {status.st_mtime_ns}"
    return EngineMark(f"llama-server {version}", program, status.st_size, status.st_mtime_ns)


def build_now(mark: EngineMark) -> str | None:
    """The build of what stands where ``mark`` was taken; None if nothing usable does."""
    try:
        if not mark.program:
            return build_of(embedded_engine())
        status = Path(mark.program).stat()
        if (status.st_size, status.st_mtime_ns) == (mark.size, mark.modified_ns):
            return mark.build
        return build_of(llama_server_engine(mark.program))
    except (LlamaGpuError, OSError):
        return None
