"""One log for everything in this process: structlog's lines and the standard library's.

It goes to the standard error stream, as lines for people or as JSON objects. Context
bound with ``structlog.contextvars`` (a request's id, its model) stands on every line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from llama_gpu.config import LogSettings

__all__ = ["configure_logs", "get_logger"]

# Their loggers bring handlers of their own, which would print every line twice.
_JOINING = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "aiohttp")


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module: ``get_logger(__name__)``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def configure_logs(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Sets the log up, once, at start; uvicorn is then run with ``log_config=None``.

    Requests are logged by the proxy itself, so uvicorn's access lines appear only at
    level ``debug``.
    """
    stream = stream or sys.stderr
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
    ]
    if settings.format == "json":
        shared += [
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
        ]
        renderer: Any = structlog.processors.JSONRenderer()
    else:
        shared += [structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False)]
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=0,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for name in _JOINING:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").setLevel(
        logging.DEBUG if settings.level == "debug" else logging.WARNING
    )
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
