"""``/openapi.json`` and ``/docs``: our own routes, from the models that they answer with.

What is passed on to llama-server is llama.cpp's to document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any, Literal

from pydantic import BaseModel

from llama_gpu import __version__
from llama_gpu.api.gpus import Gpus
from llama_gpu.api.health import Health
from llama_gpu.api.models import ErrorAnswer, ModelCard, ModelList
from llama_gpu.api.plan import PlanQuestion
from llama_gpu.events import Dropped, GpuChange, ServerChange
from llama_gpu.planning import PlanAnswer

__all__ = ["docs_page", "openapi_document"]

_REF = "#/components/schemas/{model}"
_JSON = "application/json"


@dataclass(frozen=True)
class _Answer:
    text: str
    model: type[BaseModel] | None = None
    media_type: str = _JSON


@dataclass(frozen=True)
class _Operation:
    path: str
    name: str
    summary: str
    answers: dict[int, _Answer]
    text: str = ""
    path_parameters: dict[str, str] = field(default_factory=dict)
    body: type[BaseModel] | None = None
    """What is posted; without it, it is a GET."""

    @property
    def method(self) -> str:
        return "post" if self.body else "get"


_KEY_NEEDED = _Answer("server.api_keys is set and the request carries none of them", ErrorAnswer)

_OPERATIONS = (
    _Operation(
        "/health",
        "health",
        "GPUs, servers, and whether all is well",
        {200: _Answer("The state, from the last snapshot; it never waits for a GPU", Health)},
        "Needs no key. Sizes are GiB; fields that end in _bytes are bytes. Unknown is null.",
    ),
    _Operation(
        "/v1/models",
        "models",
        "The models that can be asked for",
        {200: _Answer("All models; the folders are read anew", ModelList), 401: _KEY_NEEDED},
    ),
    _Operation(
        "/v1/models/{id}",
        "model",
        "One model",
        {
            200: _Answer("The model", ModelCard),
            401: _KEY_NEEDED,
            404: _Answer("No model of that id; known_models lists the ids", ErrorAnswer),
        },
        path_parameters={"id": "The model's id, an alias, or the name of its file"},
    ),
    _Operation(
        "/api/gpus",
        "gpus",
        "The GPUs, whose memory they hold, and how old each figure is",
        {200: _Answer("Every GPU of the last snapshot", Gpus), 401: _KEY_NEEDED},
    ),
    _Operation(
        "/api/plan",
        "plan",
        "Where models would go, and why not elsewhere",
        {
            200: _Answer("For each model its place or its refusal, with every alternative", PlanAnswer),
            400: _Answer("The body is no such question; param names the field", ErrorAnswer),
            401: _KEY_NEEDED,
            404: _Answer("No model of that id; known_models lists the ids", ErrorAnswer),
            413: _Answer("The body is too large", ErrorAnswer),
            422: _Answer("A model's file cannot be served", ErrorAnswer),
        },
        "On the GPUs as they are now, or on imagined ones. Nothing is changed by asking.",
        body=PlanQuestion,
    ),
    _Operation(
        "/api/events",
        "events",
        "State changes of GPUs and servers as they happen",
        {
            200: _Answer(
                "Server-sent events named gpu, server and dropped; their data are JSON: GpuChange, "
                "ServerChange, Dropped. The present states come first. Comments keep the connection open.",
                media_type="text/event-stream",
            ),
            401: _KEY_NEEDED,
        },
        "A client that reads too slowly loses the oldest changes and is told how many.",
    ),
    _Operation(
        "/metrics",
        "metrics",
        "Metrics for Prometheus",
        {
            200: _Answer("Prometheus text, version 0.0.4", media_type="text/plain"),
            401: _KEY_NEEDED,
        },
    ),
)


@cache
def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document; built once."""
    answers = [answer for operation in _OPERATIONS for answer in operation.answers.values()]
    named = [answer.model for answer in answers if answer.model]
    asked = {operation.body for operation in _OPERATIONS if operation.body}
    models: set[type[BaseModel]] = {*named, *asked, GpuChange, ServerChange, Dropped}
    ordered = sorted(models, key=lambda model: model.__name__)
    schemas: dict[str, Any] = {}
    for model in ordered:
        mode: Literal["validation", "serialization"] = "validation" if model in asked else "serialization"
        schema = model.model_json_schema(mode=mode, ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llama-gpu",
            "version": __version__,
            "description": "What llama-gpu answers itself. Every other path is llama-server's own and goes "
            "to the server of the model that the request names.",
        },
        "paths": {operation.path: {operation.method: _described(operation)} for operation in _OPERATIONS},
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _described(operation: _Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {str(status): _response(answer) for status, answer in operation.answers.items()},
    }
    if operation.text:
        described["description"] = operation.text
    if operation.body:
        schema = {"$ref": _REF.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    if operation.path_parameters:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in operation.path_parameters.items()
        ]
    return described


def _response(answer: _Answer) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=answer.model.__name__)} if answer.model else {"type": "string"}
    return {"description": answer.text, "content": {answer.media_type: {"schema": schema}}}


@cache
def docs_page() -> str:
    """The document as a page that needs nothing from anywhere."""
    document = openapi_document()
    parts = [f"<h1>llama-gpu {escape(__version__)}</h1>", f"<p>{escape(document['info']['description'])}</p>"]
    for path, methods in document["paths"].items():
        ((method, operation),) = methods.items()
        parts.append(
            f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}."
        )
        parts.append(f"{escape(operation.get('description', ''))}</p><table>")
        for status, answer in operation["responses"].items():
            media_type, content = next(iter(answer["content"].items()))
            shown = _type_html(content["schema"]) if media_type == _JSON else escape(media_type)
            parts.append(f"<tr><td>{status}<td>{shown}<td>{escape(answer['description'])}")
        parts.append("</table>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<h3 id='{escape(name)}'>{escape(name)}</h3>")
        parts.append(f"<p>{escape(schema.get('description', ''))}</p><table>")
        for key, value in schema.get("properties", {}).items():
            parts.append(f"<tr><td><code>{escape(key)}</code><td>{_type_html(value)}")
        parts.append("</table>")
    return _PAGE.format(body="\n".join(parts))


def _type_html(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type_html(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(escape(repr(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type_html(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>llama-gpu: routes</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }}
td {{ padding: .2rem 1rem .2rem 0; vertical-align: top; border-top: 1px solid #8884 }}
h2 {{ margin-top: 2.5rem }}
</style>
<p><a href="openapi.json">openapi.json</a></p>
{body}
</html>
"""
