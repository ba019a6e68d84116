"""The proxy as a process: bind, serve, print where, drain on TERM, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
import uvicorn

from llama_gpu.api.app import build_app
from llama_gpu.catalog import Catalog, scan
from llama_gpu.config import Config
from llama_gpu.engine import list_devices
from llama_gpu.errors import ConfigError, LlamaGpuError
from llama_gpu.supervisor import Supervisor

__all__ = ["serve"]

M_ARENA_MAX = -8  # malloc.h
SHOWN = 20
"""How many models the start-up text names; a folder may hold hundreds."""

_log = structlog.get_logger("llama_gpu")


async def serve(config: Config) -> int:
    """Serve until TERM or INT; returns the exit code.

    Raises:
        ConfigError: a model folder is missing, or the address cannot be bound.
    """
    _share_arenas()
    folders = config.models_dirs
    catalog = await asyncio.to_thread(scan, folders, config)
    listener = bind(config.server.host, config.server.port)
    try:
        async with Supervisor(config, catalog, rescan=lambda: scan(folders, config)) as supervisor:
            server = _Server(
                uvicorn.Config(
                    build_app(supervisor),
                    log_config=None,
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    ws="none",
                    server_header=False,
                    timeout_graceful_shutdown=round(config.server_pool.drain_timeout),
                ),
                on_exit_asked=supervisor.refuse_waiting,
            )
            for warning in (*config.warnings, *catalog.warnings):
                _log.warning(warning)
            await _tell_engine(supervisor)
            _tell_models(catalog, _address(listener))
            await server.serve(sockets=[listener])
    finally:
        listener.close()
    return 0


def _share_arenas() -> None:
    """Threads share one heap: with glibc's one for each, every new one keeps some 4 MB for good."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything is started; port 0 takes a free one.

    Raises:
        ConfigError: the port is taken, not allowed, or the host is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(_why_not_bound(host, port, error), key="server.port", source="--port") from error
    return listener


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            why = "another program listens there already; choose another with --port, or end that program"
        case errno.EACCES:
            why = "ports below 1024 need special rights; choose another with --port"
        case _:
            why = f"{error.strerror or error}; check --host and --port"
    return f"cannot listen on {host}:{port}: {why}"


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


async def _tell_engine(supervisor: Supervisor) -> None:
    try:
        engine = await supervisor.engine()
    except LlamaGpuError as error:
        _log.warning(f"no engine: {error}")
        return
    _log.info(f"engine: {engine.describe()}")
    if not supervisor.on_cpu and not await asyncio.to_thread(list_devices, engine):
        _log.warning(
            "the engine is a CPU build: models are placed on the GPUs but will run on the CPU; "
            "set engine.path to a llama-server built with CUDA"
        )


def _tell_models(catalog: Catalog, address: str) -> None:
    """Where it listens and a line that works when pasted; on stdout, for people and scripts."""
    for entry in catalog.broken:
        _log.warning(f"cannot be served: {entry.error}")
    models = catalog.models
    lines = [f"llama-gpu serves {len(models)} model{'s' * (len(models) != 1)} at {address}/v1"]
    lines += [f"  {entry.id}" for entry in models[:SHOWN]]
    lines += [f"  … and {len(models) - SHOWN} more: GET /v1/models"] if len(models) > SHOWN else []
    if models:
        lines += ["", "Try:", f"  {_curl(address, models[0].id, embedding=models[0].embedding)}"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _curl(address: str, model: str, *, embedding: bool) -> str:
    path, ask = "chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]}
    body = json.dumps({"model": model, **({"input": "Hello"} if embedding else ask)})
    path = "embeddings" if embedding else path
    return f"curl {address}/v1/{path} -H 'Content-Type: application/json' -d '{body}'"


class _Server(uvicorn.Server):
    """uvicorn that ends with our exit code: its own handlers raise the signal again at the end."""

    def __init__(self, config: uvicorn.Config, *, on_exit_asked: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_exit_asked = on_exit_asked

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self._exit_asked, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _exit_asked(self, number: int) -> None:
        _log.info(f"{signal.Signals(number).name}: finishing what runs; once more to end at once")
        self.on_exit_asked()
        self.handle_exit(number, None)
