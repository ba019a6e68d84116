"""Which llama.cpp serves the models: a configured one, ``llama-server`` on PATH, or the embedded one."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

from llama_gpu.engine.arguments import known_flags
from llama_gpu.errors import ConfigError
from llama_gpu.launch import Engine

__all__ = ["embedded_engine", "find_engine", "list_devices", "llama_server_engine"]


HOW_TO_GET_ONE = (
    "install the embedded engine with: pip install 'llama-gpu[engine]' ; "
    "or put llama.cpp's llama-server on PATH, or set engine.path to it"
)

ANSWER_SECONDS = 30.0  # a first start may read hundreds of megabytes of CUDA libraries from a slow disk
DEVICE_LINE = re.compile(r"^ +(\S+: .+)$", re.MULTILINE)
HELP_LINE = re.compile(r"^(-[\w-]+(?:,\s+-[\w-]+)*)", re.MULTILINE)
VERSION = re.compile(r"^version:\s*(.+)$", re.MULTILINE)
NEEDED_FLAGS = frozenset({"-m", "--alias", "--port", "-ngl", "--metrics"})


def find_engine(
    path: str | Path | None = None, *, kind: Literal["auto", "llama-server", "embedded"] = "auto"
) -> Engine:
    """The engine to start servers with.

    Runs ``llama-server --help`` and ``--version`` the first time it sees a program, so do not call it in
    an event loop. A program that was installed or replaced since the last call is found.

    Args:
        path: The ``llama-server`` to use, or the name of a command on PATH.
        kind: ``"auto"``: the one at ``path`` if given, else ``llama-server`` on PATH, else the embedded
            engine; ``"llama-server"``: the same, but never the embedded one; ``"embedded"``: no other.

    Raises:
        ConfigError: What was configured does not work, or there is no engine; says how to get one.
    """
    if kind == "embedded":
        return embedded_engine(reason="configured")
    if path is not None:
        found = shutil.which(Path(path).expanduser())
        if found is None:
            raise ConfigError(
                f"engine.path {str(path)!r} is no executable file nor a command on PATH; {HOW_TO_GET_ONE}",
                key="engine.path",
            )
        return llama_server_engine(Path(found).absolute(), reason="configured")
    found = shutil.which("llama-server")
    if found is None:
        if kind == "llama-server":
            raise ConfigError(f"no llama-server on PATH; {HOW_TO_GET_ONE}", key="engine.kind")
        return embedded_engine(reason="no llama-server on PATH")
    try:
        return llama_server_engine(Path(found).absolute(), reason="found on PATH")
    except ConfigError as error:
        if kind == "llama-server":
            raise
        return embedded_engine(reason=f"llama-server on PATH cannot be used: {error}")


def embedded_engine(reason: str = "") -> Engine:
    """The ``xllamacpp`` package, run as ``python -m llama_gpu.engine``; it is not imported here.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        because = f" ({reason})" if reason else ""
        raise ConfigError(
            f"no llama.cpp engine{because}: the package xllamacpp is not installed; {HOW_TO_GET_ONE}",
            key="engine",
        )
    from importlib.metadata import version  # noqa: PLC0415 - every start of the embedded engine would pay

    return Engine(
        kind="embedded",
        # -P: a file in the current folder must not be imported in place of a module.
        command=(sys.executable, "-P", "-m", "llama_gpu.engine"),
        flags=known_flags(),
        version=f"xllamacpp {version('xllamacpp')}",
        reason=reason,
    )


def llama_server_engine(path: str | Path, reason: str = "") -> Engine:
    """The ``llama-server`` at ``path``, with the flags that its ``--help`` lists.

    Raises:
        ConfigError: It does not run, or is no llama-server.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"engine.path {str(path)!r}: {error.strerror}", key="engine.path") from error
    flags, version = _examined(str(path), status.st_mtime_ns, status.st_size)
    return Engine(kind="llama-server", command=(str(path),), flags=flags, version=version, reason=reason)


@lru_cache(maxsize=8)
def _examined(path: str, _modified_ns: int, _size_bytes: int) -> tuple[frozenset[str], str | None]:
    """Flags and version, asked once for each build that lies at ``path``."""
    flags = frozenset(
        name for line in HELP_LINE.findall(_output((path, "--help"))) for name in re.split(r",\s+", line)
    )
    if missing := NEEDED_FLAGS - flags:
        raise ConfigError(
            f"{path} is no llama-server that can be used: --help does not list {', '.join(sorted(missing))}",
            key="engine.path",
        )
    version = VERSION.search(_output((path, "--version")))
    return flags, version[1].strip() if version else None


def list_devices(engine: Engine) -> tuple[str, ...]:
    """The GPUs that this engine can use, such as ``"CUDA0: NVIDIA L4 (22563 MiB, 22350 MiB free)"``.

    Empty for a build without GPU support, whatever GPUs the machine has. Starts the engine, which for a
    moment takes a context's memory on each GPU: seconds, so not in an event loop.

    Raises:
        ConfigError: The engine does not run.
    """
    if not engine.knows("--list-devices"):
        return ()
    return tuple(DEVICE_LINE.findall(_output((*engine.command, "--list-devices"), hide_gpus=False)))


def _output(command: tuple[str, ...], *, hide_gpus: bool = True) -> str:
    # No GPU is needed to print a text, and a CUDA context would take memory on every one.
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})}
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ANSWER_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stdout.decode("utf-8", "replace").strip().splitlines()
        detail = f": {said[-1]}" if said else ""
        raise ConfigError(
            f"`{shown}` ended with exit code {error.returncode}{detail}", key="engine.path"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{shown}` does not run: {error}", key="engine.path") from error
    return done.stdout.decode("utf-8", "replace")
