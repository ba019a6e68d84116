"""``llama-gpu doctor``."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_gpu import __version__, snapshot_gpus
from llama_gpu.catalog import Catalog, scan
from llama_gpu.cli.show import print_json, print_lines, size
from llama_gpu.config import Config, load_config
from llama_gpu.engine import find_engine, list_devices
from llama_gpu.errors import ConfigError
from llama_gpu.host import host_memory
from llama_gpu.launch import Engine
from llama_gpu.supervisor import CPU_POOL_SIZE
from llama_gpu.together import plan_together


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    about: str
    ok: bool
    text: str
    """What was found; if not ok, what to do."""


def doctor(*models: Path, config: Path | None = None, json: bool = False) -> int:
    """Check that this machine can serve, and say what to do where it cannot.

    The exit code is 1 if something keeps models from being served. No GPU does not.

    Parameters
    ----------
    models
        The folders that llama-gpu serve is going to be given (default: models).
    config
        The configuration that llama-gpu serve is going to be given.
    json
        Print one JSON document.
    """
    settings = load_config(config, {"models_dirs": list(models) or None})
    findings = [
        _about_python(),
        *_about_gpus(settings),
        *_about_engine(settings),
        _about_memory(settings),
        *_about_models(settings),
        *_about_ports(settings),
        *(Finding("settings", ok=False, text=warning) for warning in settings.warnings),
    ]
    keeps_from_serving = {"engine", "port", "models"}
    code = int(any(not finding.ok and finding.about in keeps_from_serving for finding in findings))
    if json:
        print_json({"ok": code == 0, "findings": [asdict(finding) for finding in findings]})
    else:
        print_lines(
            *(f"{'ok   ' if finding.ok else 'look '} {finding.about}: {finding.text}" for finding in findings)
        )
    return code


def _about_python() -> Finding:
    version = sys.version.split()[0]
    return Finding("llama-gpu", ok=True, text=f"{__version__}, Python {version}, {sys.platform}")


def _about_gpus(settings: Config) -> Iterator[Finding]:
    if not settings.gpu.enabled:
        yield Finding("gpu", ok=True, text="switched off by gpu.enabled; everything runs on the CPU")
        return
    if not settings.gpu.enable_gpu_monitoring:
        text = "not looked at (gpu.enable_gpu_monitoring: false); everything runs on the CPU"
        yield Finding("gpu", ok=True, text=text)
        return
    snapshot = snapshot_gpus()
    if snapshot.error:
        yield Finding("gpu", ok=False, text=f"{snapshot.error}. Until then everything runs on the CPU.")
    if snapshot.driver_version or len(snapshot):
        text = f"{snapshot.driver_version or 'version unknown'}, {_loaded_library() or 'library unknown'}"
        yield Finding("driver", ok=True, text=text)
    yield from _about_permissions(has_gpus=bool(len(snapshot)))
    for gpu in snapshot:
        text = f"{gpu.name or 'unnamed'}, {size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"
        if gpu.health_reason:
            text = f"{text}; {gpu.health}: {gpu.health_reason}"
        yield Finding(f"gpu {gpu.index}", ok=gpu.health == "ok", text=text)


def _loaded_library() -> str | None:
    """Where the driver's library was found: the system knows what this process has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if "libnvidia-ml" in line)
    return next(paths, None)


def _about_permissions(*, has_gpus: bool) -> Iterator[Finding]:
    devices = sorted(Path("/dev").glob("nvidia[0-9c]*"))
    denied = [str(device) for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if denied:
        text = (
            f"no right to use {', '.join(denied)}: join the group that owns them (ls -l), or run as its user"
        )
        yield Finding("permissions", ok=False, text=text)
    elif devices:
        yield Finding("permissions", ok=True, text=f"{', '.join(map(str, devices))} can be used")
    elif has_gpus:
        yield Finding("permissions", ok=True, text="there are no /dev/nvidia* files; the driver answers")


def _about_devices(engine: Engine) -> Finding:
    devices = list_devices(engine)
    seen = len(snapshot_gpus())
    if devices or not seen:
        return Finding("engine devices", ok=True, text="; ".join(devices) or "the CPU")
    text = (
        f"the engine sees none of the {seen} GPUs: models would run on the CPU; "
        "set engine.path to a llama-server built with CUDA"
    )
    return Finding("engine devices", ok=False, text=text)


def _about_engine(settings: Config) -> Iterator[Finding]:
    try:
        engine = find_engine(settings.engine.path, kind=settings.engine.kind)
    except ConfigError as error:
        yield Finding("engine", ok=False, text=str(error))
        return
    text = (
        f"{engine.kind}, {engine.version or 'version unknown'}, {' '.join(engine.command)} ({engine.reason})"
    )
    yield Finding("engine", ok=True, text=text)
    if settings.gpu.enabled and settings.gpu.enable_gpu_monitoring:
        try:
            yield _about_devices(engine)
        except ConfigError as error:
            yield Finding("engine devices", ok=False, text=str(error))


def _about_memory(settings: Config) -> Finding:
    host, cpus = host_memory(), f"{os.cpu_count()} CPUs"
    if host is None:
        text = f"the host's memory cannot be read, {CPU_POOL_SIZE} models at once run on the CPU; {cpus}"
        return Finding("memory", ok=True, text=text)
    limit = settings.memory.host_limit_bytes
    most = f", of which servers may take {size(limit)} (memory.host_limit_bytes)" if limit is not None else ""
    headroom = settings.memory.host_headroom_bytes
    text = f"{size(host.available_bytes)} available of {size(host.total_bytes)}{most}, {cpus}"
    if host.available_bytes > headroom:
        return Finding("memory", ok=True, text=text)
    advice = f"{size(headroom)} must stay free: end other programs, or lower memory.host_headroom_bytes"
    return Finding("memory", ok=False, text=f"{text}; {advice}")


def _about_models(settings: Config) -> Iterator[Finding]:
    try:
        catalog = scan(settings.models_dirs, settings)
    except ConfigError as error:
        yield Finding(
            "models", ok=False, text=f"{error}; give llama-gpu serve another folder, or make this one"
        )
        return
    folders = ", ".join(map(str, settings.models_dirs))
    if not catalog.models:
        yield Finding("models", ok=False, text=f"none in {folders}: put *.gguf files there")
    else:
        yield Finding("models", ok=True, text=f"{len(catalog.models)} in {folders}")
        yield from _about_pinned(settings, catalog)
    for entry in catalog.broken:
        yield Finding("model file", ok=False, text=entry.error or entry.id)


def _about_pinned(settings: Config, catalog: Catalog) -> Iterator[Finding]:
    pinned = [entry for entry in catalog.models if entry.options.pinned]
    gpus = snapshot_gpus().gpus if settings.gpu.off_reason is None else ()
    if not pinned or not gpus:
        return
    # What the proxy holds itself is in use now, but is its to give.
    empty = [gpu.replace(free_bytes=gpu.total_bytes) for gpu in gpus]
    problem = plan_together(settings, pinned, empty).problem
    names = ", ".join(entry.id for entry in pinned)
    yield Finding("pinned models", ok=problem is None, text=problem or f"{names} have room together")


def _about_ports(settings: Config) -> Iterator[Finding]:
    host, port = settings.server.host, settings.server.port
    yield _about_port("port", host, port, "choose another with --port or --host")
    pool = settings.server_pool
    if pool.port_start is not None:
        yield _about_port("first server port", pool.bind_host, pool.port_start, "the next ones are tried")


def _about_port(about: str, host: str, port: int, advice: str) -> Finding:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return Finding(about, ok=True, text=f"{host}:{port} is free")
    except OSError as error:
        text = f"{host}:{port} cannot be used ({error.strerror}); {advice}"
        return Finding(about, ok=False, text=text)
