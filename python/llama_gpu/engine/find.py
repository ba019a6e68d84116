"""Which llama.cpp serves the models: a configured one, ``llama-server`` on PATH, or the embedded one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from llama_gpu.engine.arguments import known_flags
from llama_gpu.errors import ConfigError
from llama_gpu.launch import Engine

__all__ = ["EMBEDDED", "embedded_engine", "find_engine", "llama_server_engine"]

EMBEDDED = "embedded"
AUTOMATIC = "auto"
CONFIG_KEY = "engine"

HOW_TO_GET_ONE = (
    "install the embedded engine with: pip install 'llama-gpu[engine]' ; "
    "or put llama.cpp's llama-server on PATH or name its path in the configuration as `engine`"
)

ANSWER_SECONDS = 30.0  # a first start may read hundreds of megabytes of CUDA libraries from a slow disk
HELP_LINE = re.compile(r"^(-[\w-]+(?:,\s+-[\w-]+)*)", re.MULTILINE)
VERSION = re.compile(r"^version:\s*(.+)$", re.MULTILINE)
NEEDED_FLAGS = frozenset({"-m", "--alias", "--port", "-ngl", "--metrics"})


def find_engine(configured: str | None = None) -> Engine:
    """The engine to start servers with.

    Args:
        configured: A path or a command name; ``"embedded"``; ``"auto"`` or ``None`` for
            ``llama-server`` on PATH, else the embedded engine.

    Raises:
        ConfigError: What was configured does not work, or there is no engine at all; the message says how
            to get one. Runs ``llama-server --help`` and ``--version``: do not call it in an event loop.
    """
    if configured == EMBEDDED:
        return embedded_engine(reason="configured")
    if configured not in (None, AUTOMATIC):
        path = shutil.which(Path(configured or "").expanduser())
        if path is None:
            raise ConfigError(
                f"engine {configured!r} is not an executable file nor a command on PATH; {HOW_TO_GET_ONE}",
                key=CONFIG_KEY,
            )
        return llama_server_engine(Path(path).absolute(), reason="configured")
    path = shutil.which("llama-server")
    if path is None:
        return embedded_engine(reason="no llama-server on PATH")
    try:
        return llama_server_engine(path, reason="found on PATH")
    except ConfigError as error:
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
            key=CONFIG_KEY,
        )
    return Engine(
        kind="embedded",
        # -P: a file in the current folder must not be imported in place of a module.
        command=(sys.executable, "-P", "-m", "llama_gpu.engine"),
        flags=known_flags(),
        version=f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        reason=reason,
    )


def llama_server_engine(path: str | Path, reason: str = "") -> Engine:
    """The ``llama-server`` at ``path``, with the flags that its ``--help`` lists.

    Raises:
        ConfigError: It does not run, or is no llama-server.
    """
    flags = frozenset(
        name for line in HELP_LINE.findall(_output(path, "--help")) for name in re.split(r",\s+", line)
    )
    if missing := NEEDED_FLAGS - flags:
        raise ConfigError(
            f"{path} is no llama-server that can be used: --help does not list {', '.join(sorted(missing))}",
            key=CONFIG_KEY,
        )
    version = VERSION.search(_output(path, "--version"))
    return Engine(
        kind="llama-server",
        command=(str(path),),
        flags=flags,
        version=version[1].strip() if version else None,
        reason=reason,
    )


def _output(path: str | Path, flag: str) -> str:
    # No GPU is needed to print a text, and a CUDA context would take memory on every one.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [str(path), flag],
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
            f"`{path} {flag}` ended with exit code {error.returncode}{detail}", key=CONFIG_KEY
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{path} {flag}` does not run: {error}", key=CONFIG_KEY) from error
    return done.stdout.decode("utf-8", "replace")
