"""``/v1/models`` in OpenAI's shape, with what else is known of each model; our error envelope."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llama_gpu.catalog import Catalog, ModelEntry
from llama_gpu.residents import model_state
from llama_gpu.supervisor import Supervisor

__all__ = ["ErrorAnswer", "ModelCard", "ModelList", "model_card", "model_list"]


class ModelStatus(BaseModel):
    """Whether a model is loaded."""

    value: Literal["unloaded", "making_room", "loading", "ready", "stopping"]


class ModelMeta(BaseModel):
    """What the model's header says; ``size`` in bytes."""

    architecture: str | None
    n_params: Annotated[int, Field(ge=0)] | None
    n_ctx_train: Annotated[int, Field(ge=0)] | None
    quantization: str | None
    size: Annotated[int, Field(ge=0)]


class ModelCard(BaseModel):
    """One model. ``created``: when this proxy started, in seconds since 1970."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    status: ModelStatus
    meta: ModelMeta | None


class BrokenModel(BaseModel):
    """A file that cannot be served."""

    id: str
    path: str
    reason: str


class ModelList(BaseModel):
    """All models, and the files that cannot be served."""

    object: Literal["list"]
    data: list[ModelCard]
    broken: list[BrokenModel]


class ErrorBody(BaseModel):
    """An error in OpenAI's shape. Further fields depend on ``code``."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    code: str
    param: str | None = None
    source: Literal["llama-gpu"]


class ErrorAnswer(BaseModel):
    """What we, not llama.cpp, answer when something is wrong."""

    error: ErrorBody


def model_list(supervisor: Supervisor) -> ModelList:
    """Every model of the catalogue as it was last read."""
    catalog: Catalog = supervisor.catalog
    return ModelList(
        object="list",
        data=[model_card(supervisor, entry) for entry in catalog.models],
        broken=[
            BrokenModel(id=entry.id, path=str(entry.path), reason=entry.error or "")
            for entry in catalog.broken
        ],
    )


def model_card(supervisor: Supervisor, entry: ModelEntry) -> ModelCard:
    """One model of the catalogue."""
    header = entry.header
    status: Any = model_state(supervisor.scheduler.servers_of(entry.id))
    return ModelCard(
        id=entry.id,
        object="model",
        created=supervisor.started_at,
        owned_by="llama-gpu",
        aliases=list(entry.aliases),
        status=ModelStatus(value=status),
        meta=None
        if header is None
        else ModelMeta(
            architecture=header.architecture,
            n_params=header.parameter_count,
            n_ctx_train=header.trained_context_length,
            quantization=header.quantization,
            size=header.file_bytes,
        ),
    )
