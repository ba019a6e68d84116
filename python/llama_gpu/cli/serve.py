"""``llama-gpu serve``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from llama_gpu.config import load_config
from llama_gpu.logs import configure_logs


def serve(
    *models: Path,
    config: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    api_key: tuple[str, ...] = (),
    pool_size: int | None = None,
    context_length: Annotated[int | None, Parameter(alias="-c")] = None,
    parallel: int | None = None,
    gpu: Annotated[bool | None, Parameter(negative="--no-gpu")] = None,
    strategy: Literal["single-gpu-preferred", "distribute", "pack"] | None = None,
    engine: str | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
    json: bool = False,
) -> int:
    """Serve models through one OpenAI-compatible endpoint.

    Flags win over LLAMA_GPU_<SECTION>_<KEY> variables, and those over the configuration file.

    Parameters
    ----------
    models
        Folders to search for *.gguf files, or such files (default: models).
    config
        A YAML, TOML or JSON file.
    host
        Address to listen on (default: 127.0.0.1).
    port
        Port to listen on; 0 takes any free one (default: 8080).
    api_key
        A key that requests must carry; may be given several times. The process list shows
        it: LLAMA_GPU_SERVER_API_KEYS does not.
    pool_size
        How many servers may run at once.
    context_length
        Tokens of context for models that have no length of their own in the configuration.
    parallel
        Requests that one server answers at the same time, likewise.
    gpu
        Use the GPUs, or serve everything on the CPU.
    strategy
        How models are laid on the GPUs.
    engine
        auto, llama-server, embedded, or the path of a llama-server.
    log_level
        How much is logged.
    json
        Log JSON objects instead of lines for people.
    """
    overrides: dict[str, Any] = {
        "models_dirs": list(models) or None,
        "server.host": host,
        "server.port": port,
        "server.api_keys": list(api_key) or None,
        "server_pool.size": pool_size,
        "defaults.context_length": context_length,
        "defaults.parallel": parallel,
        "gpu.enabled": gpu,
        "gpu.gpu_allocation_strategy": strategy,
        "engine.kind" if engine in {"auto", "llama-server", "embedded"} else "engine.path": engine,
        "log.level": log_level,
        "log.format": "json" if json else None,
    }
    settings = load_config(config, overrides)
    configure_logs(settings.log)
    from llama_gpu.api.run import serve as run  # noqa: PLC0415 - a wrong setting is told without it

    return asyncio.run(run(settings))
