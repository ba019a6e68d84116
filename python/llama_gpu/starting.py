"""From a decision to a server that can be started."""

from __future__ import annotations

import secrets

import aiohttp
import structlog

from llama_gpu.catalog import ModelEntry
from llama_gpu.config import ServerPoolSettings
from llama_gpu.launch import Engine, plan_launch
from llama_gpu.ports import Ports
from llama_gpu.residents import Assignment
from llama_gpu.server import Server

__all__ = ["new_server"]


def new_server(
    entry: ModelEntry,
    assignment: Assignment,
    engine: Engine,
    *,
    name: str,
    build: str | None,
    pool: ServerPoolSettings,
    http: aiohttp.ClientSession,
    ports: Ports,
) -> Server:
    """The server of ``entry`` as assigned, not started yet; its lines go to the log at level debug.

    ``name`` is the server's id, ``build`` the llama.cpp that it will run, as far as that is known.
    """
    plan = plan_launch(
        engine=engine,
        model_path=entry.path,
        alias=entry.id,
        api_key=secrets.token_urlsafe(24),
        gpu_uuids=assignment.gpu_uuids,
        gpu_layers=assignment.gpu_layers,
        tensor_split=assignment.tensor_split or (),
        embeddings=entry.embedding,
        mmproj=entry.mmproj,
        draft=entry.options.draft,
        threads=entry.options.threads,
        extra_arguments=entry.options.extra_arguments,
        host=pool.bind_host,
        **assignment.options,
    )
    return Server(
        plan,
        model=entry.id,
        build=build,
        http=http,
        ports=ports,
        start_timeout_seconds=entry.options.start_timeout_seconds or pool.health_timeout,
        stop_grace_seconds=pool.stop_timeout,
        degraded=tuple(one.text for one in assignment.degraded),
        on_log=structlog.get_logger("llama_gpu.engine").bind(model=name).debug,
    )
