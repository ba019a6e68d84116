"""``POST /api/plan``: where models would go, and why not elsewhere. Nothing is changed by asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, NonNegativeInt, ValidationError

from llama_gpu.catalog import ModelEntry
from llama_gpu.config.settings import CacheType, CpuPolicy, GpuNames, Layers
from llama_gpu.errors import ModelFileError
from llama_gpu.openai import BadRequestError
from llama_gpu.planning import PlanAnswer, Planning, State, imagined_gpus
from llama_gpu.supervisor import Supervisor

__all__ = ["PlanQuestion", "plan_answer"]

MOST = 64
"""Models, and GPUs, of one question: each model takes milliseconds."""

GpuSize = Annotated[ByteSize, Field(gt=0, le=1 << 50)]
Tokens = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[int, Field(ge=1, lt=1 << 31)]


class PlanOptions(BaseModel):
    """Options to ask with in place of the configured ones; they mean what they mean in the configuration."""

    model_config = ConfigDict(extra="forbid")

    context_length: Tokens | None = None
    parallel: Number | None = None
    kv_unified: bool | None = None
    batch: Number | None = None
    micro_batch: Number | None = None
    flash_attention: Literal["auto", "on", "off"] | None = None
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None
    gpu_layers: Layers = None
    cpu_moe_layers: NonNegativeInt | Literal["all"] | None = None
    kv_offload: bool | None = None
    swa_full: bool | None = None
    cpu: CpuPolicy | None = None
    partial: bool | None = None
    gpus: GpuNames | None = None
    max_gpus: Number | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    pinned: bool | None = None


class PlanQuestion(BaseModel):
    """What is asked. ``gpus``: sizes of imagined GPUs, all empty; without it, the GPUs as they are now."""

    model_config = ConfigDict(extra="forbid")

    models: Annotated[
        list[str],
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
        Field(min_length=1, max_length=MOST),
    ]
    gpus: Annotated[list[GpuSize], Field(max_length=MOST)] | None = None
    options: PlanOptions = PlanOptions()


async def plan_answer(supervisor: Supervisor, body: bytes) -> PlanAnswer:
    """The answer to a question in JSON.

    Raises:
        BadRequestError: the body is no such question; the field is named.
        UnknownModelError, ModelFileError: a model that cannot be asked about.
    """
    try:
        question = PlanQuestion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise BadRequestError(f"{field or 'the body'}: {first['msg']}", param=field or None) from error
    entries = [_with(await _known(supervisor, name), question.options) for name in question.models]
    entries = list({entry.id: entry for entry in entries}.values())
    state = _state(supervisor, question, entries)
    asked = {entry.id: entry for entry in entries}
    planning = Planning(
        supervisor.config,
        lambda name: asked.get(name) or supervisor.entry(name),
        supervisor.known_memory,
        state,
    )
    return await asyncio.to_thread(planning.answer, entries)


async def _known(supervisor: Supervisor, name: str) -> ModelEntry:
    entry = await supervisor.look_up(name)
    if entry.error is not None:
        raise ModelFileError(entry.error, path=str(entry.path))
    return entry


def _with(entry: ModelEntry, options: PlanOptions) -> ModelEntry:
    changes = {name: getattr(options, name) for name in options.model_fields_set}
    return replace(entry, options=entry.options.model_copy(update=changes)) if changes else entry


def _state(supervisor: Supervisor, question: PlanQuestion, entries: Sequence[ModelEntry]) -> State:
    """The state of this moment, as values: the question is thought about elsewhere."""
    if question.gpus is not None:
        return State(imagined_gpus(question.gpus))
    scheduler, now = supervisor.scheduler, time.monotonic()
    seen = {entry.id: scheduler.seen_by(entry.id, now) for entry in entries}
    residents = scheduler.residents.values()
    return State(
        supervisor.snapshot,
        seen_by=seen.__getitem__,
        claims=[resident.claim for resident in residents],
        residents=frozenset(resident.model for resident in residents),
        host=supervisor.host,
    )
