"""The shapes that OpenAI clients expect: error envelopes, the model list, a peek into bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core

from llama_gpu import errors

__all__ = ["BadRequestError", "ErrorReply", "error_reply", "requested_model"]

_MULTIPART_MODEL = re.compile(rb'name="model"\r?\n(?:[^\r\n]+\r?\n)*\r?\n([^\r\n]*)')


class BadRequestError(errors.LlamaGpuError):
    """The client's request cannot be understood. ``param`` names the field."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True)
class ErrorReply:
    """Status, JSON body and headers of an error that we, not llama.cpp, speak."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str]


_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# class, status, code, and which of its attributes programs may want; the first match counts
_REPLIES: tuple[tuple[type[Exception], int, str, tuple[str, ...]], ...] = (
    (errors.UnknownModelError, 404, "model_not_found", ("known_models",)),
    (errors.QueueFullError, 429, "queue_full", ("retry_after_seconds",)),
    (
        errors.DoesNotFitError,
        503,
        "does_not_fit",
        ("required_bytes", "free_bytes_by_gpu", "smallest_change", "short_by_bytes", "degradations_tried"),
    ),
    (errors.InvalidGgufError, 422, "model_file_broken", ("reason", "offset", "path")),
    (errors.ModelFileError, 422, "model_file_unusable", ("path",)),
    (errors.StartTimeoutError, 504, "load_timeout", ()),
    (errors.ServerExitedError, 502, "server_exited", ("exit_code", "last_log_lines")),
    (errors.ServerError, 503, "server_unavailable", ()),
    (errors.ConfigError, 503, "not_configured", ("key",)),
    (Exception, 500, "internal_error", ()),
)


def error_reply(error: Exception, *, model: str | None = None) -> ErrorReply:
    """The reply for any error of ours; ``source`` tells it apart from llama.cpp's own errors."""
    status, code, names = next(reply[1:] for reply in _REPLIES if isinstance(error, reply[0]))
    if isinstance(error, BadRequestError):
        status, code = error.status, "bad_request"
    body: dict[str, Any] = {
        "message": str(error) or type(error).__name__,
        "type": _TYPE_BY_STATUS.get(status, "server_error"),
        "code": code,
        "param": getattr(error, "param", None),
        "source": "llama-gpu",
        **({"model": model} if model is not None else {}),
        **{attribute: getattr(error, attribute) for attribute in names},
    }
    seconds = getattr(error, "retry_after_seconds", None)
    if seconds is None and code == "server_unavailable":
        seconds = 5
    headers = {} if seconds is None else {"retry-after": str(max(1, round(seconds)))}
    return ErrorReply(status, {"error": body}, headers)


def requested_model(body: bytes, content_type: str, query_model: str | None) -> str:
    """The model that a request names: ``model`` in its JSON or form, else ``?model=``.

    Raises:
        BadRequestError: no model named, or a body that is no JSON.
    """
    named: Any = None
    if content_type.startswith("multipart/form-data"):
        found = _MULTIPART_MODEL.search(body)
        named = found.group(1).decode("utf-8", "replace") if found else None
    elif body:
        named = _model_in_json(body)
    if named is None:
        named = query_model
    if not isinstance(named, str) or not named:
        raise BadRequestError(
            'the request names no model: add a "model" field to the body, or ?model=ID to the address; '
            "GET /v1/models lists the ids",
            param="model",
        )
    return named


def _model_in_json(body: bytes) -> Any:
    try:
        parsed = pydantic_core.from_json(body)
    except ValueError as error:
        raise BadRequestError(f"the body is no valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadRequestError(f"the body must be a JSON object, not {type(parsed).__name__}")
    return parsed.get("model")
