"""The log: one stream, one format, whoever speaks."""

import io
import json
import logging

import pytest
import structlog

from llama_gpu.config import LogSettings
from llama_gpu.logs import configure_logs, get_logger


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_lines_carry_the_context_and_the_fields(stream):
    configure_logs(LogSettings(format="json"), stream)
    with structlog.contextvars.bound_contextvars(request="r1"):
        get_logger("llama_gpu.test").info("placed", decision_us=12)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["decision_us"], line["request"], line["level"]) == (
        "placed",
        12,
        "r1",
        "info",
    )
    assert line["time"].endswith("Z")


def test_other_peoples_lines_come_in_the_same_format(stream):
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(stream))
    configure_logs(LogSettings(format="json"), stream)
    logging.getLogger("uvicorn.error").warning("port %d", 80)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["port 80"]


def test_console_lines_are_for_people(stream):
    configure_logs(LogSettings(), stream)
    get_logger("llama_gpu.test").info("placed qwen on GPU 0", decision_us=12)
    assert stream.getvalue().endswith("] placed qwen on GPU 0 decision_us=12\n")


def test_a_level_hides_what_is_below_it(stream):
    configure_logs(LogSettings(level="warning"), stream)
    get_logger("llama_gpu.test").info("quiet")
    get_logger("llama_gpu.test").warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_access_lines_of_the_http_server_appear_only_when_debugging(stream):
    configure_logs(LogSettings(), stream)
    logging.getLogger("uvicorn.access").info("GET /")
    assert stream.getvalue() == ""
    configure_logs(LogSettings(level="debug"), stream)
    logging.getLogger("uvicorn.access").info("GET /")
    assert "GET /" in stream.getvalue()


def test_an_exception_is_written_with_its_traceback(stream):
    configure_logs(LogSettings(format="json"), stream)
    try:
        int("seven")
    except ValueError:
        get_logger("llama_gpu.test").exception("broke")
    assert "ValueError: invalid literal" in json.loads(stream.getvalue())["exception"]
