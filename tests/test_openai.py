"""What clients see of our errors, and how the model is read from a request."""

from __future__ import annotations

import pytest

from llama_gpu import errors
from llama_gpu.openai import BadRequestError, error_reply, requested_model


@pytest.mark.parametrize(
    ("error", "status", "code", "fields"),
    [
        (errors.UnknownModelError("x", known_models=["a"]), 404, "model_not_found", {"known_models": ("a",)}),
        (
            errors.QueueFullError("x", retry_after_seconds=7.4),
            429,
            "queue_full",
            {"retry_after_seconds": 7.4},
        ),
        (
            errors.DoesNotFitError("x", required_bytes=9, free_bytes_by_gpu={"GPU-0": 4}),
            503,
            "does_not_fit",
            {"required_bytes": 9, "free_bytes_by_gpu": {"GPU-0": 4}, "smallest_change": None},
        ),
        (errors.InvalidGgufError("x", offset=8, reason="truncated"), 422, "model_file_broken", {"offset": 8}),
        (errors.StartTimeoutError("x"), 504, "load_timeout", {}),
        (errors.ServerExitedError("x", exit_code=-9), 502, "server_exited", {"exit_code": -9}),
        (errors.ServerError("x"), 503, "server_unavailable", {}),
        (errors.ConfigError("x", key="engine"), 503, "not_configured", {"key": "engine"}),
        (BadRequestError("x", param="model"), 400, "bad_request", {"param": "model"}),
        (RuntimeError("x"), 500, "internal_error", {}),
    ],
)
def test_each_error_has_its_status_code_and_fields(
    error: Exception, status: int, code: str, fields: dict[str, object]
) -> None:
    reply = error_reply(error, model="m")
    told = reply.body["error"]
    assert (reply.status, told["code"], told["message"], told["source"]) == (status, code, "x", "llama-gpu")
    assert {name: told[name] for name in fields} == fields


def test_a_full_queue_says_when_to_come_back_in_whole_seconds() -> None:
    reply = error_reply(errors.QueueFullError("x", retry_after_seconds=7.4))
    assert reply.headers["retry-after"] == "7"


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
)


@pytest.mark.parametrize(
    ("body", "content_type", "query", "model"),
    [
        (b'{"model": "a"}', "application/json", None, "a"),
        (b'{"model": "a"}', "application/json", "b", "a"),
        (b"{}", "", "b", "b"),
        (b"", "", "b", "b"),
        (FORM, "multipart/form-data; boundary=b", None, "whisper"),
    ],
)
def test_the_model_is_read_from_body_form_or_address(
    body: bytes, content_type: str, query: str | None, model: str
) -> None:
    assert requested_model(body, content_type, query) == model
