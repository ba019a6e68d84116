"""``llama-gpu doctor``."""

from __future__ import annotations

import ctypes.util
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_gpu import __version__, snapshot_gpus
from llama_gpu.catalog import scan
from llama_gpu.cli.show import print_json, print_lines, size
from llama_gpu.config import Config, load_config
from llama_gpu.engine import find_engine
from llama_gpu.errors import ConfigError


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
        _about_engine(settings),
        _about_memory(),
        *_about_models(settings),
        _about_port(settings),
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
    library = os.environ.get("LLAMA_GPU_NVML_LIBRARY") or ctypes.util.find_library("nvidia-ml")
    snapshot = snapshot_gpus()
    if snapshot.error:
        yield Finding("gpu", ok=False, text=f"{snapshot.error}. Until then everything runs on the CPU.")
    if snapshot.driver_version or len(snapshot):
        yield Finding("driver", ok=True, text=f"{snapshot.driver_version or 'version unknown'}, {library}")
    for gpu in snapshot:
        text = f"{gpu.name or 'unnamed'}, {size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"
        if gpu.health_reason:
            text = f"{text}; {gpu.health}: {gpu.health_reason}"
        yield Finding(f"gpu {gpu.index}", ok=gpu.health == "ok", text=text)


def _about_engine(settings: Config) -> Finding:
    try:
        engine = find_engine(settings.engine.path, kind=settings.engine.kind)
    except ConfigError as error:
        return Finding("engine", ok=False, text=str(error))
    text = (
        f"{engine.kind}, {engine.version or 'version unknown'}, {' '.join(engine.command)} ({engine.reason})"
    )
    return Finding("engine", ok=True, text=text)


def _about_memory() -> Finding:
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE")}
    total = pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"]
    return Finding("memory", ok=True, text=f"{size(total)}, {os.cpu_count()} CPUs")


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
    for entry in catalog.broken:
        yield Finding("model file", ok=False, text=entry.error or entry.id)


def _about_port(settings: Config) -> Finding:
    host, port = settings.server.host, settings.server.port
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return Finding("port", ok=True, text=f"{host}:{port} is free")
    except OSError as error:
        text = f"{host}:{port} cannot be used ({error.strerror}); choose another with --port or --host"
        return Finding("port", ok=False, text=text)
